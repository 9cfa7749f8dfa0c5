"""Seeded mutations of files that others may have changed: an error with a name, or the same result.

Whatever is changed, loading must not hang, must not crash, must say which file is at fault, and
must not give other weights, another configuration or another tokenizer without a word.
"""

import gzip
import json
import random
import shutil
import time

import jax
import numpy as np
import pytest
import zstandard

from blocktx.checkpoint.params import load_params, load_tokenizer, save_params
from blocktx.checkpoint.safetensors import write
from blocktx.config.model import BlockConfig, StackConfig
from blocktx.config.run import DataConfig, RunConfig
from blocktx.convert.hf import load_hf
from blocktx.data.corpus import prepare
from blocktx.data.tokenizer import Tokenizer
from blocktx.model.build import abstract_params

STACK = StackConfig(layers=1, width=8, heads=1)
MODEL = BlockConfig(vocab_size=300, context_length=16, block_decoder=STACK, token_decoder=STACK)
CONFIG = RunConfig(model=MODEL)
SECONDS = 8  # for each kind of file; the whole suite stays below a minute
TRIALS = 60
EXPECTED = (ValueError, FileNotFoundError, IsADirectoryError)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An export and a run of the same parameters, with a tokenizer."""
    folder = tmp_path_factory.mktemp("fuzz")
    tokenizer = folder / "tokenizer.json"
    Tokenizer.train(["a b"], 300, "<|endoftext|>", "<|padding|>").save(tokenizer)
    rng = np.random.default_rng(0)
    like = abstract_params(MODEL, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)
    save_params(folder / "run", CONFIG, params, step=3, tokenizer=tokenizer)
    write(folder / "export", params, CONFIG, step=3, tokenizer=tokenizer)
    return folder


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return bytes that differ from `content` in one of the ways in which files break."""
    data = bytearray(content)
    kind = rng.randrange(8)
    at = rng.randrange(len(data)) if data else 0
    if kind == 0:  # a flipped bit
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:  # another byte
        data[at] = rng.randrange(256)
    elif kind == 2:  # cut off
        del data[at:]
    elif kind == 3:  # a piece is missing
        del data[at : at + rng.randrange(1, 50)]
    elif kind == 4:  # a piece is there twice
        data[at:at] = data[at : at + rng.randrange(1, 50)]
    elif kind == 5:  # zeros, as after a power cut
        end = min(at + rng.randrange(1, 200), len(data))
        data[at:end] = bytes(end - at)
    elif kind == 6:  # another digit
        digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
        if digits:
            data[rng.choice(digits)] = 48 + rng.randrange(10)
    else:  # more at the end
        data += rng.randbytes(rng.randrange(1, 30))
    return bytes(data)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Return JSON in which one value is missing, or another."""
    tree = json.loads(content)
    nodes = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            nodes.append((node, key))
            if isinstance(node[key], dict | list) and node[key]:
                walk(node[key])

    walk(tree)
    node, key = rng.choice(nodes)
    if rng.random() < 0.4:
        del node[key]
    else:
        values = [None, True, -1, 0, 10**30, 1e308, "", "x" * 10_000, [], {}, [[]] * 100]
        node[key] = rng.choice(values)
    return json.dumps(tree).encode()


def attack(folder, name, load, same, *, structured=False, seed=0):
    """Mutate the file `name` in `folder` again and again; the file is restored at the end."""
    rng, file = random.Random(f"{name} {seed}"), folder / name
    original, end = file.read_bytes(), time.monotonic() + SECONDS
    wanted = load()
    try:
        for trial in range(TRIALS):
            if time.monotonic() > end:
                break
            change = mutate_json if structured and trial % 2 else mutate
            file.write_bytes(change(original, rng))
            try:
                got = load()
            except EXPECTED as error:
                message = str(error)
            else:
                message = str(folder)
                assert same(got, wanted), f"trial {trial}: loads as something else"
            assert str(folder) in message or name in message, f"trial {trial}: {message}"
            assert len(message) < 20_000, f"trial {trial}"
    finally:
        file.write_bytes(original)


def same_checkpoint(got, wanted):
    leaves = zip(jax.tree.leaves(got.params), jax.tree.leaves(wanted.params), strict=True)
    return (
        (got.config, got.step) == (wanted.config, wanted.step)
        and all(np.array_equal(x, y) for x, y in leaves)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_exports(name, folders):
    export = folders / "export"
    attack(export, name, lambda: load_params(export), same_checkpoint, structured="json" in name)


def test_metadata_of_a_checkpoint(folders):
    folder = folders / "run" / "checkpoints" / "3"
    attack(
        folder, "metadata/metadata", lambda: load_params(folder), same_checkpoint, structured=True
    )


def test_tokenizers(folders):
    export = folders / "export"
    loaded = load_params(export)

    def load():
        return load_tokenizer(loaded)

    def same(got, wanted):
        return got.fingerprint == wanted.fingerprint

    attack(export, "tokenizer.json", load, same, structured=True)


def test_indices_of_foreign_models(folders, tmp_path):
    """A sharded folder of Hugging Face, which is refused or converted, but never crashes."""
    shutil.copy(folders / "export" / "model.safetensors", tmp_path / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"gpt_neox.embed_in.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    for name in ("model.safetensors.index.json", "config.json"):
        rng, original = random.Random(name), (tmp_path / name).read_bytes()
        for trial in range(20):
            change = mutate_json if trial % 2 else mutate
            (tmp_path / name).write_bytes(change(original, rng))
            with pytest.raises(EXPECTED) as caught:
                load_hf(tmp_path)
            assert len(str(caught.value)) < 20_000
        (tmp_path / name).write_bytes(original)


TEXT = b'{"text": "one two three"}\n{"text": "four five six"}\n' * 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", TEXT),
        ("a.jsonl.gz", gzip.compress(TEXT, mtime=0)),
        ("a.jsonl.zst", zstandard.compress(TEXT)),
    ],
    ids=["jsonl", "gz", "zst"],
)
def test_documents(name, content, folders, tmp_path):
    """A corpus may differ where its text does, but there is a corpus or an error with a name."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / name).write_bytes(content)
    data = DataConfig(
        source=str(corpus),
        tokenizer=str(folders / "export" / "tokenizer.json"),
        cache_dir=str(tmp_path / "cache"),
    )
    attack(corpus, name, lambda: prepare(data, 300), lambda got, _: got.digest)
