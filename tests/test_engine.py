"""`blocktx.load` and text in, text out, on a run of four steps."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tiny_run import run_config, write_corpus

import blocktx
from blocktx import benchmark
from blocktx.data.tokenizer import Tokenizer
from blocktx.model import count_params
from blocktx.model_config import BlockConfig, StackConfig
from blocktx.train import train

PROMPTS = ["token cache", "", "lookup", "a \N{GRINNING FACE} in a block"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, its configuration and its last state."""
    folder = tmp_path_factory.mktemp("engine")
    data = dataclasses.replace(write_corpus(folder), holdout_every=0)  # spares the evaluation
    config = run_config(data)
    return folder / "run", config, train(config, folder / "run")


@pytest.fixture(scope="module")
def engine(trained):
    return blocktx.load(trained[0])


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/4"])
def test_load(trained, below):
    workdir, config, state = trained
    engine = blocktx.load(workdir / below)
    assert engine.config == dataclasses.replace(
        config, model=dataclasses.replace(config.model, scan_layers=False, platform="cpu")
    )
    saved = Tokenizer.load(workdir / "tokenizer.json", config.data.end_token, config.data.pad_token)
    assert engine.tokenizer.fingerprint == saved.fingerprint
    _, expected = blocktx.sampling.separate_layers(engine.model, state.params)
    jax.tree.map(np.testing.assert_array_equal, engine.params, expected)


def test_params_fit_the_model(engine):
    tokens = np.zeros((1, 3, 4), int)
    logits = jax.jit(engine.model.apply)({"params": engine.params}, tokens, np.ones_like(tokens))
    assert logits.shape == (1, 2, 4, engine.config.model.vocab_size)
    assert np.isfinite(logits).all()


def test_string_or_list(engine):
    text = engine.generate("token", max_new_tokens=6, seed=1)
    assert isinstance(text, str)
    assert engine.generate(["token"], max_new_tokens=6, seed=1) == [text]
    assert engine.generate(("token",), max_new_tokens=6, seed=1) == [text]


def test_row_of_a_ragged_batch_is_what_it_is_alone(engine):
    together = engine.generate(PROMPTS, max_new_tokens=9, temperature=0)
    alone = [engine.generate(prompt, max_new_tokens=9, temperature=0) for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) > 1


def test_text_is_what_the_tokens_say_up_to_the_end(engine, monkeypatch):
    """The prompts' tokens go in left-padded; what comes out ends before the end token."""
    tokenizer, given = engine.tokenizer, {}
    word = tokenizer.encode("block token")

    def fake(model, params, tokens_BxT, mask_BxT, **options):
        given.update(options, tokens=tokens_BxT, mask=mask_BxT)
        return np.array([[*word, tokenizer.end_id, tokenizer.pad_id], [*word, 5, 6]])

    monkeypatch.setattr(blocktx.sampling, "generate", fake)
    first, second = engine.generate(["", "token cache"], max_new_tokens=9, top_k=3)
    assert first == "block token"
    assert second.startswith("block token")
    row = tokenizer.encode("token cache")
    padding = [tokenizer.pad_id] * (len(row) - 1)
    assert given["tokens"].tolist() == [[*padding, tokenizer.end_id], row]  # starts a document
    assert given["mask"].astype(int).tolist() == [[0] * len(padding) + [1], [1] * len(row)]
    options = dict(max_new_tokens=9, temperature=1.0, top_k=3, top_p=1.0, seed=0)
    assert options.items() <= given.items()
    assert (given["end_id"], given["pad_id"]) == (tokenizer.end_id, tokenizer.pad_id)


@pytest.mark.parametrize("prompts", [[], [3], [["token"]], b"token", 3, None])
def test_prompts_must_be_text(engine, prompts):
    with pytest.raises(ValueError, match=r"prompts: got .*, expected a string or a list of"):
        engine.generate(prompts)


def test_too_long(engine):
    with pytest.raises(ValueError, match="do not fit the context of 32 tokens"):
        engine.generate("token", max_new_tokens=33)


def test_run_without_tokenizer(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run/tokenizer\.json: not found"):
        blocktx.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_missing_checkpoint(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name}: (there is no such|no finished)"):
        blocktx.load(tmp_path / name)


@pytest.mark.parametrize(
    ("block", "token", "layers"),
    [
        (StackConfig(6, 768, 12), StackConfig(6, 768, 12), 12),  # the paper's 170M and 160M
        (StackConfig(6, 512, 8), StackConfig(4, 256, 8), 7),
    ],
)
def test_vanilla_of_equal_size(block, token, layers):
    config = BlockConfig(
        vocab_size=50_304, context_length=2048, block_decoder=block, token_decoder=token
    )
    vanilla = benchmark.equal_vanilla(config)
    assert vanilla.decoder == dataclasses.replace(block, layers=layers)
    a_layer = 12 * block.width**2 + 13 * block.width
    assert abs(count_params(vanilla)[1] - count_params(config)[1]) <= a_layer / 2
