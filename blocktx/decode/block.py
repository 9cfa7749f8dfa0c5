"""One block of each row: a step of the block decoder and K steps of the token decoder."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from blocktx.decode.prompts import Prompts
from blocktx.decode.sampler import sample
from blocktx.decode.sampling import Sampling
from blocktx.model import Cache, Model


@flax.struct.dataclass
class Rows:
    """Progress of each row, int32 and bool `[B]`.

    A row's tokens are counted from its block 0, padding included. `length_B` whole blocks are
    known, and of the next block the tokens before `begin_B`, where drawing begins.
    """

    padding_B: jax.Array  # tokens of padding at the start of block 0
    length_B: jax.Array  # whole blocks
    begin_B: jax.Array  # index of the first token that was or is drawn
    end_B: jax.Array  # index after the last
    ended_B: jax.Array  # bool: whether it ends there because of a stop token

    @classmethod
    def of(cls, prompts: Prompts) -> "Rows":
        """Return the progress of rows that are about to draw their first token."""
        return cls(
            padding_B=jnp.asarray(prompts.padding_B),
            length_B=jnp.asarray(prompts.length_B),
            begin_B=jnp.asarray(prompts.begin_B),
            end_B=jnp.asarray(prompts.end_B),
            ended_B=jnp.zeros(len(prompts.end_B), bool),
        )

    def finished_B(self, block_length: int) -> jax.Array:
        """Return which rows have all their tokens. They do not change any more."""
        return self.length_B * block_length >= self.end_B


class Drawn(NamedTuple):
    """The next block of each row."""

    tokens_BxK: jax.Array  # int32; the padding token from a row's end on
    scores: Any  # results of `score`, `[B, K, ...]`
    rows: Rows  # one block longer, but for rows that were finished


def draw_block(
    model: Model,
    params: dict[str, Any],
    last_BxK: jax.Array,
    given_BxK: jax.Array,
    rows: Rows,
    cache: tuple[Cache, jax.Array, jax.Array],
    sampling: Sampling,
    pad_id: jax.Array,
    score: Callable[[jax.Array, jax.Array], Any] | None,
) -> tuple[Drawn, Cache]:
    """Return the next block of each row, and the cache with the last block in it.

    The step of the block decoder is that of the last known block, so none is made for a block that
    is not continued. (Prefill computes the prompt's last block, but masks its slot.)

    Args:
      model: a model with `scan_layers` False.
      params: its parameters.
      last_BxK: tokens of each row's last whole block.
      given_BxK: tokens of the next block that are known, those before `rows.begin_B`.
      rows: progress of the rows.
      cache: the cache; the slot of the last block, one for all rows or one per row; and
        `visible_BxS`, the slots of the blocks before.
      sampling: parameters of each row.
      pad_id: the padding token.
      score: maps logits `[B, V]` and tokens `[B]` to arrays to return. None: nothing.
    """

    def apply(method: str, *args):
        return model.apply({"params": params}, *args, method=method)

    batch, block_length = last_BxK.shape
    last_B = rows.length_B - 1
    real_BxK = real_tokens(last_B[:, None], rows.padding_B[:, None], block_length)
    context_Bx1xnD, filled = apply("extend", last_BxK[:, None], real_BxK[:, None], last_B, *cache)

    def choose(logits_BxV: jax.Array, index: jax.Array | int, end_B: jax.Array):
        place_B = rows.length_B * block_length + index
        given_B, past_B = place_B < rows.begin_B, place_B >= end_B
        drawn_B = sample(logits_BxV, sampling, place_B - rows.begin_B, model.formulations.sampler)
        token_B = jnp.where(past_B, pad_id, jnp.where(given_B, given_BxK[:, index], drawn_B))
        stopped_B = ~given_B & ~past_B & (token_B[:, None] == sampling.stop_BxX).any(-1)
        scores = None if score is None else score(logits_BxV, token_B)
        return (token_B, scores), jnp.where(stopped_B, place_B + 1, end_B), stopped_B

    def step(carry, index: jax.Array):
        token_B, end_B, ended_B, token_cache = carry
        logits_BxV, token_cache = apply("step_token", token_B, index - 1, token_cache)
        chosen, end_B, stopped_B = choose(logits_BxV, index, end_B)
        return (chosen[0], end_B, ended_B | stopped_B, token_cache), chosen

    token_cache = model.create_token_cache(batch)
    logits_BxV, token_cache = apply("start_block", context_Bx1xnD[:, 0], token_cache)
    first, end_B, stopped_B = choose(logits_BxV, 0, rows.end_B)
    chosen = jax.tree.map(lambda x_B: x_B[None], first)
    ended_B = rows.ended_B | stopped_B
    if block_length > 1:  # the vanilla model has no token step
        carry = (first[0], end_B, ended_B, token_cache)
        index_J = jnp.arange(1, block_length, dtype=jnp.int32)
        (_, end_B, ended_B, _), rest = jax.lax.scan(step, carry, index_J)
        chosen = jax.tree.map(lambda x_1xB, x_JxB: jnp.concatenate([x_1xB, x_JxB]), chosen, rest)
    tokens_BxK, scores = jax.tree.map(lambda x_KxB: x_KxB.swapaxes(0, 1), chosen)
    unfinished_B = ~rows.finished_B(block_length)
    rows = rows.replace(length_B=rows.length_B + unfinished_B, end_B=end_B, ended_B=ended_B)
    return Drawn(tokens_BxK, scores, rows), filled


def real_tokens(block: jax.Array, padding: jax.Array, block_length: int) -> jax.Array:
    """Return which tokens `[..., K]` of blocks are not padding, which only block 0 has."""
    return (block > 0) | (jnp.arange(block_length) >= padding)
