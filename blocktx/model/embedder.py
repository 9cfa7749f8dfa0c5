"""The embedder: from the tokens of one block to its input block embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import BlockConfig
from blocktx.model.layers import MLP, Norm, embedding, linear
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
        x_TxD = Norm(self.config, name="attention_norm")(x_TxD + out(attended_TxHxC))
        mlp = MLP(self.config, encoder.mlp_size, name="mlp")
        return Norm(self.config, name="mlp_norm")(x_TxD + mlp(x_TxD))


class Encoder(nn.Module):
    """RoBERTa: tokens, learned positions and a type, normed; layers."""

    config: BlockConfig

    @nn.compact
    def __call__(self, tokens_T: jax.Array, real_T: jax.Array) -> jax.Array:
        """Return `[T, width]`. Tokens where `real_T` is False are not attended to.

        As in RoBERTa, positions count from `pad_id + 1` over the tokens other than `pad_id`, and
        these are at position `pad_id`.
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
        x_TxD = Norm(config, name="embedding_norm")(x_TxD)
        for i in range(encoder.layers):
            x_TxD = EncoderLayer(config, name=f"layer_{i}")(x_TxD, real_T)
        return x_TxD


class Embedder(nn.Module):
    """All kinds of `EmbedderConfig`.

    All embedders but encoder and cls treat padding as content: it contributes its row.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, tokens_K: jax.Array, mask_K: jax.Array) -> jax.Array:
        """Return the n embeddings `[n, D]` of a block whose real tokens `mask_K` marks."""
        config = self.config
        if config.embedder.kind in ("lookup", "projection", "mean", "mean_mlp"):
            rows_RxD = embedding(config, config.embedder_rows[1], name="tokens")(tokens_K)
        else:
            rows_RxD = self._encode(tokens_K, mask_K)
        if config.embedder_projects:
            axes = ("positions", "width", "width")
            width = config.context_width
            project = linear(config, width, axis=(-2, -1), name="projection", axes=axes)
            rows_RxD = project(rows_RxD)
        elif config.embedder.kind in ("mean", "mean_mlp"):
            rows_RxD = self._mean(rows_RxD)
        return rows_RxD.reshape(config.embeddings_per_block, config.block_decoder.width)

    def _mean(self, rows_KxD: jax.Array) -> jax.Array:
        """Return the mean row `[D]`, plus for mean_mlp an MLP over all rows."""
        config, (length, width) = self.config, self.config.embedder_rows
        mean_D = rows_KxD.mean(0)
        if config.embedder.kind == "mean":
            return mean_D
        hidden, axes = length * width, ("positions", "width", "mlp")
        up = linear(config, hidden, axis=(-2, -1), name="mlp_up", axes=axes)
        down = linear(config, width, name="mlp_down", axes=("mlp", "width"))
        return mean_D + down(nn.silu(up(rows_KxD)))

    def _encode(self, tokens_K: jax.Array, mask_K: jax.Array) -> jax.Array:
        embedder = self.config.embedder
        cls = embedder.cls_tokens if embedder.kind == "cls" else 0
        tokens_T = jnp.pad(tokens_K, (cls, 0), constant_values=embedder.encoder.cls_id)
        real_T = jnp.pad(mask_K, (cls, 0), constant_values=True)
        outputs_TxD = Encoder(self.config, name="encoder")(tokens_T, real_T)
        return outputs_TxD[:cls] if cls else outputs_TxD
