"""The same documents give the same batches, in whichever files they are."""

import gzip
import json

import numpy as np
import pytest
import zstandard

from blocktx.config.model import BlockConfig, StackConfig
from blocktx.config.run import DataConfig, RunConfig, TrainingConfig
from blocktx.data import sources, tables, text_files
from blocktx.data.corpus import prepare
from blocktx.data.pipeline import training_batches
from blocktx.data.sources import list_parts, read_documents
from blocktx.data.tokenizer import Tokenizer
from tests.helpers.megatron import write_megatron
from tests.helpers.token_lists import token_lists

STACK = StackConfig(layers=1, width=32, heads=4)
MODEL = BlockConfig(vocab_size=300, context_length=16, block_decoder=STACK, token_decoder=STACK)
TEXTS = [
    f"Document {i}: Grüße, 世界 🙂 <|endoftext|>\n" + "words of it " * (i % 7) for i in range(23)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train(TEXTS, 300, "<|endoftext|>", "<|padding|>").save(path)
    return Tokenizer.load(path, "<|endoftext|>", "<|padding|>"), path


def json_lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def write_text(folder, _):
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def write_json_lines(folder, _):
    (folder / "a.jsonl").write_text(json_lines(TEXTS[:9]))
    (folder / "b.jsonl").write_text(json_lines(TEXTS[9:]))
    return f"{folder}/*.jsonl"


def write_gzip(folder, _):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS).encode()))
    return folder / "a.jsonl.gz"


def write_zstd(folder, _):
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(json_lines(TEXTS).encode()))
    return folder


def write_parquet(folder, _):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, folder / "a.parquet", row_group_size=5)
    return folder


def write_records(folder, records, name="a.array_record"):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return folder


def write_array_record(folder, _):
    return write_records(folder, [text.encode() for text in TEXTS])


def write_array_record_of_json(folder, _):
    return write_records(folder, [json.dumps({"text": text}).encode() for text in TEXTS])


def field(number, data):
    """A length-delimited field of a protocol buffer."""
    size, length = b"", len(data)
    while True:
        size += bytes([(length & 127) | (128 if length > 127 else 0)])
        length >>= 7
        if not length:
            return bytes([number << 3 | 2]) + size + data


def example(text):
    other = field(1, field(1, b"id") + field(2, field(3, field(1, b"\x07"))))
    feature = field(1, field(1, b"text") + field(2, field(1, field(1, text.encode()))))
    return field(1, other + feature)


def write_array_record_of_examples(folder, _):
    return write_records(folder, [example(text) for text in TEXTS])


def write_hub(folder, _):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


def write_hub_by_name(folder, _):
    pytest.importorskip("datasets")
    (folder / "named").mkdir()
    (folder / "named" / "train.jsonl").write_text(json_lines(TEXTS))
    return f"hub:{folder / 'named'}"


def write_pair(folder, tokenizer):
    write_megatron(folder / "a", [[[*tokenizer.encode(t), tokenizer.end_id]] for t in TEXTS])
    return folder


def write_pair_without_ends_in_sequences(folder, tokenizer):
    ids = [tokenizer.encode(text) for text in TEXTS]
    write_megatron(folder / "a", [[part[:4], part[4:]] for part in ids], "int32", modes=True)
    return folder / "a.bin"


WRITERS = [
    write_text,
    write_json_lines,
    write_gzip,
    write_zstd,
    write_parquet,
    write_array_record,
    write_array_record_of_json,
    write_array_record_of_examples,
    write_hub,
    write_hub_by_name,
    write_pair,
    write_pair_without_ends_in_sequences,
]


@pytest.fixture(scope="module")
def batches_of(tokenizer, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def batches(source):
        data = DataConfig(
            source=str(source), tokenizer=str(tokenizer[1]), holdout_every=5, cache_dir=str(cache)
        )
        corpus = prepare(data, 300)
        config = RunConfig(MODEL, data=data, training=TrainingConfig(batch_size=3))
        iterator = training_batches(corpus.train, config, corpus.tokenizer.pad_id)
        return [next(iterator) for _ in range(20)], corpus

    return batches


@pytest.fixture(scope="module")
def wanted(batches_of, tmp_path_factory):
    return batches_of(write_text(tmp_path_factory.mktemp("text"), None))


@pytest.mark.parametrize("write", WRITERS[1:], ids=lambda write: write.__name__)
def test_same_batches(tmp_path, tokenizer, batches_of, wanted, write, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub_cache"))
    batches, corpus = batches_of(write(tmp_path, tokenizer[0]))
    assert token_lists(corpus.heldout) == token_lists(wanted[1].heldout)
    assert corpus.heldout.text_bytes == wanted[1].heldout.text_bytes
    assert corpus.train.documents[0].text_bytes == wanted[1].train.documents[0].text_bytes
    for batch, other in zip(batches, wanted[0], strict=True):
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])
        np.testing.assert_array_equal(batch["mask"], other["mask"])


@pytest.mark.parametrize(
    "write",
    [write_json_lines, write_parquet, write_array_record, write_hub, write_pair],
    ids=lambda write: write.__name__,
)
@pytest.mark.parametrize("part_bytes", [1, 40, 300, 1000])
def test_parts_of_files_have_each_document_once(tmp_path, tokenizer, write, part_bytes):
    source = str(write(tmp_path, tokenizer[0]))
    found, parts = [], list_parts(source, part_bytes)
    for part in parts:
        found += sources.read_part(part, "text")
    assert list(map(list, found)) == list(map(list, read_documents(source, "text")))
    assert len(found) == len(TEXTS)
    assert len(parts) > 1 or part_bytes == 1000


@pytest.mark.parametrize("record", [b"\xff", b"{}"])
def test_bad_records_are_named(tmp_path, record):
    write_records(tmp_path, [*([json.dumps({"text": "a"}).encode()] * 2), record])
    with pytest.raises(ValueError, match=r"a\.array_record, record 3: "):
        list(read_documents(str(tmp_path), "text"))


def test_foreign_and_truncated_files_are_named(tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path, None)
    whole = (tmp_path / "a.parquet").read_bytes()
    for data in (b"", b"no Parquet", whole[:-9], whole[: len(whole) // 2]):
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.parquet: not a"):
            list(read_documents(str(tmp_path), "text"))
    (tmp_path / "a.parquet").unlink()
    write_array_record(tmp_path, None)
    whole = (tmp_path / "a.array_record").read_bytes()
    for data in (b"", b"no records", whole[:-100], whole[: len(whole) // 2]):
        (tmp_path / "a.array_record").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.array_record: not a"):
            list(read_documents(str(tmp_path), "text"))


def test_missing_columns_and_values_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": ["a", None], "id": [1, 2], "raw": [b"\xc3\xa4", b"\xff"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for name, match in [
        ("body", r"a\.parquet: config\.data\.text_field: 'body' is not a column.*'text', 'id'"),
        ("text", r"a\.parquet, row 2: .*is NoneType, not a string"),
        ("id", r"a\.parquet, row 1: .*is int, not a string"),
        ("raw", r"a\.parquet, row 2: not UTF-8 at byte 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            list(read_documents(str(tmp_path), name))
    assert next(read_documents(str(tmp_path), "raw")) == "ä"


@pytest.mark.parametrize(
    ("source", "module", "match"),
    [
        ("a.parquet", "pyarrow", r"pip install -e '\.\[parquet\]'"),
        ("hub:x", "datasets", r"pip install -e '\.\[hub\]'"),
    ],
)
def test_missing_packages_name_the_extra(tmp_path, monkeypatch, source, module, match):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=match):
        list(read_documents(source, "text"))


def test_unknown_datasets_are_named(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"config\.data\.source: cannot read 'hub:/no/such"):
        list(read_documents("hub:/no/such/dataset", "text"))
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises((FileNotFoundError, ValueError), match="Hugging Face dataset"):
        list(read_documents(str(tmp_path), "text"))


def test_long_texts_are_tokenized_in_the_same_pieces(tmp_path, tokenizer, batches_of, monkeypatch):
    """A text file is streamed, a JSON line is not."""
    monkeypatch.setattr(text_files, "_PIECE_CHARACTERS", 50)
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", 37)
    text = "".join(f"Line {i} of a längere text\n" for i in range(300)) + "x" * 400
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json_lines([text]))
    paths = (tmp_path / "t", tmp_path / "a.jsonl")
    found = [token_lists(batches_of(path)[1].train.documents[0]) for path in paths]
    assert found[0] == found[1]
    assert tokenizer[0].decode(found[0][0]) == text


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_pieces_depend_on_the_text_alone_and_words_stay_whole(monkeypatch, size):
    monkeypatch.setattr(text_files, "_PIECE_CHARACTERS", 60)
    text = "".join(f"word{i}\n" if i % 9 == 0 else f"word{i} " for i in range(200))
    whole = list(text_files.pieces(text))
    assert list(text_files.pieces(text[i : i + size] for i in range(0, len(text), size))) == whole
    assert "".join(whole) == text
    assert len(whole) > 5
    assert all(60 <= len(piece) <= 120 for piece in whole[:-1])
    tokenizer = Tokenizer.train([text], 400, "<|endoftext|>", "<|padding|>")
    ids = [id_ for piece in whole for id_ in tokenizer.encode(piece)]
    assert ids == tokenizer.encode(text)


def test_tables_say_what_they_read():
    assert tables._example_text(example("ä" * 300), "text") == ("ä" * 300).encode()
    assert tables._example_text(example("a"), "other") is None
    assert tables._example_text(b"\x0a\xffplain text", "text") is None
