"""Files made to hang, fill memory or repeat are refused, or read in bounded memory."""

import gzip
import json
import os
import tracemalloc
import zlib

import pytest
import zstandard

from blocktx.data import text_files
from blocktx.data.sources import fingerprint, read_documents
from blocktx.data.text_files import pieces, read_bytes


def read(path):
    return ["".join(pieces(document)) for document in read_documents(str(path), "text")]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "below" / "b.txt").write_text("b")
    return folder


def test_symlink_cycles_repeat_nothing(corpus):
    (corpus / "loop").symlink_to(".")
    (corpus / "below" / "up").symlink_to("..")
    (corpus / "other").symlink_to("below")
    (corpus / "self").symlink_to("self")  # cannot be resolved, and ends in no known suffix
    assert read(corpus) == ["a", "b"]
    assert len(fingerprint(str(corpus))["files"]) == 2


def test_linked_files_and_folders_are_read(corpus, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "folder").symlink_to(corpus / "below")
    (tmp_path / "linked" / "file.txt").symlink_to(corpus / "a.txt")
    assert read(tmp_path / "linked") == ["a", "b"]


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jsonl", "pipe.parquet", "pipe.idx"])
def test_pipes_do_not_hang(corpus, name):
    os.mkfifo(corpus / name)
    for source in (corpus, corpus / name, f"{corpus}/pipe*"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"not a regular file|\.bin"):
            read(source)
    os.rename(corpus / name, corpus / "pipe.other")  # of no interest
    assert read(corpus) == ["a", "b"]


def test_devices_do_not_hang(corpus):
    with pytest.raises(ValueError, match="/dev/zero: not a regular file"):
        read("/dev/zero")
    (corpus / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"zero\.txt: not a regular file"):
        read(corpus)


def bomb(suffix, size):
    """A few bytes that decompress to `size` zeros."""
    if suffix == ".zst":
        compressor = zstandard.ZstdCompressor().compressobj()
        return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)) + (
            compressor.flush()
        )
    compressor = zlib.compressobj(9, wbits=31)
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)) + (
        compressor.flush()
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_decompression_is_bounded(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(bomb(suffix, 200 << 20))
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    total = sum(len(piece) for piece in read_bytes(str(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 200 << 20
    assert peak < 64 << 20


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_line_without_end_is_an_error(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(text_files, "_MAX_LINE_BYTES", 16 << 20)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(bomb(suffix, 50 << 20))
    with pytest.raises(ValueError, match=r"a\.jsonl\.\w+: a line of more than 16 MiB"):
        read(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_chunks_change_nothing(tmp_path, monkeypatch, compress, size):
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", size)
    monkeypatch.setattr(text_files, "_ZSTD_INPUT_BYTES", 3)
    text = "Zeile ä\n" * 50
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[compress]
    path = tmp_path / f"a.txt{suffix}"
    # Members of all sizes in a row, an empty one among them.
    data = [text[: 9 * i] for i in (1, 0, 20, 50)]
    path.write_bytes(b"".join(compress(part.encode()) for part in data))
    assert read(path) == ["".join(data)]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": ' + "[" * 200_000,
        '{"text": "a", "n": ' + "9" * 100_000 + "}",
        '{"text": 1e999999}',
        "[" * 200_000 + "]" * 200_000,
        '{"' + "x" * 1000 + '": 1}',
        "\x00" * 100,
        "{" + ", ".join(f'"field{i}": 1' for i in range(100_000)) + "}",
    ],
)
def test_hostile_json_is_one_short_message(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: ") as e:
        read(path)
    assert len(str(e.value)) < 3000


def test_text_of_many_chunks_is_checked_before_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "ä".encode() * 100)
    assert read(tmp_path / "a.txt") == ["ä" * 100]
    for place in (5, 10, 99, 150):
        data = bytearray("ä".encode() * 100)
        data[2 * (place // 2)] = 0xFF
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(ValueError, match=rf"a\.txt: not UTF-8 at byte {2 * (place // 2)} "):
            read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("ä".encode() * 100 + b"\xc3")
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 200 \(unexpected end"):
        read(tmp_path / "a.txt")


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for size in (8, 32):
        (tmp_path / "a.txt").write_text("some words of it\n" * (size << 20 >> 4))
        tracemalloc.start()
        for document in read_documents(str(tmp_path / "a.txt"), "text"):
            assert sum(map(len, pieces(document))) > size << 20
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 30 << 20
