"""Two models on the same text, token by token: what does one keep of the other?

Used for a block model and the vanilla model that it was made from, or any two models with one
tokenizer. Each document is cut into windows that both contexts hold, and every token but the first
ones is predicted by both from the same tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blocktx.config import ModelConfig
from blocktx.data import Documents
from blocktx.decode import Placement
from blocktx.evaluate.next_logits import cross_entropy, next_logits, split, token_bytes
from blocktx.evaluate.scoring import longest_row
from blocktx.model import Model

_COUNT, _NATS, _SQUARES, _KL, _AGREE = 0, slice(1, 3), slice(3, 5), 5, 6  # rows of the sums


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model beside a reference on the same tokens.

    Attributes:
      tokens: number of tokens that both predicted.
      loss: of the model and the reference, nats per token.
      bits_per_byte: of the model and the reference.
      kl: KL(reference || model), the mean over tokens, nats.
      agreement: fraction of tokens where both have the same likeliest token.
      kl_by_position: `kl` for each position in a block of the model.
      sums: for each model the sums of `heldout.running_sums`, float64 `[3, M, K]`, in blocks of the
        model.
    """

    tokens: int
    loss: tuple[float, float]
    bits_per_byte: tuple[float, float]
    kl: float
    agreement: float
    kl_by_position: tuple[float, ...]
    sums: tuple[np.ndarray, np.ndarray]


class _Layout(NamedTuple):
    """Rows of equal tokens for several models."""

    length: int  # tokens in a row
    first: int  # the first token that all models predict
    unit: int  # tokens in whole blocks of all models
    padding: tuple[int, ...]  # before the row, for each model

    @classmethod
    def of(cls, configs: Sequence[ModelConfig], placement: Placement) -> "_Layout":
        unit = math.lcm(*(config.block_length for config in configs))
        first = 1 if placement == "pad" or unit == 1 else unit
        room = min(longest_row(config, placement) for config in configs) - first
        if room < unit:
            raise ValueError(
                f"the contexts, of {' and '.join(str(c.context_length) for c in configs)} tokens, "
                f"have no room for {first + unit} tokens of which {unit} are predicted"
            )
        lengths = [config.block_length for config in configs]
        padding = tuple(length - 1 if first == 1 else 0 for length in lengths)
        return cls(first + room // unit * unit, first, unit, padding)

    def begin(self, config: ModelConfig, padding: int) -> int:
        """Return the index of the first predicted block, where 0 is block 1."""
        return (self.first + padding) // config.block_length - 1


def running_comparison(
    models: tuple[Model, Model],
    params: tuple[dict[str, Any], dict[str, Any]],
    documents: Documents,
    *,
    placement: Placement,
    pad_id: int,
    batch_size: int,
) -> Iterator[tuple[Comparison, int]]:
    """Yield the comparison over the rows so far and their number, once for each batch.

    Args:
      models: the model and the reference, whose tokens are the same.
      params: their parameters.
      documents: the text to predict.
      placement: padding in front of rows, as in `blocktx.evaluate.scoring`.
      pad_id: the padding token.
      batch_size: rows in a batch.

    Raises:
      ValueError: before anything is traced, if the contexts hold no row, or no token is predicted.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, must be 1 or greater")
    layout = _Layout.of([model.config for model in models], placement)
    if not _count_rows(documents, layout):
        raise ValueError(
            f"there is nothing to compare: no document has more than {layout.first} tokens"
        )
    return _run(models, params, documents, layout, pad_id, batch_size)


def comparison_rows(models: Sequence[Model], documents: Documents, placement: Placement) -> int:
    """Return the number of rows of `running_comparison`."""
    return _count_rows(documents, _Layout.of([model.config for model in models], placement))


def _count_rows(documents: Documents, layout: _Layout) -> int:
    ids = documents.ids()
    lengths = documents.offsets[ids + 1] - documents.offsets[ids] - layout.first
    new = layout.length - layout.first
    return int((-(-lengths[lengths > 0] // new)).sum())


def _rows(documents: Documents, layout: _Layout) -> Iterator[np.ndarray]:
    for id_ in documents.ids():
        begin, end = map(int, documents.offsets[id_ : id_ + 2])
        starts = range(begin, end - layout.first, layout.length - layout.first)
        yield from documents.read([(i, min(i + layout.length, end)) for i in starts])


def _run(
    models: tuple[Model, Model],
    params: tuple[dict[str, Any], dict[str, Any]],
    documents: Documents,
    layout: _Layout,
    pad_id: int,
    batch_size: int,
) -> Iterator[tuple[Comparison, int]]:
    bytes_per_token = documents.text_bytes / documents.token_count
    total_7xT, done = 0, 0
    rows = list(_rows(documents, layout))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        tokens_BxL = np.full((batch_size, layout.length), pad_id, np.int32)
        mask_BxL = np.zeros(tokens_BxL.shape, bool)
        for b, row in enumerate(batch):
            tokens_BxL[b, : len(row)], mask_BxL[b, : len(row)] = row, True
        total_7xT = total_7xT + np.asarray(
            _sums(models, layout, params, tokens_BxL, mask_BxL, np.int32(pad_id)), np.float64
        )
        done += len(batch)
        yield _comparison(total_7xT, models[0].config.block_length, bytes_per_token), done


def _comparison(sums_7xT: np.ndarray, block_length: int, bytes_per_token: float) -> Comparison:
    sums_7xMxK = sums_7xT.reshape(7, -1, block_length)
    count_MxK = sums_7xMxK[_COUNT]
    tokens = count_MxK.sum()
    loss = sums_7xMxK[_NATS].sum((1, 2)) / tokens
    with np.errstate(invalid="ignore"):
        kl_K = sums_7xMxK[_KL].sum(0) / count_MxK.sum(0)
    parts = zip(sums_7xMxK[_NATS], sums_7xMxK[_SQUARES], strict=True)
    return Comparison(
        tokens=int(tokens),
        loss=tuple(loss.tolist()),
        bits_per_byte=tuple((loss / math.log(2) / bytes_per_token).tolist()),
        kl=float(sums_7xMxK[_KL].sum() / tokens),
        agreement=float(sums_7xMxK[_AGREE].sum() / tokens),
        kl_by_position=tuple(kl_K.tolist()),
        sums=tuple(np.stack([nats, count_MxK, squares]) for nats, squares in parts),
    )


@functools.partial(jax.jit, static_argnames=("models", "layout"))
def _sums(
    models: tuple[Model, Model],
    layout: _Layout,
    params: tuple[dict[str, Any], dict[str, Any]],
    tokens_BxL: jax.Array,
    mask_BxL: jax.Array,
    pad_id: jax.Array,
) -> jax.Array:
    """Return sums over the batch by token, `[7, L - first]`: see `_COUNT` and so on."""
    rows, first = len(tokens_BxL), layout.first
    predicted = layout.length - first
    row_bytes = layout.unit * sum(token_bytes(model) for model in models)
    chunk, chunks = split(predicted // layout.unit, 2 * rows * row_bytes)
    chunk *= layout.unit  # tokens
    readers = []
    for model, own, padding in zip(models, params, layout.padding, strict=True):
        length, begin = model.config.block_length, layout.begin(model.config, padding)
        blocks = [
            jnp.pad(x, ((0, 0), (padding, 0)), constant_values=fill).reshape(rows, -1, length)
            for x, fill in ((tokens_BxL, pad_id), (mask_BxL, False))
        ]
        logits = next_logits(model, own, *blocks, begin + chunks * chunk // length)
        readers.append(functools.partial(_read, logits, begin, length))
    vocabulary = min(model.config.vocab_size for model in models)
    size = chunks * chunk
    labels_BxT, real_BxT = (
        jnp.pad(x[:, first:], ((0, 0), (0, size - predicted))) for x in (tokens_BxL, mask_BxL)
    )

    def one(begin: jax.Array | int) -> jax.Array:
        labels_BxC, real_BxC = (
            jax.lax.dynamic_slice_in_dim(x, begin, chunk, axis=1) for x in (labels_BxT, real_BxT)
        )
        model, reference = (read(begin, chunk)[..., :vocabulary] for read in readers)
        nats = [cross_entropy(logits, labels_BxC) for logits in (model, reference)]
        log_q, log_p = (jax.nn.log_softmax(logits) for logits in (model, reference))
        kl_BxC = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        agree_BxC = model.argmax(-1) == reference.argmax(-1)
        per_token = [real_BxC, *nats, *map(jnp.square, nats), kl_BxC, agree_BxC]
        return jnp.stack([jnp.where(real_BxC, x, 0).sum(0, dtype=jnp.float32) for x in per_token])

    if chunks == 1:
        return one(0)
    sums_ix7xC = jax.lax.map(one, jnp.arange(chunks) * chunk)
    return jnp.moveaxis(sums_ix7xC, 0, 1).reshape(7, -1)[:, :predicted]


def _read(logits: Any, first: int, length: int, begin: jax.Array | int, count: int) -> jax.Array:
    """Return the logits of `count` tokens from token `begin` after the first, `[B, count, V]`."""
    blocks = logits(first + begin // length, count // length)
    return blocks.reshape(blocks.shape[0], count, -1)
