"""Packing loses, repeats and mixes nothing, and random padding is what the paper says."""

import collections

import numpy as np
import pytest

from blocktx.data.blocks import PackedBlocks
from blocktx.data.corpus import Documents

PAD = 1
LENGTHS = [1, 5, 8, 3, 4, 17, 2, 30, 1, 1, 9, 12]


def make_documents(lengths=LENGTHS):
    """Document d holds 1000 (d + 1) + 0, 1, 2, ...: a token tells where it comes from."""
    parts = [1000 * (d + 1) + np.arange(length) for d, length in enumerate(lengths)]
    tokens = np.concatenate([*parts, []]).astype(np.uint16)
    return Documents(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), 0)


def pack(documents, block_length, blocks, seed=None, random_padding=None, overlap=0):
    return PackedBlocks(
        documents,
        block_length=block_length,
        blocks=blocks,
        pad_id=PAD,
        random_padding=seed is not None if random_padding is None else random_padding,
        seed=seed,
        overlap=overlap,
    )


def brute_force(documents_and_padding, block_length):
    """The blocks [M, K], written out one token at a time; None stands for padding."""
    blocks = []
    for tokens, padding in documents_and_padding:
        row = [None] * padding
        for token in tokens:
            row.append(token)
        while len(row) % block_length:
            row.append(None)
        for i in range(0, len(row), block_length):
            blocks.append(row[i : i + block_length])
    return blocks


def as_lists(context):
    """A context's blocks, None where the mask says padding."""
    tokens_NxK, mask_NxK = context["tokens"], context["mask"]
    assert tokens_NxK.dtype == np.int32
    assert mask_NxK.dtype == bool
    assert (tokens_NxK[~mask_NxK] == PAD).all()
    return [
        [int(t) if m else None for t, m in zip(row, mask, strict=True)]
        for row, mask in zip(tokens_NxK, mask_NxK, strict=True)
    ]


def stream(source):
    return [block for i in range(len(source)) for block in as_lists(source[i])]


def recover(blocks):
    """Document tokens and padding in front, from the blocks alone; checks that none is mixed."""
    found = []
    for block in blocks:
        tokens = [token for token in block if token is not None]
        assert tokens, "a block of nothing but padding"
        assert len({token // 1000 for token in tokens}) == 1, "a block holds two documents"
        if tokens[0] % 1000 == 0:
            found.append(([], block.index(tokens[0])))
        found[-1][0].extend(tokens)
    return found


@pytest.mark.parametrize("block_length", [1, 2, 4, 7])
def test_every_token_is_there_once_and_in_order(block_length):
    documents = make_documents()
    blocks = stream(pack(documents, block_length, 1, seed=3))  # contexts of one: nothing is cut off
    found = recover(blocks)
    expected = [[1000 * (d + 1) + j for j in range(n)] for d, n in enumerate(LENGTHS)]
    assert sorted(tokens for tokens, _ in found) == expected
    assert all(0 <= padding < block_length for _, padding in found)
    assert blocks == brute_force(found, block_length)


@pytest.mark.parametrize("block_length", [1, 2, 4, 7])
@pytest.mark.parametrize("blocks", [2, 3, 5, 16])
def test_training_contexts_cut_the_stream(block_length, blocks):
    whole = stream(pack(make_documents(), block_length, 1, seed=3))
    source = pack(make_documents(), block_length, blocks, seed=3)
    assert len(source) == len(whole) // blocks
    assert stream(source) == whole[: len(source) * blocks]
    for i in (-1, len(source)):
        with pytest.raises(IndexError):
            source[i]


@pytest.mark.parametrize("block_length", [1, 2, 4, 7])
@pytest.mark.parametrize("blocks", [2, 3, 5, 1000])
def test_heldout_predicts_each_block_but_the_first_once(block_length, blocks):
    documents = make_documents()
    parts = np.split(documents.tokens, documents.offsets[1:-1])
    whole = brute_force([(part.tolist(), 0) for part in parts], block_length)
    source = pack(documents, block_length, blocks, overlap=1)
    contexts = [as_lists(source[i]) for i in range(len(source))]
    assert all(len(context) == blocks for context in contexts)
    predicted = [block for context in contexts for block in context[1:]]
    filler = len(predicted) - (len(whole) - 1)
    assert 0 <= filler < blocks - 1
    assert predicted == whole[1:] + [[None] * block_length] * filler
    context_of = [context[0] for context in contexts]
    assert context_of == whole[:: blocks - 1][: len(contexts)]


def test_one_block_or_none_has_nothing_to_predict():
    assert len(pack(make_documents([]), 4, 8, overlap=1)) == 0
    assert len(pack(make_documents([3]), 4, 8, overlap=1)) == 0
    assert len(pack(make_documents([5]), 4, 8, overlap=1)) == 1


def test_block_length_one_is_plain_concatenation():
    documents = make_documents()
    source = pack(documents, 1, 6, random_padding=False, overlap=0)
    tokens = np.concatenate([source[i]["tokens"][:, 0] for i in range(len(source))])
    assert np.array_equal(tokens[: len(documents.tokens)], documents.tokens)
    with_padding = stream(pack(documents, 1, 1, seed=0, random_padding=True))
    assert len(with_padding) == len(documents.tokens)  # 0..K-1 is 0


@pytest.mark.parametrize("block_length", [2, 4, 5])
def test_padding_is_uniform(block_length):
    count = 4000
    source = pack(make_documents([1] * 60), block_length, 1, seed=0)
    assert {padding for _, padding in recover(stream(source))} == set(range(block_length))
    lengths = np.full(count, block_length)
    documents = Documents(
        np.zeros(lengths.sum(), np.uint16), np.arange(count + 1) * block_length, 0
    )
    source = pack(documents, block_length, 1, seed=0)
    # A document of K tokens is one block if unpadded, else two, of which the second is not full.
    amounts = collections.Counter(
        int(source[i]["mask"][0].argmax()) for i in range(len(source)) if source[i]["mask"][0, -1]
    )
    assert set(amounts) == set(range(block_length))
    for amount in amounts.values():
        assert amount == pytest.approx(count / block_length, rel=0.15)


def test_no_padding_in_front_without_random_padding():
    found = recover(stream(pack(make_documents(), 4, 1, seed=3, random_padding=False)))
    assert {padding for _, padding in found} == {0}


def test_seed_decides():
    first, again, other = (stream(pack(make_documents(), 4, 2, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    paddings = [
        {tokens[0]: padding for tokens, padding in recover(stream(pack(make_documents(), 4, 1, s)))}
        for s in (1, 2)
    ]
    assert paddings[0] != paddings[1]


def test_too_little_text_says_what_would_do():
    total = len(stream(pack(make_documents(), 4, 1, seed=0)))
    with pytest.raises(
        ValueError, match=rf"config\.model\.context_length: the {sum(LENGTHS)} "
    ) as e:
        pack(make_documents(), 4, total + 1, seed=0).require_context()
    assert f"use {total * 4} or less" in str(e.value)
    assert len(pack(make_documents(), 4, total, seed=0)) == 1
    with pytest.raises(ValueError, match="use more text"):
        pack(make_documents([1]), 4, 2, seed=0).require_context()


def test_random_padding_needs_a_seed():
    with pytest.raises(ValueError, match="random_padding needs a seed"):
        pack(make_documents(), 4, 2, random_padding=True)


def test_positions_past_two_to_the_32():
    length = 3 << 30
    tokens = np.broadcast_to(np.uint16(7), (2 * length,))  # takes no memory
    documents = Documents(tokens, np.array([0, length, 2 * length]), 0)
    source = pack(documents, 4, 512)
    assert len(source) * 2048 == 2 * length
    assert source[len(source) - 1]["mask"].all()
