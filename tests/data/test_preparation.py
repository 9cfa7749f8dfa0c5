"""Shards do not depend on who writes them, nor on interruptions; nothing half-written counts."""

import dataclasses
import errno
import itertools
import json
import os
import pathlib
import random
import shutil

import pytest

from blocktx.config.errors import UserError
from blocktx.config.run import DataConfig
from blocktx.data import preparation, shards, tokenize_part
from blocktx.data.corpus import prepare
from blocktx.data.manifest import Manifest
from blocktx.data.pipeline import training_batches
from blocktx.data.preparation import prepare_folder
from blocktx.data.shards import ShardedTokens
from blocktx.data.tokenizer import Tokenizer
from tests.helpers.megatron import write_megatron
from tests.helpers.tiny_run import run_config
from tests.helpers.token_lists import token_lists

WORDS = ["block", "token", "context", "lookup", "prefix", "cache", "Grüße", "世界"]


def texts(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 30))) for _ in range(count)]


def write_json_lines(path, lines):
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_json_lines(folder / "a.jsonl", texts(300))
    write_json_lines(folder / "b.jsonl", texts(40, seed=1))
    for i, text in enumerate(texts(20, seed=2)):
        (folder / f"c{i:02d}.txt").write_text(text)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(texts(50), 300, "<|endoftext|>", "<|padding|>")


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_part, "_BATCH_CHARACTERS", 500)
        patch.setattr(tokenize_part, "_SHARD_TOKENS", 1000)
        yield


def files(folder):
    """The contents of a prepared folder, by name."""
    found = {
        os.fspath(path.relative_to(folder)): path.read_bytes()
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }
    assert not [name for name in found if "tmp" in name]
    return found


@pytest.fixture(scope="module")
def wanted(source, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wanted")
    prepare_folder([source], tokenizer, folder, part_bytes=4000)
    return folder


def test_what_is_written(wanted, source, tokenizer):
    manifest = Manifest.load(wanted)
    assert manifest.documents == 360
    assert len(manifest.shards) > 5
    assert len(list((wanted / "parts").iterdir())) > 5
    assert manifest.tokenizer["fingerprint"] == tokenizer.fingerprint
    indices = list(ShardedTokens([(wanted, manifest)]).indices())
    assert sum(int(lengths.sum()) for lengths, _ in indices) == manifest.tokens
    data = DataConfig(source=f"prepared:{wanted}", holdout_every=0)
    (documents,) = prepare(data, 300).train.documents
    found = [tokenizer.decode(ids) for ids in token_lists(documents)]
    assert found == [*texts(300), *texts(40, seed=1), *texts(20, seed=2)]
    assert manifest.text_bytes == sum(len(text.encode()) for text in found)


def test_a_second_call_does_nothing(wanted, source, tokenizer, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in wanted.rglob("[!.]*")}
    monkeypatch.setattr(preparation, "tokenize_part_of", None)
    manifest = prepare_folder([source], tokenizer, wanted, part_bytes=4000)
    assert manifest == Manifest.load(wanted)
    assert {path: path.stat().st_mtime_ns for path in wanted.rglob("[!.]*")} == before


@pytest.mark.parametrize("tasks", [2, 5, 40])
def test_tasks_write_what_one_does(wanted, source, tokenizer, tmp_path, tasks):
    order = random.Random(tasks).sample(range(tasks), tasks)
    for i in order:
        found = prepare_folder([source], tokenizer, tmp_path, part_bytes=4000, task=(i, tasks))
        assert (found is None) == (i != order[-1])
    assert files(tmp_path) == files(wanted)


def test_batches_and_several_sources_do_not_change_the_documents(
    wanted, source, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(tokenize_part, "_BATCH_CHARACTERS", 1)
    folder = pathlib.Path(source)
    specs = [str(folder / "a.jsonl"), str(folder / "b.jsonl"), f"{folder}/c*.txt"]
    prepare_folder(specs, tokenizer, tmp_path, part_bytes=1 << 30)
    all_of = [
        token_lists(prepare(DataConfig(source=f"prepared:{f}"), 300).train.documents[0])
        for f in (tmp_path, wanted)
    ]
    assert all_of[0] == all_of[1]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("writes", range(0, 27, 2))
def test_interrupted_anywhere(wanted, source, tokenizer, tmp_path, writes, monkeypatch):
    """Whatever file was the last to be written."""
    left = [writes]

    def counted(original):
        def write(*args):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return original(*args)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_part, "write_atomic", counted(tokenize_part.write_atomic))
        patch.setattr(shards.ShardWriter, "publish", counted(shards.ShardWriter.publish))
        with pytest.raises(Killed):
            prepare_folder([source], tokenizer, tmp_path, part_bytes=4000)
    with pytest.raises(FileNotFoundError, match=r"is not finished: there is no .*manifest\.json"):
        prepare(DataConfig(source=f"prepared:{tmp_path}"), 300)
    prepare_folder([source], tokenizer, tmp_path, part_bytes=4000)
    assert files(tmp_path) == files(wanted)


def test_what_a_killed_process_left_is_removed(wanted, source, tokenizer, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".00000-abc.tmp").write_bytes(b"half")
    (tmp_path / "shards" / "00000-000.bin").write_bytes(b"not recorded")
    prepare_folder([source], tokenizer, tmp_path, part_bytes=4000)
    assert files(tmp_path) == files(wanted)


def bad_source(tmp_path):
    lines = [json.dumps({"text": text}).encode() for text in texts(60)]
    lines[10], lines[20], lines[50] = b"{broken", b'{"text": "\xff"}', b'{"body": 1}'
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "worse.txt").write_bytes(b"\xff")
    return [str(tmp_path / "bad.jsonl"), str(tmp_path / "worse.txt")]


@pytest.mark.parametrize("part_bytes", [500, 1 << 20])
def test_bad_documents_stop_or_are_skipped_and_listed(tokenizer, tmp_path, part_bytes):
    specs, out = bad_source(tmp_path), tmp_path / "out"
    match = r"bad\.jsonl, line 11: not JSON.*--skip_bad=N"
    with pytest.raises(ValueError, match=match):
        prepare_folder(specs, tokenizer, out, part_bytes=part_bytes)
    for _ in range(2):  # another call does not forget those before
        with pytest.raises(ValueError, match=r"worse\.txt: not UTF-8.*\(3 were skipped before"):
            prepare_folder(specs, tokenizer, tmp_path / "3", part_bytes=part_bytes, skip_bad=3)
    assert not (tmp_path / "3" / "manifest.json").exists()
    manifest = prepare_folder(specs, tokenizer, out, part_bytes=part_bytes, skip_bad=4)
    assert manifest.bad_count == len(manifest.bad_documents) == 4
    assert manifest.documents == 57
    for message, place in zip(manifest.bad_documents, (11, 21, 51), strict=False):
        assert f"bad.jsonl, line {place}: " in message
    clean = prepare_folder(specs, tokenizer, tmp_path / "clean", part_bytes=part_bytes, skip_bad=9)
    assert clean == manifest


def test_nothing_but_blank_documents(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="nothing but blank documents"):
        prepare_folder([str(tmp_path / "a.txt")], tokenizer, tmp_path / "out")


def other_tokenizer(changed):
    other = Tokenizer.train(["other"], 270, "<|endoftext|>", "<|padding|>")
    return dict(changed, tokenizer=other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (other_tokenizer, "tokenizer was '"),
        (lambda c: dict(c, text_field="body"), "text_field was 'text', is 'body'"),
        (lambda c: dict(c, part_bytes=5000), "part_bytes was 4000, is 5000"),
        (lambda c: dict(c, sources=[f"{c['sources'][0]}/a.jsonl"]), "sources was"),
    ],
)
def test_folder_of_another_preparation(wanted, source, tokenizer, change, match):
    settings = dict(sources=[source], tokenizer=tokenizer, text_field="text", part_bytes=4000)
    before = files(wanted)
    with pytest.raises(ValueError, match=rf"--output: .*holds another preparation: .*{match}"):
        prepare_folder(folder=wanted, **change(settings))
    assert files(wanted) == before


def test_sources_that_changed_between_calls(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    write_json_lines(path, texts(5))
    prepare_folder([str(path)], tokenizer, tmp_path / "out")
    write_json_lines(path, texts(6))
    with pytest.raises(ValueError, match="holds another preparation: files was"):
        prepare_folder([str(path)], tokenizer, tmp_path / "out")


def test_two_at_once(source, tokenizer, tmp_path, monkeypatch):
    def report(*_):
        with pytest.raises(ValueError, match=r"another process is preparing it \(task 0/1\)"):
            prepare_folder([source], tokenizer, tmp_path, part_bytes=4000)
        raise Killed

    monkeypatch.setattr(preparation, "_tokenize", report)
    with pytest.raises(Killed):
        prepare_folder([source], tokenizer, tmp_path, part_bytes=4000)
    monkeypatch.undo()
    assert prepare_folder([source], tokenizer, tmp_path, part_bytes=4000) is not None


def test_full_disk(source, tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "_write", full)
        with pytest.raises(OSError, match=rf"--output: cannot write to {tmp_path}: No space left"):
            prepare_folder([source], tokenizer, tmp_path, part_bytes=4000)
        data = DataConfig(source=source, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(
            ValueError, match=r"config\.data\.cache_dir: cannot write to .*No space"
        ):
            prepare(data, 300)
    assert list((tmp_path / "shards").iterdir()) == []
    assert list((tmp_path / "parts").iterdir()) == []


def damaged(wanted, tmp_path, damage):
    """A copy of the folder with one shard changed, as a config."""
    folder = tmp_path / "copy"
    shutil.copytree(wanted, folder)
    shard = sorted((folder / "shards").iterdir())[2]
    damage(shard)
    return shard, DataConfig(source=f"prepared:{folder}", holdout_every=0)


def flip(place):
    def flipped(path):
        data = bytearray(path.read_bytes())
        data[place] ^= 16
        path.write_bytes(data)

    return flipped


def test_flipped_bits_are_found_when_a_shard_is_first_read(wanted, tmp_path):
    shard, data = damaged(wanted, tmp_path, flip(10))
    corpus = prepare(data, 300)  # reads no tokens
    with pytest.raises(ValueError, match=rf"{shard}: damaged: its SHA-256"):
        token_lists(corpus.train.documents[0])
    trusting = prepare(dataclasses.replace(data, verify_shards=False), 300)
    token_lists(trusting.train.documents[0])


def test_damage_ends_training_with_an_error_for_a_person(wanted, tmp_path):
    shard, data = damaged(wanted, tmp_path, flip(10))
    corpus = prepare(data, 300)
    config = run_config(data, batch_size=8)
    batches = training_batches(corpus.train, config, corpus.tokenizer.pad_id)
    with pytest.raises(UserError, match=rf"{shard}: damaged"):
        list(itertools.islice(batches, 50))


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (flip(-1), ValueError, "damaged: the SHA-256 of its index"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), ValueError, "damaged: it has .* expected"),
        (lambda p: p.write_bytes(b""), ValueError, "damaged: it has 0 bytes"),
        (lambda p: p.unlink(), FileNotFoundError, "missing, although the manifest"),
    ],
)
def test_damage_that_is_found_at_the_start(wanted, tmp_path, damage, error, match):
    shard, data = damaged(wanted, tmp_path, damage)
    with pytest.raises(error, match=rf"{shard}: {match}"):
        prepare(data, 300)


def test_shard_that_shrinks_later(wanted, tmp_path):
    shard, data = damaged(wanted, tmp_path, lambda path: None)
    corpus = prepare(dataclasses.replace(data, verify_shards=False), 300)
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(ValueError, match=rf"{shard}: damaged: it ends before byte"):
        token_lists(corpus.train.documents[0])


@pytest.mark.parametrize("seed", range(8))
def test_damaged_manifest(wanted, tmp_path, seed):
    rng = random.Random(seed)
    data = bytearray((wanted / "manifest.json").read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (tmp_path / "manifest.json").write_bytes(data)
    path, same = tmp_path / "manifest.json", False
    try:
        # It may be in white space, or in a count that follows from the others.
        same = Manifest.load(tmp_path) == Manifest.load(wanted)
    except ValueError as error:
        same = str(path) in str(error)
    assert same
    for text in ("", "[]", "[" * 200_000, '{"format": 99}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json: (damaged|format 99)"):
            Manifest.load(tmp_path)


def test_prepared_with_another_tokenizer_or_vocabulary(wanted, tmp_path):
    other = tmp_path / "other.json"
    Tokenizer.train(["other"], 270, "<|endoftext|>", "<|padding|>").save(other)
    data = DataConfig(source=f"prepared:{wanted}")
    with pytest.raises(ValueError, match="was prepared with another tokenizer"):
        prepare(dataclasses.replace(data, tokenizer=str(other)), 300)
    with pytest.raises(ValueError, match=r"config\.model\.vocab_size: 200 is less than"):
        prepare(data, 200)
    with pytest.raises(ValueError, match=r"config\.data\.end_token"):
        prepare(dataclasses.replace(data, end_token="<|padding|>"), 300)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        prepare(dataclasses.replace(data, source=f"prepared:{tmp_path}/no"), 300)
    with pytest.raises(ValueError, match=rf"use prepared:{wanted}"):
        prepare(dataclasses.replace(data, source=str(wanted)), 300)


def test_tokens_of_another_tokenizer(tokenizer, tmp_path):
    write_megatron(tmp_path / "a", [[[5, 299]], [[301]]])
    with pytest.raises(
        ValueError, match=r"a: a token has id 301, and the tokenizer's ids are 0 to"
    ):
        prepare_folder([str(tmp_path)], tokenizer, tmp_path / "out")


def test_index_takes_8_bytes_a_document(wanted):
    manifest = Manifest.load(wanted)
    on_disk = sum(path.stat().st_size for path in (wanted / "shards").iterdir())
    assert on_disk == 2 * manifest.tokens + 8 * manifest.documents
    corpus = prepare(DataConfig(source=f"prepared:{wanted}"), 300)
    assert corpus.train.documents[0].offsets.nbytes == 8 * (manifest.documents + 1)


def test_an_open_shard_is_closed_when_the_interpreter_has_forgotten_its_modules(
    tmp_path, monkeypatch
):
    (tmp_path / "shard").write_bytes(b"tokens")
    file = shards._File(tmp_path / "shard")
    monkeypatch.setattr(shards, "os", None)
    file.__del__()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file._descriptor)
    del file._descriptor
