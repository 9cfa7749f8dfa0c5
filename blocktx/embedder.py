"""The tokens of one block -> its input block embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.encoder import Encoder
from blocktx.layers import embedding, linear
from blocktx.model_config import BlockConfig


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
