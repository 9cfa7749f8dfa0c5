"""A run's data from several sources, prepared or not, and held-out documents of their own."""

import dataclasses
import json

import pytest

from blocktx.config.run import DataConfig
from blocktx.data.corpus import prepare, read_in_memory
from blocktx.data.preparation import prepare_folder
from blocktx.data.sources import parse_sources
from blocktx.data.tokenizer import Tokenizer
from tests.helpers.megatron import write_megatron
from tests.helpers.token_lists import token_lists

TEXTS = {name: [f"{name} {i} " + "word " * i for i in range(6)] for name in "abc"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a b c word 0123456789"], 280, "<|endoftext|>", "<|padding|>")


@pytest.fixture
def config(tmp_path, tokenizer):
    for name, texts in TEXTS.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    prepare_folder([str(tmp_path / "c.jsonl")], tokenizer, tmp_path / "c")
    tokenizer.save(tmp_path / "tokenizer.json")
    return DataConfig(
        source=f"{tmp_path}/a.jsonl",
        tokenizer=str(tmp_path / "tokenizer.json"),
        holdout_every=3,
        cache_dir=str(tmp_path / "cache"),
    )


def sources(tmp_path, *weights):
    specs = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl", f"prepared:{tmp_path}/c"]
    return ",".join(f"{s}@{w}" if w else s for s, w in zip(specs, weights, strict=True))


def texts_of(documents, tokenizer):
    return [tokenizer.decode(ids) for ids in token_lists(documents)]


@pytest.mark.parametrize("weights", [(None,) * 3, (2, 1, 1), (".5", "0.3", "0.2")])
def test_several_sources(config, tmp_path, tokenizer, weights):
    data = prepare(dataclasses.replace(config, source=sources(tmp_path, *weights)), 300)
    for documents, texts in zip(data.train.documents, TEXTS.values(), strict=True):
        assert texts_of(documents, tokenizer) == [texts[i] for i in (0, 1, 3, 4)]
        assert documents.text_bytes == sum(len(texts[i]) for i in (0, 1, 3, 4))
    held = [texts[i] for texts in TEXTS.values() for i in (2, 5)]
    assert texts_of(data.heldout, tokenizer) == held
    assert [tokenizer.decode(data.heldout[i].tolist()) for i in range(-6, 6)] == held * 2
    assert data.heldout.text_bytes == sum(map(len, held))
    amounts = [float(w) for w in weights if w] or [d.token_count for d in data.train.documents]
    assert data.train.weights == pytest.approx([a / sum(amounts) for a in amounts])
    assert [name.rpartition("/")[2] for name in data.train.names] == ["a.jsonl", "b.jsonl", "c"]


def test_weights_and_order_are_in_the_digest(config, tmp_path):
    found = [(1, 1, 1), (2, 1, 1), (None,) * 3]
    digests = {
        prepare(dataclasses.replace(config, source=sources(tmp_path, *weights)), 300).digest
        for weights in found
    }
    swapped = f"{tmp_path}/b.jsonl@1,{tmp_path}/a.jsonl@1,prepared:{tmp_path}/c@1"
    digests.add(prepare(dataclasses.replace(config, source=swapped), 300).digest)
    assert len(digests) == 4


def test_the_same_texts_elsewhere_have_the_same_digest(config, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "other" / "renamed.jsonl")
    other = dataclasses.replace(config, source=f"{tmp_path}/other/renamed.jsonl")
    digest = prepare(other, 300).digest
    (tmp_path / "other" / "renamed.jsonl").rename(tmp_path / "a.jsonl")
    assert prepare(config, 300).digest == digest


@pytest.mark.parametrize("heldout", ["b.jsonl", "prepared:c", "b.jsonl,prepared:c"])
def test_heldout_source(config, tmp_path, tokenizer, heldout):
    names = [name.removeprefix("prepared:")[0] for name in heldout.split(",")]
    specs = [
        f"prepared:{tmp_path}/c" if name.startswith("prepared:") else f"{tmp_path}/{name}"
        for name in heldout.split(",")
    ]
    data = prepare(dataclasses.replace(config, heldout_source=",".join(specs)), 300)
    assert texts_of(data.train.documents[0], tokenizer) == TEXTS["a"]
    held = [text for name in names for text in TEXTS[name]]
    assert texts_of(data.heldout, tokenizer) == held
    assert data.heldout.text_bytes == sum(map(len, held))


def test_trained_tokenizer_sees_training_documents_of_all_sources(config, tmp_path, monkeypatch):
    seen, original = [], Tokenizer.train

    def spy(documents, *args):
        seen.extend(documents)
        return original(seen, *args)

    monkeypatch.setattr(Tokenizer, "train", spy)
    both = f"{tmp_path}/a.jsonl@3,{tmp_path}/b.jsonl@1"
    changed = dataclasses.replace(config, source=both, tokenizer="train")
    prepare(changed, 300)
    assert seen == [TEXTS[name][i] for name in "ab" for i in (0, 1, 3, 4)]
    seen.clear()
    prepare(dataclasses.replace(changed, heldout_source=f"{tmp_path}/c.jsonl"), 300)
    assert seen == TEXTS["a"] + TEXTS["b"]


def test_a_prepared_source_brings_its_tokenizer(config, tmp_path, tokenizer):
    changed = dataclasses.replace(config, source=sources(tmp_path, 1, 1, 1), tokenizer="train")
    assert prepare(changed, 300).tokenizer.fingerprint == tokenizer.fingerprint


def test_synthetic_tokens_need_no_tokenizer(config):
    changed = dataclasses.replace(config, source="synthetic:30000", tokenizer="train")
    data = prepare(changed, 300)
    added = data.train.token_count + data.heldout.token_count - 30_000
    assert 0 <= added <= data.train.document_count + len(data.heldout)  # end tokens


@pytest.mark.parametrize("source", ["{}/a.jsonl", "prepared:{}/c", "{}/pair"])
def test_read_in_memory(config, tmp_path, tokenizer, source):
    ids = [[[*tokenizer.encode(text), tokenizer.end_id]] for text in TEXTS["b"]]
    write_megatron(tmp_path / "pair", ids)
    texts = TEXTS[{"{}/a.jsonl": "a", "prepared:{}/c": "c", "{}/pair": "b"}[source]]
    documents = read_in_memory(source.format(tmp_path), "text", tokenizer)
    assert texts_of(documents, tokenizer) == texts
    assert documents.text_bytes == sum(map(len, texts))
    assert len(documents.tokens) == documents.token_count


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,,b", "empty source"),
        ("a@0.5,b", "give all sources a weight"),
        *((f"a@{weight},b@1", "greater than 0") for weight in ("0", "-1", "nan", "inf", "-0.0")),
        ("a@" + "9" * 400, "greater than 0"),
        ("", "empty source"),
    ],
)
def test_sources_that_cannot_be(text, match):
    with pytest.raises(ValueError, match=rf"config\.data\.source: .*{match}"):
        parse_sources(text)


def test_names_with_commas_and_weights_that_exist(tmp_path):
    for name in ("a,b.txt", "c@0.5"):
        (tmp_path / name).write_text("x")
        (source,) = parse_sources(str(tmp_path / name))
        assert (source.spec, source.weight) == (str(tmp_path / name), None)
    first, second = parse_sources("gs://b/x=1/a@0.25, hub:user/name@3")
    assert (first.spec, first.weight) == ("gs://b/x=1/a", 0.25)
    assert (second.spec, second.weight) == ("hub:user/name", 3)
    (source,) = parse_sources("gs://b/a@1e-3")
    assert (source.spec, source.weight) == ("gs://b/a", 1e-3)
