"""Batches depend on seed and step alone, resume exactly, and evaluation sees everything once."""

import collections
import dataclasses
import json
import time

import numpy as np
import pytest

from blocktx.config.errors import UserError
from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.config.run import DataConfig, RunConfig, TrainingConfig
from blocktx.data import pipeline
from blocktx.data.blocks import PackedBlocks
from blocktx.data.corpus import Mixture
from blocktx.data.documents import Documents
from blocktx.data.pipeline import heldout_batches, sources_seen, training_batches

PAD = 1
STACK = StackConfig(layers=1, width=32, heads=4)
LENGTHS = [7, 30, 12, 5, 40, 21, 9, 16]
DOCUMENTS = Documents(
    np.arange(2, 2 + sum(LENGTHS), dtype=np.uint16),
    np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64),
    0,
)
EMPTY = Documents(np.empty(0, np.uint16), np.zeros(1, np.int64), 0)


def make_config(kind="block", batch_size=3, seed=0, **data):
    sizes = {"vocab_size": 256, "context_length": 16}
    if kind == "block":
        model = BlockConfig(**sizes, block_decoder=STACK, token_decoder=STACK)
    else:
        model = VanillaConfig(**sizes, decoder=STACK)
    training = TrainingConfig(batch_size=batch_size)
    return RunConfig(model, data=DataConfig(**data), training=training, seed=seed)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert np.array_equal(batch["tokens"], other["tokens"])
        assert np.array_equal(batch["mask"], other["mask"])


@pytest.mark.parametrize(("kind", "shape"), [("block", (3, 4, 4)), ("vanilla", (3, 16, 1))])
def test_shapes_and_types(kind, shape):
    config = make_config(kind)
    batches = [next(training_batches(DOCUMENTS, config, PAD))]
    batches += heldout_batches(DOCUMENTS, config, PAD)
    for batch in batches:
        assert batch["tokens"].shape == batch["mask"].shape == shape
        assert batch["tokens"].dtype == np.int32
        assert batch["mask"].dtype == bool


def rows_of(batches):
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def epochs_of(documents, config, count):
    """The rows of the first epochs, from batches of one."""
    batches = training_batches(documents, config, PAD)
    lengths = [
        PackedBlocks.count(
            documents,
            block_length=config.model.block_length,
            blocks=config.model.blocks,
            random_padding=config.data.random_padding,
            seed=(int(np.random.SeedSequence(config.seed).generate_state(1)[0]), epoch),
        )
        for epoch in range(count)
    ]
    return [take(batches, length) for length in lengths]


def test_each_epoch_has_every_token_once_but_those_of_the_last_partial_context():
    config = make_config(batch_size=1)
    epochs, left_out = epochs_of(DOCUMENTS, config, 12), []
    for rows in epochs:
        tokens = np.concatenate([row["tokens"][row["mask"]] for row in rows])
        assert len(set(tokens.tolist())) == len(tokens)  # every token of DOCUMENTS is another
        assert set(tokens.tolist()) <= set(DOCUMENTS.tokens.tolist())
        assert sum(LENGTHS) - len(tokens) < config.model.context_length
        left_out.append(frozenset(DOCUMENTS.tokens.tolist()) - set(tokens.tolist()))
    assert len(set(left_out)) > 6  # other blocks each time
    packed = [frozenset(rows_of(rows)) for rows in epochs]
    assert len(set(packed)) == len(packed)  # another packing


def test_each_epoch_has_every_context_once_in_an_order_of_its_own():
    config = make_config(batch_size=1, random_padding=False)
    one = Documents(np.arange(2, 202, dtype=np.uint16), np.array([0, 200]), 0)  # packs in one way
    epochs = [rows_of(rows) for rows in epochs_of(one, config, 3)]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert all(len(set(rows)) == len(rows) == 12 for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batch_size_cuts_one_sequence():
    small = take(training_batches(DOCUMENTS, make_config(batch_size=2), PAD), 30)
    large = take(training_batches(DOCUMENTS, make_config(batch_size=5), PAD), 12)
    assert rows_of(small) == rows_of(large)


def test_seed_decides():
    first, again, other = (
        take(training_batches(DOCUMENTS, make_config(seed=seed), PAD), 5) for seed in (1, 1, 2)
    )
    assert_equal(first, again)
    assert rows_of(first) != rows_of(other)
    next(training_batches(DOCUMENTS, make_config(seed=2**40), PAD))


def test_random_padding_setting_is_used():
    padded = next(training_batches(DOCUMENTS, make_config(batch_size=8), PAD))
    plain = next(training_batches(DOCUMENTS, make_config(batch_size=8, random_padding=False), PAD))
    first_of_block = [batch["mask"][..., 0] for batch in (padded, plain)]
    assert not first_of_block[0].all()
    assert first_of_block[1].all()


@pytest.mark.parametrize("steps", [0, 1, 4, 50])  # start, mid-epoch, in later epochs
def test_resumes_exactly(steps):
    config = make_config()
    reference = take(training_batches(DOCUMENTS, config, PAD), steps + 20)
    iterator = training_batches(DOCUMENTS, config, PAD)
    take(iterator, steps)
    time.sleep(0.02)  # lets prefetching run ahead
    state = json.loads(json.dumps(iterator.get_state()))
    assert_equal(take(iterator, 20), reference[steps:])  # asking changes nothing
    resumed = training_batches(DOCUMENTS, config, PAD)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_equal(take(resumed, 20), reference[steps:])
    iterator.set_state(state)  # also back in time
    assert_equal(take(iterator, 20), reference[steps:])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_read_their_own_rows_of_the_same_batches(hosts):
    config = make_config(batch_size=8)
    whole = take(training_batches(DOCUMENTS, config, PAD), 10)
    parts = []
    for rows in np.arange(8).reshape(hosts, -1):
        parts.append(take(training_batches(DOCUMENTS, config, PAD, rows), 10))
        assert all(batch["tokens"].shape[0] == len(rows) for batch in parts[-1])
    together = [
        {name: np.concatenate([part[i][name] for part in parts]) for name in ("tokens", "mask")}
        for i in range(10)
    ]
    assert_equal(together, whole)


class Watched(Documents):
    """Documents that note what is read of them."""

    def read(self, ranges):
        self.__dict__.setdefault("noted", []).extend(ranges)
        return super().read(ranges)


def test_a_host_reads_nothing_of_the_rows_of_others():
    config, noted = make_config(batch_size=8), []
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], list(range(8))):
        documents = Watched(DOCUMENTS.tokens, DOCUMENTS.offsets, 0)
        batches = pipeline._Batches(pipeline._mixed(documents, config, PAD), 8, np.array(rows))
        for step in range(5):
            batches[step]
        noted.append(collections.Counter(documents.noted))
    first, second, both = noted
    assert first + second == both


def test_resumes_on_other_numbers_of_hosts():
    config = make_config(batch_size=8)
    whole = take(training_batches(DOCUMENTS, config, PAD), 30)
    state, step = None, 0
    for hosts in (2, 1, 4, 8):
        iterators = [
            training_batches(DOCUMENTS, config, PAD, np.arange(8).reshape(hosts, -1)[host])
            for host in range(hosts)
        ]
        for iterator in iterators if state else ():
            iterator.set_state(state)
        for _ in range(7):
            batches = [next(iterator) for iterator in iterators]
            tokens = np.concatenate([batch["tokens"] for batch in batches])
            assert np.array_equal(tokens, whole[step]["tokens"])
            step += 1
        states = [json.loads(json.dumps(iterator.get_state())) for iterator in iterators]
        assert all(s == states[0] for s in states)
        state = states[0]


def mixture(weights):
    """Sources of documents with tokens of 1000s, 2000s, ...; each of another length."""
    documents = []
    for source in range(len(weights)):
        lengths = np.full(30, 7 + 5 * source)
        tokens = np.arange(lengths.sum()) % 900 + 1000 * (source + 1)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        documents.append(Documents(tokens.astype(np.uint16), offsets, 0))
    names = tuple("abc"[: len(weights)])
    return Mixture(names, tuple(weights), tuple(documents))


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.7, 0.1), (1 / 3,) * 3])
def test_mixtures_keep_their_weights_everywhere(weights):
    config, train = make_config(batch_size=10), mixture(weights)
    batches = take(training_batches(train, config, PAD), 40)
    sources = [int(row[mask].max()) // 1000 for b in batches for row, mask in rows_and_masks(b)]
    for begin in range(0, 400, 50):
        found = np.bincount(np.array(sources[begin : begin + 50]) - 1, minlength=len(weights))
        assert np.abs(found - 50 * np.array(weights)).max() <= 1.5
    lines = sources_seen(train, config, PAD, 40)
    for source, (line, weight) in enumerate(zip(lines, weights, strict=True), start=1):
        count = sources.count(source)
        assert f"{'abc'[source - 1]}: weight {weight:.4f}, {count} contexts, seen " in line


def test_a_source_that_would_never_be_seen_is_refused():
    with pytest.raises(UserError, match=r"'b' would never be seen: its share of .* is 1e-06"):
        training_batches(mixture((1 - 1e-6, 1e-6)), make_config(), PAD)


def rows_and_masks(batch):
    pairs = list(zip(batch["tokens"], batch["mask"], strict=True))
    assert all(len(set((row[mask] // 1000).tolist())) == 1 for row, mask in pairs)
    return pairs


def test_mixture_of_one_source_has_all_of_it():
    config = make_config()
    alone = take(training_batches(DOCUMENTS, config, PAD), 20)
    mixed = Mixture(("a",), (1.0,), (DOCUMENTS,))
    assert_equal(take(training_batches(mixed, config, PAD), 20), alone)


@pytest.mark.parametrize("seed", range(20))
def test_packing_of_random_documents(seed):
    """No block has two documents, and every token is in an epoch once, but the last context."""
    rng = np.random.default_rng(seed)
    block_length, blocks = int(rng.integers(1, 9)), int(rng.integers(2, 9))
    lengths = rng.integers(1, rng.integers(2, 60), rng.integers(5, 200))
    document = np.repeat(np.arange(len(lengths)), lengths)
    tokens = np.arange(2, 2 + lengths.sum()).astype(np.uint32)
    documents = Documents(tokens, np.concatenate([[0], np.cumsum(lengths)]), 0)
    layout = dict(block_length=block_length, blocks=blocks, random_padding=True)
    for epoch in range(3):
        packed = PackedBlocks(documents, **layout, pad_id=PAD, seed=(seed, epoch))
        assert len(packed) == PackedBlocks.count(documents, **layout, seed=(seed, epoch))
        if len(packed) == 0:
            continue
        found = packed.read(range(len(packed)))
        blocks_MxK = found["tokens"].reshape(-1, block_length)
        masks_MxK = found["mask"].reshape(-1, block_length)
        assert masks_MxK.any(1).all()
        owner = np.where(masks_MxK, document[blocks_MxK * masks_MxK - 2 * masks_MxK], -1)
        assert all(len(set(row[row >= 0])) == 1 for row in owner)
        seen = blocks_MxK[masks_MxK]
        assert len(set(seen.tolist())) == len(seen)
        assert len(tokens) - len(seen) < blocks * block_length


def test_padding_is_uniform_in_every_epoch():
    documents = Documents(np.zeros(4000, np.uint16), np.arange(1001) * 4, 0)
    layout = dict(block_length=4, blocks=2, random_padding=True)
    before = None
    for epoch in range(4):
        packed = PackedBlocks(documents, **layout, pad_id=PAD, seed=(0, epoch))
        counts = np.bincount(packed._padding, minlength=4)
        assert len(counts) == 4
        # Three degrees of freedom: 1 in 10,000 is beyond 21.1.
        assert ((counts - 250) ** 2 / 250).sum() < 21.1
        by_document = packed._padding[np.argsort(packed._order)]
        if before is not None:
            assert 150 < (by_document == before).sum() < 350  # independent of the epoch before
        before = by_document


def test_too_little_text():
    with pytest.raises(ValueError, match=r"config\.model\.context_length"):
        training_batches(EMPTY, make_config(), PAD)


@pytest.mark.parametrize("kind", ["block", "vanilla"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_heldout_has_every_context_once_and_can_be_read_again(kind, batch_size):
    config = make_config(kind, batch_size)
    batches = heldout_batches(DOCUMENTS, config, PAD)
    first = list(batches)
    assert_equal(first, list(batches))
    contexts = PackedBlocks(
        DOCUMENTS,
        block_length=config.model.block_length,
        blocks=config.model.blocks,
        pad_id=PAD,
        random_padding=False,
        seed=None,
        overlap=1,
    )
    assert len(first) == -(-len(contexts) // batch_size)
    tokens = np.concatenate([batch["tokens"] for batch in first])
    mask = np.concatenate([batch["mask"] for batch in first])
    assert np.array_equal(
        tokens[: len(contexts)], [contexts[i]["tokens"] for i in range(len(contexts))]
    )
    assert (tokens[len(contexts) :] == PAD).all()
    assert not mask[len(contexts) :].any()
    predicted = tokens[:, 1:][mask[:, 1:]]
    first_block = min(config.model.block_length, LENGTHS[0])
    assert np.array_equal(predicted, DOCUMENTS.tokens[first_block:])


def test_heldout_does_not_depend_on_the_seed():
    configs = [make_config(), dataclasses.replace(make_config(), seed=5)]
    assert_equal(*(list(heldout_batches(DOCUMENTS, config, PAD)) for config in configs))


def test_no_heldout_documents_no_batches():
    assert heldout_batches(EMPTY, make_config(), PAD) is None


def test_heldout_batches_are_of_the_size_of_microbatches():
    config = make_config(batch_size=6)
    training = dataclasses.replace(config.training, microbatches=3)
    batches = list(heldout_batches(DOCUMENTS, dataclasses.replace(config, training=training), PAD))
    assert {batch["tokens"].shape[0] for batch in batches} == {2}
    whole = rows_of(heldout_batches(DOCUMENTS, config, PAD))
    assert rows_of(batches) == whole[: len(rows_of(batches))]
