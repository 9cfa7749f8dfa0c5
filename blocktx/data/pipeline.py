"""Batches of contexts: shuffled for ever for training, in order and once for evaluation."""

import functools
import sys
import threading
from collections.abc import Sequence

import grain
import numpy as np
from grain.experimental import index_shuffle

from blocktx.config import ModelConfig, RunConfig, UserError
from blocktx.data.blocks import PackedBlocks
from blocktx.data.corpus import Mixture
from blocktx.data.documents import Documents

# Elements are whole batches, so grain's default buffer of 500 would be gigabytes.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)

_PERIOD = 10_000  # contexts, within which the shares of sources are exact


class _Epochs:
    """The contexts of some documents for ever; each epoch has its own packing and order."""

    def __init__(self, documents: Documents, config: RunConfig, pad_id: int, seed: int):
        self._documents, self._seed = documents, seed
        self._layout = {
            "block_length": config.model.block_length,
            "blocks": config.model.blocks,
            "random_padding": config.data.random_padding,
        }
        self._pad_id = pad_id
        self._ends: list[int] = []  # the number of contexts in epochs 0..e
        self._lock = threading.Lock()
        self._epoch = functools.lru_cache(maxsize=2)(self._pack)
        self._epoch(0).require_context()

    def _pack(self, epoch: int) -> PackedBlocks:
        seed = (self._seed, epoch)
        return PackedBlocks(self._documents, **self._layout, pad_id=self._pad_id, seed=seed)

    def _extend(self, index: int) -> None:
        while not self._ends or index >= self._ends[-1]:
            seed = (self._seed, len(self._ends))
            count = PackedBlocks.count(self._documents, **self._layout, seed=seed)
            self._ends.append(count + (self._ends[-1] if self._ends else 0))

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return contexts by their number, counted over all epochs, as rows."""
        with self._lock:  # one thread packs an epoch, and the others wait for it
            self._extend(int(indices.max()))
            epochs = np.searchsorted(self._ends, indices, side="right")
            packed = {epoch: self._epoch(epoch) for epoch in np.unique(epochs).tolist()}
        parts = []
        for epoch, contexts in packed.items():
            rows = np.flatnonzero(epochs == epoch)
            places = indices[rows] - (self._ends[epoch - 1] if epoch else 0)
            seed = _shuffle_seed(self._seed, epoch)
            last = len(contexts) - 1
            order = [index_shuffle(int(p), max_index=last, seed=seed, rounds=4) for p in places]
            parts.append((rows, contexts.read(order)))
        return _merge(len(indices), parts)

    def passes(self, count: int) -> float:
        """Return the number of epochs that the first `count` contexts make."""
        self._extend(count)
        epoch = int(np.searchsorted(self._ends, count, side="right"))
        begin = self._ends[epoch - 1] if epoch else 0
        return epoch + (count - begin) / (self._ends[epoch] - begin)


def _shuffle_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, 2]).generate_state(1)[0])


def _merge(
    size: int, parts: Sequence[tuple[np.ndarray, dict[str, np.ndarray]]]
) -> dict[str, np.ndarray]:
    """Return rows from several parts, each given with the numbers of its rows."""
    if len(parts) == 1:
        return parts[0][1]
    merged = {}
    for rows, part in parts:
        for name, x in part.items():
            merged.setdefault(name, np.empty((size, *x.shape[1:]), x.dtype))[rows] = x
    return merged


class _MixedContexts:
    """The contexts of several sources, in a fixed order that keeps their shares everywhere."""

    def __init__(self, sources: Sequence[_Epochs], weights: Sequence[float]):
        self._sources = sources
        exact = np.array(weights) * _PERIOD
        self._counts = np.floor(exact).astype(np.int64)
        most_missed = np.argsort(self._counts - exact, kind="stable")
        self._counts[most_missed[: _PERIOD - self._counts.sum()]] += 1
        # Source s has its j-th context at (j + 1/2) / counts[s] of a period.
        places = [(np.arange(count) + 0.5) / count for count in self._counts]
        order = np.argsort(np.concatenate(places), kind="stable")
        self._source = np.repeat(np.arange(len(sources)), self._counts)[order]
        self._rank = np.concatenate([np.arange(count) for count in self._counts])[order]

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        periods, places = np.divmod(indices, _PERIOD)
        sources = self._source[places]
        numbers = periods * self._counts[sources] + self._rank[places]
        parts = []
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            parts.append((rows, self._sources[source].read(numbers[rows])))
        return _merge(len(indices), parts)

    def counts(self, count: int) -> list[int]:
        """Return how many of the first `count` contexts are of each source."""
        periods, rest = divmod(count, _PERIOD)
        among = np.bincount(self._source[:rest], minlength=len(self._counts))
        return (periods * self._counts + among).tolist()


class _Batches:
    """Batch s is contexts s * size and the following; those in `rows` are read, and no others."""

    def __init__(self, contexts: _MixedContexts, size: int, rows: np.ndarray):
        self._contexts, self._size, self._rows = contexts, size, rows

    def __len__(self) -> int:
        return sys.maxsize // self._size

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self._contexts.read(int(step) * self._size + self._rows)


def _mixed(train: Mixture | Documents, config: RunConfig, pad_id: int) -> _MixedContexts:
    if isinstance(train, Documents):
        train = Mixture(("",), (1.0,), (train,))
    # A hashed seed for each source, so that runs of seeds 0 and 1 have nothing in common.
    seeds = np.random.SeedSequence(config.seed).generate_state(len(train.documents))
    sources = [
        _Epochs(documents, config, pad_id, int(seed))
        for documents, seed in zip(train.documents, seeds, strict=True)
    ]
    mixed = _MixedContexts(sources, train.weights)
    for name, weight, count in zip(train.names, train.weights, mixed.counts(_PERIOD), strict=True):
        if count == 0:
            raise UserError(
                f"config.data.source: {name!r} would never be seen: its share of the contexts is "
                f"{weight:.1g}, and 1 in {_PERIOD:,} is the least; raise its weight or leave it out"
            )
    return mixed


def training_batches(
    train: Mixture | Documents, config: RunConfig, pad_id: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Return endless batches `{"tokens": int32 [B, N, K], "mask": bool [B, N, K]}`.

    The batch of step s depends on `config.seed` and s alone, whatever the rows. In each epoch of a
    source, its documents get padding, packing into contexts, and an order of contexts of their own;
    each context is in the epoch once. `get_state()`, which does not depend on the rows either, is
    plain JSON; after `set_state()` with it the iterator continues as the one that it came from
    would have.

    Args:
      train: the documents.
      config: the run.
      pad_id: the padding token.
      rows: the rows of each batch that are read; None: all.

    Raises:
      UserError: the documents of a source do not fill one context, or its share is too small.
    """
    size = config.training.batch_size
    rows = np.arange(size) if rows is None else np.asarray(rows)
    dataset = grain.MapDataset.source(_Batches(_mixed(train, config, pad_id), size, rows))
    return iter(dataset.to_iter_dataset(_READ_OPTIONS))


def sources_seen(train: Mixture, config: RunConfig, pad_id: int, step: int) -> list[str]:
    """Return for each source of a mixture how often it was seen before `step`, as text."""
    mixed = _mixed(train, config, pad_id)
    counts = mixed.counts(step * config.training.batch_size)
    return [
        f"{name}: weight {weight:.4f}, {count:,} contexts, seen {source.passes(count):.2f} times"
        for name, weight, count, source in zip(
            train.names, train.weights, counts, mixed._sources, strict=True
        )
    ]


def heldout_size(config: RunConfig) -> int:
    """Rows of a batch of held-out text: those of a microbatch, whose memory is known to suffice."""
    return config.training.batch_size // config.training.microbatches


def heldout_batches(
    documents: Documents, config: RunConfig, pad_id: int, rows: np.ndarray | None = None
) -> grain.IterDataset[dict[str, np.ndarray]] | None:
    """`text_batches` of the size of training's."""
    return text_batches(documents, config.model, pad_id, size=heldout_size(config), rows=rows)


def text_batches(
    documents: Documents,
    model: ModelConfig,
    pad_id: int,
    *,
    size: int,
    stride: int | None = None,
    rows: np.ndarray | None = None,
) -> grain.IterDataset[dict[str, np.ndarray]] | None:
    """Return all contexts once, in order; can be iterated again. None if there is no context.

    Consecutive contexts share a block, so that each block but the very first of all is predicted
    once. The last batch is filled up with contexts of padding (mask False).

    Args:
      documents: whose blocks are put one after the other and cut into contexts.
      model: whose contexts.
      pad_id: the padding token.
      size: rows of a batch.
      stride: tokens between the beginnings of consecutive contexts. Batches then carry `first`,
        int32 `[B]`: the first block of each row that is scored.
      rows: the rows of each batch that are read; None: all.

    Raises:
      UserError: the stride is not whole blocks, or leaves contexts without a block in common.
    """
    block_length, blocks = model.block_length, model.blocks
    most = (blocks - 1) * block_length
    if stride is not None and not (0 < stride <= most and stride % block_length == 0):
        raise UserError(
            f"stride: got {stride}, must be a multiple of block_length {block_length}, from "
            f"{block_length} to {most} (context_length {model.context_length} less a block)"
        )
    overlap = 1 if stride is None else blocks - stride // block_length
    contexts = PackedBlocks(
        documents,
        block_length=block_length,
        blocks=blocks,
        pad_id=pad_id,
        random_padding=False,
        seed=None,
        overlap=overlap,
    )
    if len(contexts) == 0:
        return None
    rows = np.arange(size) if rows is None else np.asarray(rows)
    first = None if stride is None else overlap
    dataset = grain.MapDataset.source(_TextBatches(contexts, size, rows, first, pad_id))
    return dataset.to_iter_dataset(_READ_OPTIONS)


class _TextBatches:
    """Batches of consecutive contexts; those in `rows` are read, and no others."""

    def __init__(
        self,
        contexts: PackedBlocks,
        size: int,
        rows: np.ndarray,
        first: int | None,
        pad_id: int,
    ):
        self._contexts, self._size, self._rows = contexts, size, rows
        self._first, self._pad_id = first, pad_id

    def __len__(self) -> int:
        return -(-len(self._contexts) // self._size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        indices = index * self._size + self._rows
        there = indices < len(self._contexts)
        read = self._contexts.read(indices[there])
        batch = {
            "tokens": np.full((len(indices), *read["tokens"].shape[1:]), self._pad_id, np.int32),
            "mask": np.zeros((len(indices), *read["mask"].shape[1:]), bool),
        }
        for name, x in read.items():
            batch[name][there] = x
        if self._first is not None:
            batch["first"] = np.where(there & (indices > 0), self._first, 1).astype(np.int32)
        return batch
