"""Pure, jitted functions of continuous decoding and their state.

Requests come and go, rows stay: `init_rows`, then `admit` and `decode_rows` in any order. Shapes
are fixed, so that each function compiles once (`admit` once for each bucket of prompt lengths).

A row's block i is in slot i of its cache, wherever and whenever the row was admitted. So the sums
over cache slots have the same terms in the same order, and a row's results depend on its request
only: bitwise in float32, as far as the backend computes the rows of a matrix product alike. (If all
rows wrote at one cursor, as in `blocktx.decode.loop`, the order would depend on the arrival time.)
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from blocktx.decode.block import Rows, draw_block, real_tokens
from blocktx.decode.prompts import Prompts
from blocktx.decode.sampling import Sampling
from blocktx.model import CACHE_AXES, Cache, Model
from blocktx.parallel import constrain


@flax.struct.dataclass
class RowsState:
    """State of rows that decode independent requests. A free row is a finished one."""

    cache: Cache
    last_BxK: jax.Array  # int32: tokens of the last whole block
    given_BxK: jax.Array  # int32: tokens of the first drawn block that the prompt gives
    rows: Rows


@flax.struct.dataclass
class Outputs:
    """Results of a call of `decode_rows`. M is its largest number of blocks, J that of `top`."""

    tokens_BxMxK: jax.Array  # int32
    logprobs_BxMxK: jax.Array  # float32: log-probabilities at temperature 1, unfiltered; or 0
    top_ids_BxMxKxJ: jax.Array  # int32: the most likely tokens; or 0
    top_logprobs_BxMxKxJ: jax.Array  # float32
    length_B: jax.Array  # int32: whole blocks known after the call
    end_B: jax.Array  # int32: index after the row's last token, as far as known
    ended_B: jax.Array  # bool: whether a stop token is the last


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots"))
def init_rows(model: Model, rows: int, slots: int) -> RowsState:
    """Return `rows` free rows with an empty cache of `slots` blocks each."""
    tokens_BxK = jnp.zeros((rows, model.config.block_length), jnp.int32)
    one_B, end_B = jnp.ones(rows, jnp.int32), jnp.zeros(rows, jnp.int32)
    free = Rows(end_B, one_B, end_B, end_B, jnp.zeros(rows, bool))
    return _constrained(RowsState(model.create_cache(rows, slots), tokens_BxK, tokens_BxK, free))


@functools.partial(jax.jit, static_argnames=("model", "group"), donate_argnames=("state",))
def admit(
    model: Model,
    params: dict[str, Any],
    state: RowsState,
    prompts: Prompts,
    row_P: jax.Array,
    count: jax.Array,
    group: int,
) -> RowsState:
    """Return the state after prefilling prompts into rows. No logits are computed.

    Prompts are prefilled in groups of a fixed size, so that the result of a prompt does not depend
    on how many there are.

    Args:
      model: a model with `scan_layers` False.
      params: its parameters.
      state: donated.
      prompts: P prompts, of which the first `count` are used.
      row_P: int32; the row of each, or any number out of range for unused ones.
      count: int32, traced.
      group: prompts computed at a time, a divisor of P. Static.
    """
    capacity, blocks, block_length = prompts.tokens_BxNxK.shape
    block_N = jnp.arange(blocks)[:, None]

    def fill(index: jax.Array, cache: Cache) -> Cache:
        def take(x_P: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x_P, index * group, group)

        tokens_GxNxK = constrain(take(prompts.tokens_BxNxK), "batch", None, None)
        real_GxNxK = jax.vmap(real_tokens, (None, 0, None))(
            block_N, take(prompts.padding_B), block_length
        )
        _, filled = model.apply(
            {"params": params},
            tokens_GxNxK,
            real_GxNxK,
            jnp.zeros(group, jnp.int32),
            model.create_cache(group, blocks),
            0,
            None,
            method="extend",
        )

        def put(buffer_BxSxD: jax.Array, new_GxTxD: jax.Array) -> jax.Array:
            row_G = take(row_P)
            written = buffer_BxSxD.at[row_G, : new_GxTxD.shape[1]].set(new_GxTxD, mode="drop")
            return constrain(written, *CACHE_AXES)

        return jax.tree.map(put, cache, filled)

    cache = jax.lax.fori_loop(0, -(-count // group), fill, state.cache)
    prompt_P = jnp.arange(capacity)
    begun = RowsState(
        cache=(),
        last_BxK=prompts.tokens_BxNxK[prompt_P, prompts.length_B - 1],
        given_BxK=prompts.tokens_BxNxK[prompt_P, jnp.minimum(prompts.length_B, blocks - 1)],
        rows=Rows.of(prompts),
    )
    rest = jax.tree.map(
        lambda old_B, new_P: old_B.at[row_P].set(new_P, mode="drop"), state.replace(cache=()), begun
    )
    return _constrained(rest.replace(cache=cache))


@functools.partial(
    jax.jit, static_argnames=("model", "most_blocks", "top"), donate_argnames=("state",)
)
def decode_rows(
    model: Model,
    params: dict[str, Any],
    state: RowsState,
    sampling: Sampling,
    cancelled_B: jax.Array,
    blocks: jax.Array,
    pad_id: jax.Array,
    score: jax.Array,
    *,
    most_blocks: int,
    top: int,
) -> tuple[RowsState, Outputs]:
    """Return the state and outputs of up to `blocks` more blocks; fewer if all rows finish.

    Args:
      model: a model with `scan_layers` False.
      params: its parameters.
      state: donated.
      sampling: parameters of all rows.
      cancelled_B: bool; rows that end where they are.
      blocks: int32, traced; at most `most_blocks`.
      pad_id: int32, traced.
      score: int32, traced; 0: no log-probabilities; 1: those of drawn tokens; 2: also the `top`.
      most_blocks: size of the outputs. Static.
      top: the number of most likely tokens that are returned if `score` is 2. Static.
    """
    slots = jax.tree.leaves(state.cache)[0].shape[1] // model.config.embeddings_per_block
    batch, block_length = state.last_BxK.shape
    rows = state.rows
    ends_B = jnp.where(cancelled_B, rows.length_B * block_length, rows.end_B)
    state = state.replace(rows=rows.replace(end_B=jnp.minimum(rows.end_B, ends_B)))

    def measure(logits_BxV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, ...]:
        def most_likely(logits_BxV: jax.Array, norm_B: jax.Array) -> tuple[jax.Array, jax.Array]:
            values_BxJ, ids_BxJ = jax.lax.top_k(logits_BxV, top)
            return ids_BxJ.astype(jnp.int32), values_BxJ - norm_B[:, None]

        def measured(logits_BxV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, ...]:
            norm_B = jax.nn.logsumexp(logits_BxV, axis=-1)
            own_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=1)[:, 0] - norm_B
            ids_and_values = jax.lax.cond(
                score == 2, most_likely, lambda *_: nothing[1:], logits_BxV, norm_B
            )
            return own_B, *ids_and_values

        nothing = (
            jnp.zeros(batch, jnp.float32),
            jnp.zeros((batch, top), jnp.int32),
            jnp.zeros((batch, top), jnp.float32),
        )
        return jax.lax.cond(score > 0, measured, lambda *_: nothing, logits_BxV, token_B)

    def unfinished(carry: tuple[jax.Array, RowsState, Any]) -> jax.Array:
        count, state, _ = carry
        return (count < blocks) & ~state.rows.finished_B(block_length).all()

    def decode(carry: tuple[jax.Array, RowsState, Any]) -> tuple[jax.Array, RowsState, Any]:
        count, state, outputs = carry
        last_B = state.rows.length_B - 1
        visible_BxS = jnp.arange(slots) < last_B[:, None]
        drawn, cache = draw_block(
            model,
            params,
            state.last_BxK,
            state.given_BxK,
            state.rows,
            (state.cache, last_B, visible_BxS),
            sampling,
            pad_id,
            measure,
        )
        grown_B = drawn.rows.length_B > state.rows.length_B
        state = RowsState(
            cache=cache,
            last_BxK=jnp.where(grown_B[:, None], drawn.tokens_BxK, state.last_BxK),
            given_BxK=state.given_BxK,
            rows=drawn.rows,
        )
        outputs = jax.tree.map(
            lambda out, new: constrain_rows(
                jax.lax.dynamic_update_slice_in_dim(out, new[:, None], count, axis=1)
            ),
            outputs,
            (drawn.tokens_BxK, *drawn.scores),
        )
        return count + 1, _constrained(state), outputs

    shape = (batch, most_blocks, block_length)
    outputs = (
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, top), jnp.int32),
        jnp.zeros((*shape, top), jnp.float32),
    )
    _, state, outputs = jax.lax.while_loop(unfinished, decode, (jnp.int32(0), state, outputs))
    rows = state.rows
    return _constrained(state), Outputs(*outputs, rows.length_B, rows.end_B, rows.ended_B)


def constrain_rows(x_B: jax.Array) -> jax.Array:
    """Shard the first axis of an array as the rows of a batch."""
    return constrain(x_B, "batch", *[None] * (x_B.ndim - 1))


def _constrained(state: RowsState) -> RowsState:
    """Return the state, sharded as all functions here return it, so that none recompiles."""
    rest = jax.tree.map(constrain_rows, state.replace(cache=()))
    return rest.replace(cache=jax.tree.map(lambda x: constrain(x, *CACHE_AXES), state.cache))
