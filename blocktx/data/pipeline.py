"""Batches of contexts: shuffled for ever for training, in order and once for evaluation."""

from collections.abc import Sequence

import grain
import numpy as np

from blocktx.config import RunConfig
from blocktx.data.blocks import PackedBlocks
from blocktx.data.corpus import Documents

# Elements are whole batches, so grain's default buffer of 500 would be gigabytes.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


def training_batches(
    documents: Documents, config: RunConfig, pad_id: int
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless global batches `{"tokens": int32 [B, N, K], "mask": bool [B, N, K]}`.

    The batch of step s depends on `config.seed` and s alone. Each epoch has each context once, in
    an order of its own. Documents are packed into contexts once, so that every epoch has the same
    padding and leaves out the same blocks, those too few for a last context. `get_state()` is
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
    dataset = grain.MapDataset.source(contexts).shuffle(shuffle_seed).repeat()
    dataset = dataset.batch(config.training.batch_size, drop_remainder=True)
    return iter(dataset.to_iter_dataset(_READ_OPTIONS))


def heldout_batches(
    documents: Documents, config: RunConfig, pad_id: int
) -> grain.IterDataset[dict[str, np.ndarray]] | None:
    """All contexts once, in order; can be iterated again. None if there is no context.

    A batch has as many rows as a microbatch in training, whose memory is known to suffice.

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
    size = config.training.batch_size // config.training.microbatches

    def full_batch(elements: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        shape = (size, config.model.blocks, config.model.block_length)
        tokens_BxNxK = np.full(shape, pad_id, np.int32)
        mask_BxNxK = np.zeros(shape, bool)
        for row, element in enumerate(elements):
            tokens_BxNxK[row], mask_BxNxK[row] = element["tokens"], element["mask"]
        return {"tokens": tokens_BxNxK, "mask": mask_BxNxK}

    dataset = grain.MapDataset.source(contexts).batch(size, batch_fn=full_batch)
    return dataset.to_iter_dataset(_READ_OPTIONS)
