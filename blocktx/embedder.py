"""The tokens of a block -> its input block embedding."""

import flax.linen as nn
import jax

from blocktx.config import BlockConfig
from blocktx.layers import embedding


class LookupEmbedder(nn.Module):
    """A table of width D / K whose rows for the K tokens of a block are concatenated (section 2.1).

    Padding is content: a padding token contributes its own row.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, tokens_K: jax.Array) -> jax.Array:
        width = self.config.block_decoder.width // self.config.block_length
        return embedding(self.config, width, name="tokens")(tokens_K).reshape(-1)
