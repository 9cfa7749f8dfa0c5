"""Attention kernels for TPU: when they apply, and their import on first use.

Importing Pallas takes a second, which only programs that use it should pay.
"""

from typing import Any

import jax

from blocktx.config import StackConfig

SPLASH_TILE = 128  # of queries and keys
LANES = 128
_MAX_POSITIONS = 16  # all pairs of positions are unrolled


def fits_splash(positions: int) -> bool:
    """Whether `attend_splash` is worthwhile."""
    return positions >= SPLASH_TILE


def fits_short(stack: StackConfig, positions: int) -> bool:
    """Whether `attend_short` applies: few positions, and whole heads in whole tiles."""
    size = stack.head_size
    whole = size % LANES == 0 or LANES % size == 0
    few = positions <= _MAX_POSITIONS
    return few and whole and stack.query_width % max(LANES, size) == 0 and not stack.qk_norm


def attend_splash(*args: jax.Array, interpret: bool) -> jax.Array:
    """`blocktx.ops.flash_attention.flash_attention`."""
    from blocktx.ops.flash_attention import flash_attention

    return flash_attention(*args, interpret=interpret)


def attend_short(*args: Any) -> jax.Array:
    """`blocktx.ops.short_attention.short_attention`."""
    from blocktx.ops.short_attention import short_attention

    return short_attention(*args)
