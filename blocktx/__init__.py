"""The Block Transformer (Ho et al., NeurIPS 2024) in JAX and Flax."""

from blocktx.checkpoint import load_params
from blocktx.decoding import generate
from blocktx.engine import Engine, load

__all__ = ["Engine", "generate", "load", "load_params"]
