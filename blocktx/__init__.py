"""The Block Transformer (Ho et al., NeurIPS 2024) in JAX and Flax."""

from blocktx.engine import Engine, load
from blocktx.sampling import generate

__all__ = ["Engine", "generate", "load"]
