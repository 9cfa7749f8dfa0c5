"""Log-probabilities of continuations: many pairs of context and continuation, in few shapes.

The first block of a row is never predicted, so a continuation has to begin behind it. Padding in
front of the context sees to that:

    pad    block_length - 1 tokens of it, as in [P P P a] (the paper's way, appendix H, for models
           that were trained with random padding): all but the first token are predicted
    force  none, but what a context shorter than a block lacks (for models trained without it, to
           which padding is strange: give them a context of a block or more where it matters)

A vanilla model needs none: its first block is the first token.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from blocktx.config import ModelConfig
from blocktx.decode import Placement, bucket
from blocktx.model import Model, next_logits


class Score(NamedTuple):
    """What a model makes of a continuation of J tokens."""

    logprobs_J: np.ndarray  # float32: natural logarithm of each token's probability
    likeliest_J: np.ndarray  # bool: whether it is the token that the model would have chosen


def longest_row(config: ModelConfig, placement: Placement) -> int:
    """The tokens of context and continuation, together, that a model can look at.

    A vanilla model that has read a whole context still predicts the token behind it.
    """
    if config.kind == "vanilla":
        return config.context_length + 1
    return config.context_length - (config.block_length - 1 if placement == "pad" else 0)


def score(
    model: Model,
    params: dict[str, Any],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    placement: Placement,
    pad_id: int,
    batch_size: int,
) -> list[Score]:
    """The score of each continuation after its context.

    Of what is longer than `longest_row` the beginning is left out. Rows are sorted by length and
    rounded up to powers of two: there are as many programs as those, whatever the pairs are. The
    result does not depend on the batch size, nor on the other pairs.

    Args:
      model: any model.
      params: its parameters.
      pairs: token ids of contexts and of their continuations, each of one or more.
      placement: what stands before a context, see above.
      pad_id: the padding token.
      batch_size: rows of each batch.

    Raises:
      ValueError: before anything is traced, if a context or a continuation is empty, or there is
        no room for the continuation.
    """
    if placement not in ("pad", "force"):
        raise ValueError(f"placement: got {placement!r}, must be 'pad' or 'force'")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, must be 1 or greater")
    config = model.config
    rows = [
        _Row.placed(i, context, continuation, config, placement)
        for i, (context, continuation) in enumerate(pairs)
    ]
    by_blocks: dict[int, list[_Row]] = {}
    for row in sorted(rows, key=lambda row: -row.end):
        by_blocks.setdefault(row.bucket(config), []).append(row)
    scores: list[Score | None] = [None] * len(rows)
    pending: tuple[list[_Row], Any] = ([], None)  # read a batch late, while the next is computed

    def read() -> None:
        batch, found = pending
        if batch:
            logprobs_BxT, likeliest_BxT = (np.asarray(x).reshape(batch_size, -1) for x in found)
        for b, row in enumerate(batch):
            # Place 0 of what is found is the first of the second block.
            place = slice(row.begin - config.block_length, row.end - config.block_length)
            scores[row.index] = Score(logprobs_BxT[b, place], likeliest_BxT[b, place])

    with tqdm.tqdm(total=len(rows), desc="Scoring", disable=None) as bar:
        for blocks, members in by_blocks.items():
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                shape = (batch_size, blocks, config.block_length)
                tokens_BxT = np.full((batch_size, blocks * config.block_length), pad_id, np.int32)
                mask_BxT = np.zeros(tokens_BxT.shape, bool)
                for b, row in enumerate(batch):
                    tokens_BxT[b, row.padding : row.end] = row.tokens
                    mask_BxT[b, row.padding : row.end] = True
                found = _scores(model, params, tokens_BxT.reshape(shape), mask_BxT.reshape(shape))
                read()
                pending = (batch, found)
                bar.update(len(batch))
        read()
    return scores


class _Row(NamedTuple):
    """A pair in its place; places are counted from the first block, padding included."""

    index: int  # in the pairs
    tokens: list[int]
    padding: int
    begin: int  # of the continuation
    end: int

    @classmethod
    def placed(
        cls,
        index: int,
        context: Sequence[int],
        continuation: Sequence[int],
        config: ModelConfig,
        placement: Placement,
    ) -> "_Row":
        for name, part in (("context", context), ("continuation", continuation)):
            if not len(part):
                raise ValueError(f"pair {index}: the {name} has no token")
        block, most = config.block_length, longest_row(config, placement)
        first = 1 if placement == "pad" else block  # tokens before what can be predicted
        if len(continuation) > most - first:
            raise ValueError(
                f"pair {index}: the continuation of {len(continuation)} tokens does not fit the "
                f"context of {config.context_length}, of which {most - first} can be predicted"
            )
        tokens = [*context, *continuation][-most:]
        known = len(tokens) - len(continuation)
        padding = block - 1 if placement == "pad" else max(0, block - known)
        return cls(index, tokens, padding, padding + known, padding + len(tokens))

    def bucket(self, config: ModelConfig) -> int:
        """Blocks of the batch that it is in."""
        blocks = -(-self.end // config.block_length)
        return bucket(blocks, config.block_length, max(blocks, config.blocks))


@functools.partial(jax.jit, static_argnames="model")
def _scores(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and whether they are the greatest, `[B, N-1, K]`."""
    logits_BxMxKxV = next_logits(model, params, tokens_BxNxK, mask_BxNxK)
    token_BxMxK = tokens_BxNxK[:, 1:]
    chosen_BxMxK = jnp.take_along_axis(logits_BxMxKxV, token_BxMxK[..., None], axis=-1)[..., 0]
    logprob_BxMxK = chosen_BxMxK - jax.nn.logsumexp(logits_BxMxKxV, axis=-1)
    return logprob_BxMxK, logits_BxMxKxV.argmax(-1) == token_BxMxK
