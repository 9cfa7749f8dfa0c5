"""The tokens of one block -> its input block embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import BlockConfig
from blocktx.model.layers import MLP, embedding, layer_norm, linear
from blocktx.ops import attend


class EncoderLayer(nn.Module):
    """A RoBERTa layer: attention, then MLP, each with its norm after the residual."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_TxD: jax.Array, real_T: jax.Array) -> jax.Array:
        encoder = self.config.embedder.encoder
        heads = ("heads", "head_size")
        shape = (3, encoder.heads, encoder.width // encoder.heads)
        qkv = linear(self.config, shape, name="qkv", axes=("width", "qkv", *heads))(x_TxD)
        mask_TxT = jnp.broadcast_to(real_T, (real_T.size, real_T.size))
        attended_TxHxC = attend(qkv[:, 0], qkv[:, 1], qkv[:, 2], mask_TxT)
        out = linear(self.config, encoder.width, axis=(-2, -1), name="out", axes=(*heads, "width"))
        x_TxD = layer_norm(self.config, name="attention_norm")(x_TxD + out(attended_TxHxC))
        mlp = MLP(self.config, encoder.mlp_size, name="mlp")
        return layer_norm(self.config, name="mlp_norm")(x_TxD + mlp(x_TxD))


class Encoder(nn.Module):
    """RoBERTa: tokens, learned positions and a type, normed; layers."""

    config: BlockConfig

    @nn.compact
    def __call__(self, tokens_T: jax.Array, real_T: jax.Array) -> jax.Array:
        """Outputs `[T, width]`; tokens where `real_T` is False are not attended to.

        Positions count from `pad_id + 1`, over the tokens other than `pad_id`, which are all at
        position `pad_id`: so RoBERTa has it.
        """
        config, encoder = self.config, self.config.embedder.encoder
        counted_T = tokens_T != encoder.pad_id
        position_T = encoder.pad_id + jnp.cumsum(counted_T) * counted_T
        x_TxD = (
            embedding(config, encoder.width, name="tokens")(tokens_T)
            + embedding(config, encoder.width, rows=config.encoder_positions, name="positions")(
                position_T
            )
            + embedding(config, encoder.width, rows=1, name="type")(jnp.zeros_like(tokens_T))
        )
        x_TxD = layer_norm(config, name="embedding_norm")(x_TxD)
        for i in range(encoder.layers):
            x_TxD = EncoderLayer(config, name=f"layer_{i}")(x_TxD, real_T)
        return x_TxD


class Embedder(nn.Module):
    """All kinds of `EmbedderConfig`.

    To the lookup and projection embedders padding is content: a padding token contributes its row.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, tokens_K: jax.Array, mask_K: jax.Array) -> jax.Array:
        """The n embeddings `[n, D]` of a block whose real tokens `mask_K` marks."""
        config, embedder = self.config, self.config.embedder
        width = config.context_width
        if embedder.kind == "lookup":
            out_nD = embedding(config, width // config.block_length, name="tokens")(tokens_K)
        else:
            if embedder.kind == "projection":
                row_width = embedder.width or config.block_decoder.width
                rows_TxD = embedding(config, row_width, name="tokens")(tokens_K)
            else:
                rows_TxD = self._encode(tokens_K, mask_K)
            if embedder.concatenate:
                out_nD = rows_TxD
            else:
                out_nD = linear(
                    config,
                    width,
                    axis=(-2, -1),
                    name="projection",
                    axes=("positions", "width", "width"),
                )(rows_TxD)
        return out_nD.reshape(config.embeddings_per_block, config.block_decoder.width)

    def _encode(self, tokens_K: jax.Array, mask_K: jax.Array) -> jax.Array:
        embedder = self.config.embedder
        cls = embedder.cls_tokens if embedder.kind == "cls" else 0
        tokens_T = jnp.pad(tokens_K, (cls, 0), constant_values=embedder.encoder.cls_id)
        real_T = jnp.pad(mask_K, (cls, 0), constant_values=True)
        outputs_TxD = Encoder(self.config, name="encoder")(tokens_T, real_T)
        return outputs_TxD[:cls] if cls else outputs_TxD
