"""Pure, jitted decoding functions and their state: `prefill`, then `decode_blocks`.

A block costs one step of the block decoder and K steps of the token decoder. `decode_blocks` takes
the number of blocks as a traced argument: generating at once and streaming block by block run the
same program.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from blocktx.decode.block import Rows, draw_block, real_tokens
from blocktx.decode.prompts import Prompts
from blocktx.decode.sampler import log_probability
from blocktx.decode.sampling import Sampling
from blocktx.model import CACHE_AXES, Cache, Model
from blocktx.parallel import axis_parts, constrain


@flax.struct.dataclass
class DecodeState:
    """State of a batch whose rows begin together.

    In the cache, the blocks of all prompts begin at slot 0, and each new block goes to the same
    slot in all rows. The slots between a short prompt and the new blocks are masked.
    """

    cache: Cache
    slot: jax.Array  # int32: the slot of the next block, in all rows
    visible_BxS: jax.Array  # bool: the slots of each row's blocks, except the last
    tokens_BxSxK: jax.Array  # int32: prompts and drawn tokens
    logprobs_BxSxK: jax.Array | None  # float32, of drawn tokens; None: not requested
    rows: Rows

    @property
    def finished_B(self) -> jax.Array:
        """Bool `[B]`: rows that have all their tokens."""
        return self.rows.finished_B(self.tokens_BxSxK.shape[2])


@functools.partial(jax.jit, static_argnames=("model", "return_logprobs"))
def prefill(
    model: Model, params: dict[str, Any], prompts: Prompts, return_logprobs: bool = False
) -> DecodeState:
    """Return the state after reading prompts into a new cache. No logits are computed.

    Args:
      model: a model with `scan_layers` False; see `blocktx.model.for_decoding`.
      params: its parameters.
      prompts: from `layout_prompts`.
      return_logprobs: whether the state holds log-probabilities of drawn tokens. Static.
    """
    blocks, block_length = prompts.tokens_BxNxK.shape[1:]
    block_N = jnp.arange(blocks)[:, None]
    mask_BxNxK = jax.vmap(real_tokens, (None, 0, None))(block_N, prompts.padding_B, block_length)
    room = ((0, 0), (0, prompts.cache_blocks - blocks), (0, 0))
    tokens_BxSxK = jnp.pad(prompts.tokens_BxNxK, room)
    return DecodeState(
        cache=fill_cache(model, params, prompts.tokens_BxNxK, mask_BxNxK, prompts.cache_blocks),
        slot=jnp.int32(blocks),
        visible_BxS=jnp.arange(prompts.cache_blocks) < prompts.length_B[:, None] - 1,
        tokens_BxSxK=tokens_BxSxK,
        logprobs_BxSxK=jnp.zeros(tokens_BxSxK.shape, jnp.float32) if return_logprobs else None,
        rows=Rows.of(prompts),
    )


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode_blocks(
    model: Model,
    params: dict[str, Any],
    state: DecodeState,
    sampling: Sampling,
    blocks: jax.Array,
    pad_id: jax.Array,
) -> DecodeState:
    """Return the state after up to `blocks` more blocks; fewer if all rows finish.

    Args:
      model: a model with `scan_layers` False.
      params: its parameters.
      state: from `prefill` or an earlier call. It is donated: do not use it afterwards.
      sampling: from `Sampling.create`, with as many rows as the state.
      blocks: int32, traced.
      pad_id: int32, traced; the token that fills a block after a row's end.
    """

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        count, state = carry
        return (count < blocks) & ~state.finished_B.all()

    def decode(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        count, state = carry
        return count + 1, _decode_block(model, params, state, sampling, pad_id)

    return jax.lax.while_loop(unfinished, decode, (jnp.int32(0), state))[1]


def _decode_block(
    model: Model,
    params: dict[str, Any],
    state: DecodeState,
    sampling: Sampling,
    pad_id: jax.Array,
) -> DecodeState:
    """Return the state with one more block of each unfinished row."""
    rows, slots = state.rows, state.tokens_BxSxK.shape[1]
    drawn, cache = draw_block(
        model,
        params,
        _block(state.tokens_BxSxK, rows.length_B - 1),
        _block(state.tokens_BxSxK, jnp.minimum(rows.length_B, slots - 1)),
        rows,
        (state.cache, state.slot, state.visible_BxS),
        sampling,
        pad_id,
        None if state.logprobs_BxSxK is None else log_probability,
    )
    unfinished_B = ~state.finished_B
    here_BxS = unfinished_B[:, None] & (jnp.arange(slots) == rows.length_B[:, None])

    def put(buffer_BxSxK: jax.Array, new_BxK: jax.Array) -> jax.Array:
        return jnp.where(here_BxS[..., None], new_BxK[:, None], buffer_BxSxK)

    state = state.replace(
        cache=cache,
        slot=state.slot + 1,
        visible_BxS=state.visible_BxS | (jnp.arange(slots) == state.slot),
        tokens_BxSxK=put(state.tokens_BxSxK, drawn.tokens_BxK),
        rows=drawn.rows,
    )
    if drawn.scores is not None:
        state = state.replace(logprobs_BxSxK=put(state.logprobs_BxSxK, drawn.scores))
    return state


def _block(tokens_BxSxK: jax.Array, block_B: jax.Array) -> jax.Array:
    """Return one block `[B, K]` of each row."""
    return jnp.take_along_axis(tokens_BxSxK, block_B[:, None, None], axis=1)[:, 0]


def fill_cache(
    model: Model,
    params: dict[str, Any],
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    slots: int,
) -> Cache:
    """Return a cache of `slots` blocks with the N blocks of every row in its first N.

    No logits are computed. The caller masks the slots of blocks of padding.
    """
    rows, blocks, _ = tokens_BxNxK.shape
    positions = blocks * model.config.embeddings_per_block
    at_once = _rows_at_once(rows, positions, model.formulations.prefill_positions)

    def extend(tokens_RxNxK: jax.Array, mask_RxNxK: jax.Array, cache: Cache) -> Cache:
        start_R = jnp.zeros(len(tokens_RxNxK), jnp.int32)
        arguments = (tokens_RxNxK, mask_RxNxK, start_R, cache, 0, None)
        return model.apply({"params": params}, *arguments, method="extend")[1]

    cache = model.create_cache(rows, slots)
    if at_once == rows:
        return extend(tokens_BxNxK, mask_BxNxK, cache)

    # Group g has rows g, g + groups, ...: each group is sharded as the batch is.
    def by_group(x_B: jax.Array) -> jax.Array:
        return x_B.reshape(at_once, rows // at_once, *x_B.shape[1:])

    def fill(group: jax.Array, cache: Cache) -> Cache:
        tokens_RxNxK, mask_RxNxK = (
            jax.lax.dynamic_index_in_dim(by_group(x), group, axis=1, keepdims=False)
            for x in (tokens_BxNxK, mask_BxNxK)
        )
        filled = extend(tokens_RxNxK, mask_RxNxK, model.create_cache(at_once, blocks))

        def put(buffer_BxSxD: jax.Array, new_RxTxD: jax.Array) -> jax.Array:
            start = (0, group, 0, 0)
            buffer_RxGxSxD = by_group(buffer_BxSxD)
            written = jax.lax.dynamic_update_slice(buffer_RxGxSxD, new_RxTxD[:, None], start)
            return constrain(written.reshape(buffer_BxSxD.shape), *CACHE_AXES)

        return jax.tree.map(put, cache, filled)

    return jax.lax.fori_loop(0, rows // at_once, fill, cache)


def _rows_at_once(rows: int, positions: int, limit: int) -> int:
    """Return the largest divisor of `rows` that keeps a device within `limit` positions."""
    most = max(1, limit // positions) * axis_parts("batch")
    return max(r for r in range(1, min(rows, most) + 1) if rows % r == 0)
