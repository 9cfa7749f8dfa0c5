"""Batches of contexts: shuffled for ever for training, in order and once for evaluation."""

from collections.abc import Sequence

import grain
import numpy as np

from blocktx.config import ModelConfig, RunConfig
from blocktx.data.blocks import PackedBlocks
from blocktx.data.corpus import Documents

# Elements are whole batches, so grain's default buffer of 500 would be gigabytes.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


class _RowsOfBatches:
    """Of each batch of `size` consecutive contexts those in `rows`, read by nobody else."""

    def __init__(
        self, contexts: grain.MapDataset[dict[str, np.ndarray]], size: int, rows: np.ndarray
    ):
        self._contexts, self._size, self._rows = contexts, size, rows

    def __len__(self) -> int:
        return len(self._contexts) // self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        elements = [self._contexts[index * self._size + int(row)] for row in self._rows]
        return {name: np.stack([element[name] for element in elements]) for name in elements[0]}


def training_batches(
    documents: Documents, config: RunConfig, pad_id: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches `{"tokens": int32 [B, N, K], "mask": bool [B, N, K]}`, or `rows` of them.

    The batch of step s depends on `config.seed` and s alone, whatever the rows. Each epoch has each
    context once, in an order of its own. Documents are packed into contexts once, so that every
    epoch has the same padding and leaves out the same blocks, those too few for a last context.
    `get_state()`, which does not depend on the rows either, is
    plain JSON; after `set_state()` with it the iterator continues as the one that it came from
    would have.

    Raises:
      ValueError: the documents do not fill one context.
    """
    # Hashed seeds: grain shuffles epoch e with seed + e, so that runs with seeds 0 and 1 would
    # otherwise share the orders of their epochs.
    packing_seed, shuffle_seed = np.random.SeedSequence(config.seed).generate_state(2).tolist()
    contexts = PackedBlocks(
        documents,
        block_length=config.model.block_length,
        blocks=config.model.blocks,
        pad_id=pad_id,
        random_padding=config.data.random_padding,
        seed=packing_seed,
    )
    shuffled = grain.MapDataset.source(contexts).shuffle(shuffle_seed).repeat()
    size = config.training.batch_size
    rows = np.arange(size) if rows is None else rows
    dataset = grain.MapDataset.source(_RowsOfBatches(shuffled, size, rows))
    return iter(dataset.to_iter_dataset(_READ_OPTIONS))


def heldout_size(config: RunConfig) -> int:
    """Rows of a batch of held-out text: those of a microbatch, whose memory is known to suffice."""
    return config.training.batch_size // config.training.microbatches


def heldout_batches(
    documents: Documents, config: RunConfig, pad_id: int, rows: np.ndarray | None = None
) -> grain.IterDataset[dict[str, np.ndarray]] | None:
    """`text_batches` of the size of training's."""
    return text_batches(documents, config.model, pad_id, size=heldout_size(config), rows=rows)


class _Sliding:
    """Contexts with the number of the first block that is new, after those of the one before."""

    def __init__(self, contexts: PackedBlocks, overlap: int):
        self._contexts, self._overlap = contexts, overlap

    def __len__(self) -> int:
        return len(self._contexts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._contexts[index] | {"first": np.int32(self._overlap if index else 1)}


def text_batches(
    documents: Documents,
    model: ModelConfig,
    pad_id: int,
    *,
    size: int,
    stride: int | None = None,
    rows: np.ndarray | None = None,
) -> grain.IterDataset[dict[str, np.ndarray]] | None:
    """All contexts once, in order; can be iterated again. None if there is no context.

    Consecutive contexts share a block, so that each block but the very first of all is predicted
    once. The last batch is filled up with contexts of padding (mask false).

    Args:
      documents: whose blocks are put one after the other and cut into contexts.
      model: whose contexts.
      pad_id: the padding token.
      size: rows of a batch.
      stride: tokens that a context has more than the one before, for it to have more in common
        with it than a block. Batches then have `first`, int32 `[B]`, from where the block is on
        that its row is to be scored from.
      rows: those of each batch that are wanted; None: all.

    Raises:
      ValueError: the stride is not whole blocks, or leaves contexts without a block in common.
    """
    block_length, blocks = model.block_length, model.blocks
    most = (blocks - 1) * block_length
    if stride is not None and not (0 < stride <= most and stride % block_length == 0):
        raise ValueError(
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

    def full_batch(elements: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        shape = (size, blocks, block_length)
        batch = {"tokens": np.full(shape, pad_id, np.int32), "mask": np.zeros(shape, bool)}
        if stride is not None:
            batch["first"] = np.ones(size, np.int32)
        for row, element in enumerate(elements):
            for name, x in element.items():
                batch[name][row] = x
        return batch if rows is None else {name: x[rows] for name, x in batch.items()}

    source = contexts if stride is None else _Sliding(contexts, overlap)
    dataset = grain.MapDataset.source(source).batch(size, batch_fn=full_batch)
    return dataset.to_iter_dataset(_READ_OPTIONS)
