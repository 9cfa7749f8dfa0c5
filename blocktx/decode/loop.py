"""The loop that generates, in two jitted functions: a block step and K token steps an iteration.

`prefill` reads prompts into a `DecodeState`, `advance` goes on with it, by as many blocks as it is
told, which is traced: generating at once and streaming block by block are the same program.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from blocktx.decode.prompts import Prompts
from blocktx.decode.sampling import Sampling, log_probability, sample
from blocktx.model import CACHE_AXES, Cache, Model
from blocktx.parallel import axis_parts, constrain

# Of a device: enough to keep matrix products busy; the scores of 2048 are 200 MB.
_POSITIONS_AT_ONCE = 1024


@flax.struct.dataclass
class DecodeState:
    """Rows on their way, each at its own place.

    A row's tokens are counted from its first block, padding included. They are known up to
    `length_B` whole blocks, and of the block after those up to `begin_B`, where drawing begins.

    In the cache, a row's blocks do not stand where they are counted: a prompt's have their places
    from slot 0 on, what comes after the prompts is at the same slot in all rows.
    """

    cache: Cache
    slot: jax.Array  # int32: where the next block goes, in all rows
    seen_BxS: jax.Array  # bool: where each row's blocks are, all but the last of `length_B`
    tokens_BxSxK: jax.Array  # int32: prompts, and what was drawn
    logprobs_BxSxK: jax.Array | None  # float32, of what was drawn; None: nobody asked
    padding_B: jax.Array  # int32: tokens of padding that the first block begins with
    length_B: jax.Array  # int32: whole blocks
    begin_B: jax.Array  # int32: the place of the first token that was or is drawn
    end_B: jax.Array  # int32: the place behind the last
    ended_B: jax.Array  # bool: whether it is there because of a stop token

    @property
    def finished_B(self) -> jax.Array:
        """Bool: rows that are left as they are."""
        return self.length_B * self.tokens_BxSxK.shape[2] >= self.end_B


@functools.partial(jax.jit, static_argnames=("model", "return_logprobs"))
def prefill(
    model: Model, params: dict[str, Any], prompts: Prompts, return_logprobs: bool = False
) -> DecodeState:
    """Prompts read into a new cache, without a logit."""
    rows, blocks, block_length = prompts.tokens_BxNxK.shape
    block_N = jnp.arange(blocks)[:, None]
    mask_BxNxK = jax.vmap(_real, (None, 0, None))(block_N, prompts.padding_B, block_length)
    room = ((0, 0), (0, prompts.slots - blocks), (0, 0))
    tokens_BxSxK = jnp.pad(prompts.tokens_BxNxK, room)
    return DecodeState(
        cache=fill_cache(model, params, prompts.tokens_BxNxK, mask_BxNxK, prompts.slots),
        slot=jnp.int32(blocks),
        seen_BxS=jnp.arange(prompts.slots) < prompts.length_B[:, None] - 1,
        tokens_BxSxK=tokens_BxSxK,
        logprobs_BxSxK=jnp.zeros(tokens_BxSxK.shape) if return_logprobs else None,
        padding_B=prompts.padding_B,
        length_B=prompts.length_B,
        begin_B=prompts.begin_B,
        end_B=prompts.end_B,
        ended_B=jnp.zeros(rows, bool),
    )


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def advance(
    model: Model,
    params: dict[str, Any],
    state: DecodeState,
    sampling: Sampling,
    blocks: jax.Array,
    pad_id: jax.Array,
) -> DecodeState:
    """Up to `blocks` more blocks of each row, in the donated state; fewer if all rows finish.

    A block begins with the block step of the one before: so none is made for a block that nobody
    will continue. (The prefill makes a prompt's last too, but hides it and hands nothing over.)
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
    """One more block of each row that is not finished."""

    def apply(method: str, *args):
        return model.apply({"params": params}, *args, method=method)

    rows, slots, block_length = state.tokens_BxSxK.shape
    last_B = state.length_B - 1
    context_Bx1xnD, cache = apply(
        "extend",
        _block(state.tokens_BxSxK, last_B)[:, None],
        _real(last_B[:, None], state.padding_B[:, None], block_length)[:, None],
        last_B,
        state.cache,
        state.slot,
        state.seen_BxS,
    )
    prompt_BxK = _block(state.tokens_BxSxK, jnp.minimum(state.length_B, slots - 1))

    def choose(logits_BxV: jax.Array, index: jax.Array | int, end_B: jax.Array):
        place_B = state.length_B * block_length + index
        given_B, past_B = place_B < state.begin_B, place_B >= end_B
        drawn_B = sample(logits_BxV, sampling, place_B - state.begin_B, model.config.platform)
        token_B = jnp.where(past_B, pad_id, jnp.where(given_B, prompt_BxK[:, index], drawn_B))
        stopped_B = ~given_B & ~past_B & (token_B[:, None] == sampling.stop_X).any(-1)
        logprob_B = None
        if state.logprobs_BxSxK is not None:
            logprob_B = log_probability(logits_BxV, token_B)
        return (token_B, logprob_B), jnp.where(stopped_B, place_B + 1, end_B), stopped_B

    def step(carry, index: jax.Array):
        token_B, end_B, ended_B, token_cache = carry
        logits_BxV, token_cache = apply("step_token", token_B, index - 1, token_cache)
        chosen, end_B, stopped_B = choose(logits_BxV, index, end_B)
        return (chosen[0], end_B, ended_B | stopped_B, token_cache), chosen

    token_cache = model.create_token_cache(rows)
    logits_BxV, token_cache = apply("start_block", context_Bx1xnD[:, 0], token_cache)
    first, end_B, stopped_B = choose(logits_BxV, 0, state.end_B)
    chosen = jax.tree.map(lambda x_B: x_B[None], first)
    ended_B = state.ended_B | stopped_B
    if block_length > 1:  # the vanilla model has no token step
        carry = (first[0], end_B, ended_B, token_cache)
        (_, end_B, ended_B, _), rest = jax.lax.scan(step, carry, jnp.arange(1, block_length))
        chosen = jax.tree.map(lambda x_1xB, x_JxB: jnp.concatenate([x_1xB, x_JxB]), chosen, rest)
    tokens_KxB, logprobs_KxB = chosen

    going_B = ~state.finished_B
    here_BxSx1 = (going_B[:, None] & (jnp.arange(slots) == state.length_B[:, None]))[..., None]
    state = state.replace(
        cache=cache,
        slot=state.slot + 1,
        seen_BxS=state.seen_BxS | (jnp.arange(slots) == state.slot),
        tokens_BxSxK=jnp.where(here_BxSx1, tokens_KxB.T[:, None], state.tokens_BxSxK),
        length_B=state.length_B + going_B,
        end_B=end_B,
        ended_B=ended_B,
    )
    if logprobs_KxB is not None:
        logprobs_BxSxK = jnp.where(here_BxSx1, logprobs_KxB.T[:, None], state.logprobs_BxSxK)
        state = state.replace(logprobs_BxSxK=logprobs_BxSxK)
    return state


def _block(tokens_BxSxK: jax.Array, block_B: jax.Array) -> jax.Array:
    """One block `[B, K]` of each row."""
    return jnp.take_along_axis(tokens_BxSxK, block_B[:, None, None], axis=1)[:, 0]


def _real(block: jax.Array, padding: jax.Array, block_length: int) -> jax.Array:
    """Whether the tokens `[..., K]` of blocks are more than padding, which only the first has."""
    return (block > 0) | (jnp.arange(block_length) >= padding)


def fill_cache(
    model: Model,
    params: dict[str, Any],
    tokens_BxNxK: jax.Array,
    mask_BxNxK: jax.Array,
    slots: int,
) -> Cache:
    """A cache of `slots` blocks, with the N blocks of every row in the first N. No logit is made.

    What a row's blocks of padding leave there is for the caller to hide.
    """
    rows, blocks, _ = tokens_BxNxK.shape
    at_once = _rows_at_once(rows, blocks * model.config.embeddings_per_block)

    def extend(tokens_RxNxK: jax.Array, mask_RxNxK: jax.Array, cache: Cache) -> Cache:
        start_R = jnp.zeros(len(tokens_RxNxK), jnp.int32)
        arguments = (tokens_RxNxK, mask_RxNxK, start_R, cache, 0, None)
        return model.apply({"params": params}, *arguments, method="extend")[1]

    cache = model.create_cache(rows, slots)
    if at_once == rows:
        return extend(tokens_BxNxK, mask_BxNxK, cache)

    # Group g has rows g, g + groups, ...: rows spread over devices are so within each.
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


def _rows_at_once(rows: int, positions: int) -> int:
    """The most rows that are few enough for a device, and of which there is a whole number."""
    most = max(1, _POSITIONS_AT_ONCE // positions) * axis_parts("batch")
    return max(r for r in range(1, min(rows, most) + 1) if rows % r == 0)
