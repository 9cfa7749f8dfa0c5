"""Log-probabilities of continuations of many contexts, in few shapes of batches.

The first block of a row is never predicted, so a continuation must begin after it. Two placements:

    pad    block_length - 1 padding tokens before the context, as in [P P P a] (paper, appendix H;
           for models trained with random padding). All tokens but the first are predicted.
    force  no padding, except to fill up a context shorter than a block (for models trained without
           random padding; give them contexts of a block or more).

A vanilla model needs no padding: its first block is the first token.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from blocktx.config import ModelConfig
from blocktx.decode import Placement, bucket
from blocktx.evaluate.next_logits import cross_entropy, map_logits
from blocktx.model import Model
from blocktx.progress_bar import ProgressBar


class Score(NamedTuple):
    """The score of a continuation of J tokens."""

    logprobs_J: np.ndarray  # float32: natural logarithm of each token's probability
    likeliest_J: np.ndarray  # bool: True for tokens that greedy decoding would choose


def longest_row(config: ModelConfig, placement: Placement) -> int:
    """Return the largest number of tokens of a context and its continuation together.

    A vanilla model that has read a whole context still predicts the token after it.
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
    """Return the score of each continuation, in the order of `pairs`; see `iterate_scores`."""
    options = dict(placement=placement, pad_id=pad_id, batch_size=batch_size)
    scores: list[Score | None] = [None] * len(pairs)
    for index, found in iterate_scores(model, params, pairs, **options):
        scores[index] = found
    return scores


def iterate_scores(
    model: Model,
    params: dict[str, Any],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    placement: Placement,
    pad_id: int,
    batch_size: int,
) -> Iterator[tuple[int, Score]]:
    """Yield the index and the score of each pair as soon as it is known, longest rows first.

    If a pair is longer than `longest_row`, the beginning of its context is dropped. Rows are sorted
    by length and rounded up to powers of two, so the number of compiled programs does not depend on
    the pairs. A score depends neither on the batch size nor on other pairs.

    Args:
      model: a block or vanilla model.
      params: its parameters.
      pairs: token ids of contexts and of their continuations, one or more each.
      placement: padding before the context, see above.
      pad_id: the padding token.
      batch_size: rows in a batch.

    Raises:
      ValueError: before anything is traced, if a context or a continuation is empty, or the
        continuation does not fit.
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
    return _scores_by_bucket(model, params, rows, pad_id, batch_size)


def _scores_by_bucket(
    model: Model, params: dict[str, Any], rows: "list[_Row]", pad_id: int, batch_size: int
) -> Iterator[tuple[int, Score]]:
    length = model.config.block_length
    by_blocks: dict[int, list[_Row]] = {}
    for row in sorted(rows, key=lambda row: -row.end):
        by_blocks.setdefault(row.bucket(model.config), []).append(row)
    batches = [
        (blocks, members[start : start + batch_size])
        for blocks, members in by_blocks.items()
        for start in range(0, len(members), batch_size)
    ]

    def read(batch: list[_Row], found: Any) -> Iterator[tuple[int, Score]]:
        logprobs_BxT, likeliest_BxT = (np.asarray(x).reshape(batch_size, -1) for x in found)
        for b, row in enumerate(batch):
            place = slice(row.begin - length, row.end - length)  # 0 is the start of block 1
            yield row.index, Score(logprobs_BxT[b, place], likeliest_BxT[b, place])

    pending: tuple[list[_Row], Any] | None = None
    with ProgressBar(total=len(rows), desc="scoring", unit=" rows") as bar:
        for blocks, batch in batches:
            tokens_BxT = np.full((batch_size, blocks * length), pad_id, np.int32)
            mask_BxT = np.zeros(tokens_BxT.shape, bool)
            for b, row in enumerate(batch):
                tokens_BxT[b, row.padding : row.end] = row.tokens
                mask_BxT[b, row.padding : row.end] = True
            shape = (batch_size, blocks, length)
            found = _scores(model, params, tokens_BxT.reshape(shape), mask_BxT.reshape(shape))
            if pending is not None:  # read one batch late: the device computes the next meanwhile
                yield from read(*pending)
                bar.update(len(pending[0]))
            pending = (batch, found)
        if pending is not None:
            yield from read(*pending)
            bar.update(len(pending[0]))


class _Row(NamedTuple):
    """A pair as one row. Places are counted from the start of the row, padding included."""

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
        first = 1 if placement == "pad" else block  # tokens that are never predicted
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
        """Return the number of blocks of the batches for rows of this length."""
        blocks = -(-self.end // config.block_length)
        return bucket(blocks, config.block_length, max(blocks, config.blocks))


@functools.partial(jax.jit, static_argnames="model")
def _scores(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array, mask_BxNxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return log-probabilities of the tokens and whether they are the likeliest, `[B, N-1, K]`."""

    def of_chunk(logits_BxCxKxV: jax.Array, tokens_BxCxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs_BxCxK = -cross_entropy(logits_BxCxKxV, tokens_BxCxK)
        return logprobs_BxCxK, logits_BxCxKxV.argmax(-1) == tokens_BxCxK

    return map_logits(model, params, tokens_BxNxK, mask_BxNxK.astype(bool), of_chunk)
