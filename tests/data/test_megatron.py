"""Megatron's pairs are read as they were written, and synthetic tokens are as many as asked for."""

import struct

import numpy as np
import pytest

from blocktx.data.megatron import SYNTHETIC_CHUNK, read_index, read_megatron, read_synthetic
from blocktx.data.sources import list_parts, read_documents
from tests.helpers.megatron import write_megatron

DOCUMENTS = [[[5, 6, 7]], [[1], [2, 3], []], [[9] * 40], [[]], [[4]]]
FLAT = [[5, 6, 7], [1, 2, 3], [9] * 40, [4]]  # the empty one has no tokens


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "int64"])
@pytest.mark.parametrize("modes", [False, True])
def test_reads_back(tmp_path, dtype, modes):
    write_megatron(tmp_path / "a", DOCUMENTS, dtype, modes)
    assert read_index(str(tmp_path / "a")).dtype == np.dtype(dtype)
    assert [tokens.tolist() for tokens in read_megatron(str(tmp_path / "a"))] == FLAT
    assert [tokens.tolist() for tokens in read_megatron(str(tmp_path / "a"), 1, 3)] == FLAT[1:3]
    for source in (tmp_path, tmp_path / "a.idx", tmp_path / "a.bin", tmp_path / "a"):
        assert [tokens.tolist() for tokens in read_documents(str(source), "text")] == FLAT
    assert len(list_parts(f"{tmp_path}/a.*")) == 1


def test_sequences_may_be_anywhere(tmp_path):
    """Megatron itself reads by the pointers, whatever their order."""
    write_megatron(tmp_path / "a", [[[1, 2]], [[3]]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    start = 34 + 2 * 4
    struct.pack_into("<qq", index, start, 2, 0)
    (tmp_path / "a.idx").write_bytes(index)
    assert [tokens.tolist() for tokens in read_megatron(str(tmp_path / "a"))] == [[2, 3], [1]]


def change(offset, kind, value):
    def changed(index):
        index = bytearray(index)
        struct.pack_into(f"<{kind}", index, offset, value)
        return bytes(index)

    return changed


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda index: b"", "not a Megatron index"),
        (lambda index: b"TNTIDX\x00\x00" + index[8:], "not a Megatron index"),
        (lambda index: index[:-1], "truncated or damaged"),
        (lambda index: index[:40], "truncated or damaged"),
        (lambda index: index + b"123456", "truncated or damaged"),
        (change(9, "Q", 2), "version 2"),
        (change(17, "B", 7), "dtype code 7"),
        (change(17, "B", 4), r"a\.bin: truncated"),
        (change(18, "Q", 1 << 60), "truncated or damaged"),
        (change(34, "i", -3), r"a\.bin: truncated"),
        (change(34, "i", 1000), r"a\.bin: truncated"),
    ],
)
def test_damaged_index_is_named(tmp_path, damage, match):
    write_megatron(tmp_path / "a", DOCUMENTS)
    path = tmp_path / "a.idx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=match):
        list(read_megatron(str(tmp_path / "a")))


def test_boundaries_that_do_not_fit_are_named(tmp_path):
    write_megatron(tmp_path / "a", [[[1]], [[2]]])
    path = tmp_path / "a.idx"
    path.write_bytes(path.read_bytes()[:-8] + struct.pack("<q", 1))
    with pytest.raises(ValueError, match="document boundaries do not cover"):
        list(read_megatron(str(tmp_path / "a")))


def test_missing_and_truncated_bin_is_named(tmp_path):
    write_megatron(tmp_path / "a", DOCUMENTS)
    data = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"a\.bin: truncated: it has {len(data) - 1} bytes"):
        list(read_documents(str(tmp_path), "text"))
    (tmp_path / "a.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.bin"):
        list(read_documents(str(tmp_path), "text"))


def test_bin_of_another_file_or_dtype_is_named(tmp_path):
    write_megatron(tmp_path / "a", DOCUMENTS)
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(b"12")
    with pytest.raises(ValueError, match=r"a\.bin: has 96 bytes, and .*a\.idx tells of 94: it is"):
        list(read_documents(str(tmp_path), "text"))
    write_megatron(tmp_path / "a", DOCUMENTS, "int32")
    index = tmp_path / "a.idx"
    index.write_bytes(change(17, "B", 8)(index.read_bytes()))
    with pytest.raises(ValueError, match="its tokens are not uint16"):
        list(read_documents(str(tmp_path), "text"))


@pytest.mark.parametrize("total", [2, 1999, SYNTHETIC_CHUNK, 2 * SYNTHETIC_CHUNK + 5])
def test_synthetic_tokens(total):
    parts = list_parts(f"synthetic:{total}", part_bytes=SYNTHETIC_CHUNK)
    assert len(parts) == -(-total // SYNTHETIC_CHUNK)
    documents = [d for part in parts for d in read_synthetic(total, 77, part.begin, part.end)]
    assert sum(map(len, documents)) == total
    assert all(1 <= len(document) <= 1999 for document in documents)
    tokens = np.concatenate(documents)
    assert tokens.max() <= 76
    if total > SYNTHETIC_CHUNK:
        assert np.bincount(tokens, minlength=77).min() > 0.9 * total / 77
        assert len(documents) == pytest.approx(total / 1000, rel=0.1)


def test_synthetic_count_is_checked():
    assert list_parts("synthetic:1e3")[0].path == "synthetic:1e3"
    for text in ("", "-5", "many", "1e99", "nan", "inf", "0"):
        with pytest.raises(ValueError, match="expected a number of tokens"):
            list_parts(f"synthetic:{text}")
