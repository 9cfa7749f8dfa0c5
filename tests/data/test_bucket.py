"""Sources and shards in a bucket of Google Cloud, served on this machine."""

import dataclasses
import json
import time

import numpy as np
import pytest
import zstandard
from etils import epath

from blocktx.config.run import DataConfig
from blocktx.data import folder_lock, preparation, tokenize_part
from blocktx.data.corpus import prepare
from blocktx.data.pipeline import training_batches
from blocktx.data.preparation import prepare_folder
from blocktx.data.sources import read_documents
from blocktx.data.tokenizer import Tokenizer
from blocktx.files import list_files
from blocktx.train.loop import train
from blocktx.train.metrics import read
from tests.data.test_formats import write_array_record, write_pair, write_parquet
from tests.helpers.gcs_server import gcs_server
from tests.helpers.tiny_run import run_config
from tests.helpers.token_lists import token_lists

TEXTS = [f"document {i}: " + "block token context " * (i % 9) for i in range(60)]


@pytest.fixture(scope="module")
def bucket():
    with gcs_server():
        yield epath.Path("gs://bucket")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300, "<|endoftext|>", "<|padding|>")


@pytest.fixture(scope="module")
def raw(bucket, tmp_path_factory):
    """The same files in the bucket and on disk; both folders."""
    local = tmp_path_factory.mktemp("raw")
    for i in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[20 * i : 20 * i + 20])
        (local / f"pile-{i}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (local / "below").mkdir()
    (local / "below" / "a.txt").write_text("a text file")
    for path in local.rglob("*.*"):
        (bucket / "raw" / path.relative_to(local)).write_bytes(path.read_bytes())
    return bucket / "raw", local


@pytest.fixture(scope="module")
def prepared(bucket, raw, tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_part, "_SHARD_TOKENS", 200)
        prepare_folder([str(raw[0])], tokenizer, bucket / "pile", part_bytes=100)
    return bucket / "pile"


@pytest.mark.parametrize("pattern", ["", "/pile-*.jsonl.zst", "/pile-[12].jsonl.zst", "/below"])
def test_sources_are_those_on_disk(raw, pattern):
    found = [list(read_documents(f"{folder}{pattern}", "text")) for folder in raw]
    assert found[0] == found[1]


def test_missing_sources_are_named(raw, bucket):
    with pytest.raises(FileNotFoundError, match=r"no file matches 'gs://bucket/raw/x\*'"):
        list(read_documents(f"{raw[0]}/x*", "text"))
    with pytest.raises(FileNotFoundError, match="'gs://bucket/nothing' does not exist"):
        list(read_documents(str(bucket / "nothing"), "text"))


@pytest.mark.parametrize("write", [write_parquet, write_array_record, write_pair])
def test_other_formats(bucket, tmp_path, tokenizer, write):
    write(tmp_path, tokenizer)
    folder = bucket / write.__name__
    for path in tmp_path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    found = [list(map(list, read_documents(str(f), "text"))) for f in (folder, tmp_path)]
    assert found[0] == found[1]


def test_shards_are_those_on_disk(prepared, raw, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_part, "_SHARD_TOKENS", 200)
    prepare_folder([str(raw[1])], tokenizer, tmp_path, part_bytes=100)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert {path.name: path.read_bytes() for path in (prepared / "shards").iterdir()} == shards
    assert len(shards) > 4
    found = [prepare(DataConfig(source=f"prepared:{f}"), 300) for f in (prepared, tmp_path)]
    assert found[0].digest == found[1].digest
    config = run_config(DataConfig(source="unused"), batch_size=4)
    batches = [training_batches(corpus.train, config, tokenizer.pad_id) for corpus in found]
    for _ in range(10):
        ours, wanted = map(next, batches)
        np.testing.assert_array_equal(ours["tokens"], wanted["tokens"])


def contents(folder):
    """The objects of a folder in the bucket, by name."""
    paths = [epath.Path(file.path) for file in list_files(folder, ("",))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("writes", [0, 1, 3, 6])
def test_interrupted_and_finished(prepared, bucket, raw, tokenizer, monkeypatch, writes):
    left, original = [writes], tokenize_part.write_atomic

    def write(*args):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        original(*args)

    monkeypatch.setattr(tokenize_part, "_SHARD_TOKENS", 200)
    folder = bucket / f"interrupted-{writes}"
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_part, "write_atomic", write)
        with pytest.raises(Stopped):
            prepare_folder([str(raw[0])], tokenizer, folder, part_bytes=100)
    assert not (folder / "manifest.json").exists()
    prepare_folder([str(raw[0])], tokenizer, folder, part_bytes=100)
    assert contents(folder) == contents(prepared)


def test_two_at_once(bucket, raw, tokenizer, monkeypatch):
    folder = bucket / "at_once"

    def work(*_):
        monkeypatch.setattr(folder_lock, "_has_ended", lambda _: False)
        with pytest.raises(ValueError, match=r"another process is preparing it .*try again in 1"):
            prepare_folder([str(raw[0])], tokenizer, folder)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_tokenize", work)
        with pytest.raises(Stopped):
            prepare_folder([str(raw[0])], tokenizer, folder)
    # What a process on another host has left counts for two minutes.
    lock = folder / ".lock-0-of-1"
    holder = {"host": "another", "pid": 1, "id": "x", "time": time.time() - 119}
    lock.write_text(json.dumps(holder))
    with pytest.raises(ValueError, match="process 1 on another"):
        prepare_folder([str(raw[0])], tokenizer, folder)
    lock.write_text(json.dumps(holder | {"time": time.time() - 121}))
    assert prepare_folder([str(raw[0])], tokenizer, folder) is not None
    assert not lock.exists()


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda data: data[:10] + bytes([data[10] ^ 1]) + data[11:], ValueError, "its SHA-256"),
        (lambda data: data[:-1], ValueError, "it has .* bytes, expected"),
        (lambda data: None, FileNotFoundError, "missing, although the manifest"),
    ],
)
def test_damaged_shards_are_named(bucket, prepared, damage, error, match):
    folder = bucket / "damaged"
    for name, content in contents(prepared).items():
        (folder / name).write_bytes(content)
    shard = sorted((folder / "shards").iterdir())[1]
    data = damage(shard.read_bytes())
    shard.unlink()
    if data is not None:
        shard.write_bytes(data)
    with pytest.raises(error, match=rf"{shard}: .*{match}"):
        token_lists(prepare(DataConfig(source=f"prepared:{folder}"), 300).train.documents[0])


def test_run_from_a_bucket_is_the_run_from_disk(finished, bucket, tmp_path):
    """The run of `finished`, with its corpus in the bucket, prepared there."""
    config, workdir, _ = finished
    special = (config.data.end_token, config.data.pad_token)
    tokenizer = Tokenizer.load(workdir / "tokenizer.json", *special)
    for path in epath.Path(config.data.source).iterdir():
        (bucket / "corpus" / path.name).write_bytes(path.read_bytes())
    prepare_folder(["gs://bucket/corpus"], tokenizer, "gs://bucket/prepared")
    data = dataclasses.replace(config.data, source="prepared:gs://bucket/prepared")
    train(dataclasses.replace(config, data=data), tmp_path / "run")
    losses = [[line.get("train/loss") for line in read(f)] for f in (tmp_path / "run", workdir)]
    assert losses[0] == losses[1]
