"""A corpus is tokenised whole and split as promised, and its cache is used only when it may be."""

import dataclasses
import os
import pathlib
import time

import numpy as np
import pytest

from blocktx.config.run import DataConfig
from blocktx.data import tokenize_part
from blocktx.data.corpus import prepare
from blocktx.data.disk_cache import cached_folder
from blocktx.data.tokenizer import Tokenizer
from tests.helpers.token_lists import token_lists

VOCAB = 300
TEXTS = [f"document {i} says " + "word " * i for i in range(7)]


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    return DataConfig(source=str(folder), holdout_every=3, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def calls(monkeypatch):
    """Counts what preparing a corpus trains and tokenises."""
    counts = {"train": 0, "encode_batch": 0}
    for name in counts:
        original = getattr(Tokenizer, name)

        def counted(*args, name=name, original=original):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(Tokenizer, name, counted)
    return counts


def texts_of(documents, tokenizer):
    parts = token_lists(documents)
    assert all(part[-1] == tokenizer.end_id for part in parts)
    assert all(tokenizer.end_id not in part[:-1] for part in parts)
    assert documents.token_count == sum(map(len, parts))
    return [tokenizer.decode(part) for part in parts]


def train_of(data):
    (documents,) = data.train.documents
    return documents


def dtype_of(data):
    return train_of(data).read([(0, 1)])[0].dtype


def entries(config):
    return sorted(path.name for path in pathlib.Path(config.cache_dir).iterdir())


def test_every_document_is_there_once_in_order(config):
    data = prepare(config, VOCAB)
    assert texts_of(train_of(data), data.tokenizer) == [TEXTS[i] for i in (0, 1, 3, 4, 6)]
    assert texts_of(data.heldout, data.tokenizer) == [TEXTS[i] for i in (2, 5)]
    assert data.heldout.text_bytes == len(TEXTS[2]) + len(TEXTS[5])
    assert len(train_of(data)) == data.train.document_count == 5
    assert train_of(data).text_bytes + data.heldout.text_bytes == sum(map(len, TEXTS))
    assert dtype_of(data) == np.uint16
    assert train_of(data).offsets.dtype == np.int64


def test_text_bytes_are_bytes(config):
    path = pathlib.Path(config.source, "0.txt")
    path.write_text("Ä世🙂")
    assert (
        prepare(dataclasses.replace(config, source=str(path)), VOCAB).train.documents[0].text_bytes
        == 9
    )


def test_batches_do_not_change_the_result(config, monkeypatch):
    whole = prepare(config, VOCAB)
    monkeypatch.setattr(tokenize_part, "_BATCH_CHARACTERS", 1)
    other = dataclasses.replace(config, cache_dir=config.cache_dir + "2")
    assert token_lists(train_of(prepare(other, VOCAB))) == token_lists(train_of(whole))


@pytest.mark.parametrize(
    ("documents", "every", "heldout"),
    [
        (1, 20, []),
        (2, 20, [1]),
        (5, 20, [4]),
        (4, 4, [3]),
        (5, 4, [3]),
        (7, 2, [1, 3, 5]),
        (7, 0, []),
        (1, 2, []),
    ],
)
def test_split(config, documents, every, heldout):
    for i in range(documents, len(TEXTS)):
        pathlib.Path(config.source, f"{i}.txt").unlink()
    data = prepare(dataclasses.replace(config, holdout_every=every), VOCAB)
    assert texts_of(data.heldout, data.tokenizer) == [TEXTS[i] for i in heldout]
    expected = [TEXTS[i] for i in range(documents) if i not in heldout]
    assert texts_of(train_of(data), data.tokenizer) == expected


def test_tokenizer_is_trained_on_training_documents_only(config, monkeypatch):
    seen = []
    original = Tokenizer.train

    def spy(documents, *args):
        seen.extend(documents)
        return original(seen, *args)

    monkeypatch.setattr(Tokenizer, "train", spy)
    prepare(config, VOCAB)
    assert seen == [TEXTS[i] for i in (0, 1, 3, 4, 6)]


def test_digest_tells_documents_and_their_split_from_others(config):
    digest = prepare(config, VOCAB).digest
    again = dataclasses.replace(config, cache_dir=config.cache_dir + "2")
    assert prepare(again, VOCAB).digest == digest
    tokenizer = next(pathlib.Path(config.cache_dir).glob("*/tokenizer.json"))
    fixed = dataclasses.replace(config, tokenizer=str(tokenizer))
    assert prepare(fixed, VOCAB).digest == digest
    assert prepare(dataclasses.replace(fixed, holdout_every=2), VOCAB).digest != digest
    (pathlib.Path(config.source) / "2.txt").write_text(TEXTS[2] + "!")  # held out
    assert prepare(fixed, VOCAB).digest != digest


def test_second_call_reads_the_cache(config, calls):
    first = prepare(config, VOCAB)
    once = dict(calls)
    assert once == {"train": 1, "encode_batch": 1}
    second = prepare(config, VOCAB)
    assert calls == once
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    for a, b in ((train_of(first), train_of(second)), (first.heldout, second.heldout)):
        assert token_lists(a) == token_lists(b)
        assert a.text_bytes == b.text_bytes


def test_settings_that_do_not_matter_share_the_cache(config, calls):
    prepare(config, VOCAB)
    prepare(dataclasses.replace(config, random_padding=False), VOCAB)
    assert calls == {"train": 1, "encode_batch": 1}


def other_tokenizer(config):
    path = pathlib.Path(config.source).parent / "other.json"
    Tokenizer.train(["other text"], 270, config.end_token, config.pad_token).save(path)
    return dataclasses.replace(config, tokenizer=str(path))


def edited(config):
    pathlib.Path(config.source, "3.txt").write_text("edited")
    return config


def grown(config):
    pathlib.Path(config.source, "9.txt").write_text("a new one")
    return config


@pytest.mark.parametrize(
    ("change", "trains"),
    [
        (edited, 1),
        (grown, 1),
        (other_tokenizer, 0),
        (lambda config: dataclasses.replace(config, text_field="body"), 1),
        (lambda config: dataclasses.replace(config, end_token="<end>"), 1),
        (lambda config: dataclasses.replace(config, pad_token="<pad>"), 1),
    ],
)
def test_every_change_that_matters_is_noticed(config, calls, change, trains):
    prepare(config, VOCAB)
    assert calls == {"train": 1, "encode_batch": 1}
    changed = change(config)
    calls.update(train=0, encode_batch=0)
    cached = prepare(changed, VOCAB)
    assert calls == {"train": trains, "encode_batch": 1}
    fresh = prepare(dataclasses.replace(changed, cache_dir=config.cache_dir + "2"), VOCAB)
    assert token_lists(train_of(cached)) == token_lists(train_of(fresh))
    assert token_lists(cached.heldout) == token_lists(fresh.heldout)


def test_other_vocab_size_trains_another_tokenizer(config):
    assert prepare(config, 300).tokenizer.vocab_size != prepare(config, 270).tokenizer.vocab_size


def test_end_token_of_a_loaded_tokenizer_is_noticed(config):
    config = other_tokenizer(config)
    first = prepare(config, VOCAB)
    swapped = dataclasses.replace(config, end_token=config.pad_token)
    assert token_lists(train_of(first))[0][-1] == 0
    assert token_lists(train_of(prepare(swapped, VOCAB)))[0][-1] == 1


def test_another_split_of_a_loaded_tokenizer_reads_the_cache(config, calls):
    config = other_tokenizer(config)
    first = prepare(config, VOCAB)
    calls.update(train=0, encode_batch=0)
    second = prepare(dataclasses.replace(config, holdout_every=2), VOCAB)
    assert calls == {"train": 0, "encode_batch": 0}
    assert texts_of(second.heldout, second.tokenizer) == [TEXTS[i] for i in (1, 3, 5)]
    assert second.digest != first.digest


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
def test_damaged_cache_is_never_used(config, damage):
    good = prepare(config, VOCAB)
    tokens, names = token_lists(train_of(good)), entries(config)
    files = [path for path in pathlib.Path(config.cache_dir).rglob("[!.]*") if path.is_file()]
    assert len(files) == 8
    for path in files:
        damage(path)
        again = prepare(config, VOCAB)
        assert token_lists(train_of(again)) == tokens, path
        assert entries(config) == names


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_preparation_leaves_nothing(config, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train", fail)
        with pytest.raises(error):
            prepare(config, VOCAB)
        assert entries(config) == []
    monkeypatch.setattr(tokenize_part, "_BATCH_CHARACTERS", 1)
    with monkeypatch.context() as patch:
        original, done = Tokenizer.encode_batch, []

        def fail_later(self, texts):
            done.extend(texts)
            return original(self, texts) if len(done) < 4 else fail()

        patch.setattr(Tokenizer, "encode_batch", fail_later)
        with pytest.raises(error):
            prepare(config, VOCAB)
        assert len(entries(config)) == 1  # the tokenizer, which is whole
    assert prepare(config, VOCAB).train.document_count == 5


@pytest.mark.parametrize(("hours", "left"), [(23, True), (25, False)])
def test_what_a_killed_preparation_left_is_removed_a_day_later(config, hours, left):
    folder = pathlib.Path(config.cache_dir) / ".unfinished-old"
    (folder / "unfinished").mkdir(parents=True)
    (folder / "unfinished" / "train.tokens").touch()
    long_ago = time.time() - 1e6
    os.utime(folder, (long_ago, long_ago))
    os.utime(folder / "unfinished", (long_ago, long_ago))
    os.utime(folder / "unfinished" / "train.tokens", (time.time() - hours * 3600,) * 2)
    prepare(config, VOCAB)
    assert folder.exists() == left


def test_bad_source_leaves_nothing(config):
    pathlib.Path(config.source, "5.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"5\.txt: not UTF-8 at byte 0"):
        prepare(config, VOCAB)
    assert entries(config) == []


def test_tokenizer_too_large_for_the_model(config):
    with pytest.raises(ValueError, match=r"config\.model\.vocab_size: 100 .* 258 ids.* use 258 or"):
        prepare(config, 100)


def test_large_vocabularies_take_four_bytes(config, monkeypatch):
    monkeypatch.setattr(Tokenizer, "vocab_size", (1 << 16) + 1)
    data = prepare(config, 1 << 17)
    assert dtype_of(data) == np.uint32
    assert texts_of(train_of(data), data.tokenizer)[0] == TEXTS[0]


@pytest.mark.parametrize("place", ["gs://bucket/cache", "{}/file/cache"])
def test_cache_that_cannot_be_written(config, tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"config\.data\.cache_dir: "):
        prepare(dataclasses.replace(config, cache_dir=place.format(tmp_path)), VOCAB)


@pytest.mark.parametrize("broken_before", [False, True])
def test_two_processes_that_build_at_once_both_end_well(tmp_path, broken_before):
    key, cache_dir = {"a": 1}, str(tmp_path / "cache")

    def build(text):
        return lambda folder: (folder / "file").write_text(text)

    if broken_before:
        flip(cached_folder(cache_dir, key, build("broken")) / "file")

    def slower(folder):
        build("slower")(folder)
        assert (cached_folder(cache_dir, key, build("faster")) / "file").read_text() == "faster"

    folder = cached_folder(cache_dir, key, slower)
    assert (folder / "file").read_text() == "faster"
    assert list(folder.parent.iterdir()) == [folder]
