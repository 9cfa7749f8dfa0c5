"""Batches of contexts: shuffled for ever for training, in order and once for evaluation."""

from collections.abc import Sequence

import grain
import numpy as np

from blocktx.config import RunConfig
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
    """All contexts once, in order; can be iterated again. None if there is no context.

    A batch has `heldout_size` rows, or those of them that `rows` says.

    Consecutive contexts share a block, so that each block but the very first of all is predicted
    once. The last batch is filled up with contexts of padding (mask false).
    """
    contexts = PackedBlocks(
        documents,
        block_length=config.model.block_length,
        blocks=config.model.blocks,
        pad_id=pad_id,
        random_padding=False,
        seed=None,
        overlap=1,
    )
    if len(contexts) == 0:
        return None
    size = heldout_size(config)

    def full_batch(elements: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        shape = (size, config.model.blocks, config.model.block_length)
        tokens_BxNxK = np.full(shape, pad_id, np.int32)
        mask_BxNxK = np.zeros(shape, bool)
        for row, element in enumerate(elements):
            tokens_BxNxK[row], mask_BxNxK[row] = element["tokens"], element["mask"]
        batch = {"tokens": tokens_BxNxK, "mask": mask_BxNxK}
        return batch if rows is None else {name: x[rows] for name, x in batch.items()}

    dataset = grain.MapDataset.source(contexts).batch(size, batch_fn=full_batch)
    return dataset.to_iter_dataset(_READ_OPTIONS)
