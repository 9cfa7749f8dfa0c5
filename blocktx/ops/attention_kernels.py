"""Attention kernels of accelerators: when they apply, and their import on first use.

Importing Pallas takes a second, which only programs that use it should pay.
"""

from typing import Any

import jax
import jax.numpy as jnp

from blocktx.config import StackConfig

SPLASH_TILE = 128  # of queries and keys
LANES = 128
_MAX_POSITIONS = 16  # all pairs of positions are unrolled


def fits_splash(positions: int) -> bool:
    """Return whether `attend_splash` is worthwhile."""
    return positions >= SPLASH_TILE


def why_not_cudnn(stack: StackConfig, dtype: str) -> str:
    """Return why `attend_cudnn` does not apply; empty if it does."""
    if dtype != "bfloat16":
        return f"cuDNN takes bfloat16, and compute_dtype is {dtype}"
    if stack.head_size % 8 or stack.head_size > 128:
        return f"cuDNN takes heads of 8, 16, ... 128 channels, and these have {stack.head_size}"
    return ""


def fits_products(positions: int) -> bool:
    """Return whether `attend_by_products` is worthwhile: its products use no matrix unit."""
    return positions <= _MAX_POSITIONS


def fits_short(stack: StackConfig, positions: int) -> bool:
    """Return whether `attend_short` applies: few positions, and whole heads in whole tiles."""
    size = stack.head_size
    whole = size % LANES == 0 or LANES % size == 0
    few = positions <= _MAX_POSITIONS
    return few and whole and stack.query_width % max(LANES, size) == 0 and not stack.qk_norm


def attend_cudnn(
    q_TxHxC: jax.Array,
    k_TxGxC: jax.Array,
    v_TxGxC: jax.Array,
    count: jax.Array | None = None,
    *,
    emulate: bool,
) -> jax.Array:
    """Return causal attention `[T, H, C]` over a sequence by cuDNN, which stores no scores.

    Args:
      q_TxHxC: queries, after rotary positions.
      k_TxGxC, v_TxGxC: keys, after rotary positions, and values.
      count: the keys that are real, the first so many. The rest is padding. A boolean mask would be
        materialised as a bias. None: all.
      emulate: compute the same by XLA, without a GPU.
    """
    lengths = {}
    if count is not None:
        count = count.astype(jnp.int32)[None]
        # JAX 0.10 cannot batch it over lengths that are not batched, as a constant is not.
        lengths = dict(query_seq_lengths=len(q_TxHxC) + 0 * count, key_value_seq_lengths=count)
    q_k_v = (x[None] for x in (q_TxHxC, k_TxGxC, v_TxGxC))
    implementation = "xla" if emulate else "cudnn"
    y_1xTxHxC = jax.nn.dot_product_attention(
        *q_k_v, is_causal=True, implementation=implementation, **lengths
    )
    return y_1xTxHxC[0]


def attend_splash(*args: jax.Array, interpret: bool) -> jax.Array:
    """`blocktx.ops.flash_attention.flash_attention`."""
    from blocktx.ops.flash_attention import flash_attention

    return flash_attention(*args, interpret=interpret)


def attend_short(*args: Any) -> jax.Array:
    """`blocktx.ops.short_attention.short_attention`."""
    from blocktx.ops.short_attention import short_attention

    return short_attention(*args)
