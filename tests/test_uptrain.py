"""Uptraining against the authors' initialisation, longer blocks, and runs that start from it."""

import dataclasses
import functools
import importlib.util
import pathlib
import shutil

import golden
import jax
import numpy as np
import pytest
from random_weights import random_params
from tiny_run import MODEL, STACK, run_config, write_corpus

import blocktx.train as module
from blocktx.checkpoint import load_params, save_params
from blocktx.config import DataConfig, from_config_dict
from blocktx.convert import load_neox, load_official
from blocktx.convert.uptrain import lengthen, uptrain
from blocktx.data.tokenizer import Tokenizer
from blocktx.metrics import MetricsWriter, plot_runs, read
from blocktx.model import build, init_params
from blocktx.model_config import StackConfig, VanillaConfig
from blocktx.stack import unstack_layers
from blocktx.train import train

ROOT = pathlib.Path(__file__).parents[1]
VANILLA = VanillaConfig(
    vocab_size=50, context_length=16, decoder=StackConfig(layers=4, width=16, heads=2)
)


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@functools.cache
def vanilla_params(config=VANILLA):
    return random_params(build(config))


# The authors' initialisation.


@functools.partial(jax.jit, static_argnums=0)
def outputs(net, params, tokens, mask):
    def apply(method):
        return net.apply({"params": params}, tokens, mask, method=method)

    return apply("embed_blocks"), apply("contexts"), apply("__call__")


@pytest.mark.parametrize("name", golden.UPTRAINED)
def test_equals_the_authors(name):
    expected = golden.expected(name)
    vanilla = VanillaConfig(
        vocab_size=97, context_length=256, decoder=StackConfig(layers=4, width=32, heads=2)
    )
    _, given = load_neox(golden.FOLDER / "uptrain" / "vanilla.safetensors", vanilla)
    how = dict(method="partition", block_layers=3) if name == "partition31" else dict(method=name)
    config, params = uptrain(vanilla, given, block_length=4, **how)
    _, theirs = load_official(golden.path(name), config)
    assert_same(params, theirs)

    separate = dataclasses.replace(vanilla, scan_layers=False)
    separate, separate_params = uptrain(separate, unstack_layers(given), block_length=4, **how)
    assert separate == dataclasses.replace(config, scan_layers=False)
    assert_same(separate_params, unstack_layers(theirs))

    def both(array):  # without padding and with it
        return np.concatenate([expected[array], expected[f"pad_{array}"]])

    embeddings, contexts, logits = outputs(
        build(config), params, both("input_ids"), both("attention_mask")
    )
    close = functools.partial(np.testing.assert_allclose, atol=golden.TOLERANCE, rtol=0)
    close(embeddings[:2, :, 0], expected["embedder_output"])
    close(contexts[:2], expected["context"])
    valid = np.concatenate([np.ones((2, 5, 4), bool), expected["pad_logits_valid"]])
    close(logits[valid], both("logits")[valid])


def test_what_is_not_of_a_block_model_is_taken_over():
    given = dataclasses.replace(VANILLA, compute_dtype="bfloat16", remat="full")
    config, params = uptrain(
        given, vanilla_params(), method="skip", block_length=2, prefix_length=3
    )
    assert (config.compute_dtype, config.remat, config.context_length) == ("bfloat16", "full", 16)
    assert (config.block_length, config.prefix_length) == (2, 3)
    assert config.block_decoder == config.token_decoder == StackConfig(layers=2, width=16, heads=2)
    assert_same(
        jax.tree.map(np.shape, params),
        jax.tree.map(np.shape, random_params(build(config))),
    )


@pytest.mark.parametrize(
    ("layers", "arguments", "message"),
    [
        (4, dict(method="halve"), "method: got 'halve'; use one of partition, skip, duplicate"),
        (3, dict(method="partition"), "3 layers into halves; .* block_layers 1 or 2"),
        (1, dict(method="partition"), "cannot divide 1 layer in two; use duplicate"),
        (4, dict(method="partition", block_layers=0), "block_layers: got 0 of 4 .* use 1 to 3"),
        (4, dict(method="partition", block_layers=4), "block_layers: got 4 of 4 .* use 1 to 3"),
        (4, dict(method="skip", block_layers=2), "block_layers: is for partition only, got 2"),
        (4, dict(method="skip", block_length=0), "block_length: got 0, must be greater than 0"),
        (3, dict(method="skip"), "method: skip cannot .* 3 layers .* block_layers 1 to 2$"),
        (1, dict(method="skip"), "method: skip cannot .* 1 layers .* or duplicate$"),
        (
            4,
            dict(method="skip", block_length=3),
            "^block_length: 3 does not divide context_length 16 .* use one of 1, 2, 4, 8$",
        ),
        (4, dict(method="skip", block_length=16), "^block_length: 16 does not .* 1, 2, 4, 8$"),
        (4, dict(method="skip", prefix_length=0), "prefix_length: got 0, must be greater than 0"),
    ],
)
def test_uptraining_that_cannot_be(layers, arguments, message):
    vanilla = dataclasses.replace(VANILLA, decoder=StackConfig(layers=layers, width=16, heads=2))
    with pytest.raises(ValueError, match=message):
        uptrain(vanilla, {}, **(dict(block_length=4) | arguments))


def test_all_that_hinders_uptraining_is_listed():
    vanilla = dataclasses.replace(VANILLA, decoder=StackConfig(layers=3, width=16, heads=2))
    with pytest.raises(ValueError, match="into halves") as error:
        uptrain(vanilla, {}, method="partition", block_length=0, prefix_length=0)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["method", "block_length", "prefix_length"]


# Longer blocks.


def test_longer_block_is_the_mean_of_its_parts():
    short, _ = uptrain(VANILLA, vanilla_params(), method="partition", block_length=2)
    params = random_params(build(short))
    long, longer_params = lengthen(short, params, 4)
    assert long == dataclasses.replace(short, block_length=8)
    tokens = np.random.default_rng(0).integers(0, short.vocab_size, 16)

    def embeddings(config, params):
        shape = (1, -1, config.block_length)
        return build(config).apply(
            {"params": params},
            tokens.reshape(shape),
            np.ones_like(tokens).reshape(shape),
            method="embed_blocks",
        )

    parts = np.asarray(embeddings(short, params)).reshape(2, 4, -1)
    np.testing.assert_allclose(
        embeddings(long, longer_params).reshape(2, -1), parts.mean(1), atol=1e-6, rtol=0
    )
    for part in ("block_decoder", "token_decoder"):
        assert longer_params[part] is params[part]


@pytest.mark.parametrize("factors", [(4,), (2, 2), (4, 1)])
def test_lengthening_what_is_uptrained_is_uptraining_with_longer_blocks(factors):
    model = uptrain(VANILLA, vanilla_params(), method="partition", block_length=1)
    for factor in factors:
        model = lengthen(*model, factor)
    config, params = uptrain(VANILLA, vanilla_params(), method="partition", block_length=4)
    assert model[0] == config
    assert_same(model[1], params)


@pytest.mark.parametrize(
    ("changes", "factor", "message"),
    [
        ({}, 0, "factor: got 0"),
        ({}, 3, "^factor: 3 makes blocks of 12, .* context_length 16 .* use one of 1, 2$"),
        ({}, 8, "^factor: 8 makes blocks of 32, .* context_length 16 .* use one of 1, 2$"),
        (dict(conditioning="summation"), 2, "conditioning: summation .* takes models with a pref"),
        (dict(embedder=MODEL.embedder), 2, "embedder.kind: lookup .* a projection embedder"),
    ],
)
def test_lengthening_that_cannot_be(changes, factor, message):
    config, params = uptrain(VANILLA, vanilla_params(), method="skip", block_length=4)
    with pytest.raises(ValueError, match=message):
        lengthen(dataclasses.replace(config, **changes), params, factor)


# Runs that start from given parameters.


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def first_run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first") / "run"
    return workdir, train(run_config(data, steps=2), workdir)


def test_begins_with_the_parameters_and_nothing_else(first_run, data, tmp_path, monkeypatch):
    source, trained = first_run
    config = run_config(data, steps=1, init_from=str(source))
    new, states, step = module.create_state(config, build(config.model)), [], module.train_step

    def stepped(state, *args):
        states.append(jax.device_get(state))  # before it is donated
        return step(state, *args)

    monkeypatch.setattr(module, "train_step", stepped)
    train(config, tmp_path / "run")
    assert states[0].step == 0
    assert_same(states[0].params, trained.params)
    assert_same(states[0].opt_state, new.opt_state)
    assert [line["step"] for line in read(tmp_path / "run")] == [1, 1]


def test_resuming_goes_on_from_its_own_and_does_not_read_it_again(first_run, data, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(first_run[0], source)
    config = run_config(data, steps=2, init_from=str(source))
    trained = train(config, tmp_path / "run", resume=True)
    shutil.rmtree(source)
    assert_same(train(config, tmp_path / "run", resume=True), trained)
    with pytest.raises(FileNotFoundError, match="source: there is no such folder"):
        train(config, tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_every_parameter_that_does_not_fit_is_listed(first_run, data, tmp_path):
    token_decoder = dataclasses.replace(STACK, mlp_width=64)
    model = dataclasses.replace(MODEL, prefix_length=3, token_decoder=token_decoder)
    config = dataclasses.replace(run_config(data, init_from=str(first_run[0])), model=model)
    with pytest.raises(ValueError, match="parameters do not fit") as error:
        train(config, tmp_path / "run")
    first, *lines = str(error.value).splitlines()
    assert first.startswith(str(first_run[0]))
    assert [line.split(":")[0].strip().removeprefix("token_decoder/") for line in lines] == [
        "expansion/bias",
        "expansion/kernel",
        "stack/layers/mlp/down/kernel",
        "stack/layers/mlp/up/bias",
        "stack/layers/mlp/up/kernel",
    ]
    assert "checkpoint (2, 32), configuration (3, 32)" in lines[0]
    assert not (tmp_path / "run").exists()


def test_tokenizer_must_be_the_one_that_the_parameters_know(first_run, data, tmp_path):
    words = dataclasses.replace(data, source=str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    for name in "ab":
        (tmp_path / "other" / f"{name}.txt").write_text("zebra quagga okapi " * 300)
    source = first_run[0]
    settings = dict(init_from=str(source), steps=1)
    tokenizer = source / "tokenizer.json"
    with pytest.raises(ValueError, match=f"pass --config.data.tokenizer={tokenizer}$"):
        train(run_config(words, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()

    words = dataclasses.replace(words, tokenizer=str(tokenizer))
    train(run_config(words, **settings), tmp_path / "run")
    special = (data.end_token, data.pad_token)
    assert (
        Tokenizer.load(tmp_path / "run", *special).fingerprint
        == Tokenizer.load(source, *special).fingerprint
    )


def test_new_tokenizer_cannot_be_the_one_that_the_parameters_know(
    first_run, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save_params("without", run_config(data), first_run[1].params)
    config = run_config(data, init_from="without", steps=1)
    with pytest.raises(ValueError, match=r"no .*without/tokenizer.json, .*data.tokenizer=\.\.\.$"):
        train(config, "run")
    assert not pathlib.Path("run").exists()
    given = dataclasses.replace(data, tokenizer=str(first_run[0] / "tokenizer.json"))
    train(dataclasses.replace(config, data=given), "run")

    save_params("vanilla", dataclasses.replace(config, model=VANILLA), vanilla_params())
    capsys.readouterr()
    convert = load_file(ROOT / "launch" / "convert.py").main
    convert(["uptrain", "--from=vanilla", "--method=skip", "--block-length=2", "--output=start"])
    *_, reason, command = capsys.readouterr().out.splitlines()
    assert reason.startswith("no tokenizer.json in vanilla; TOKENIZER has to be")
    assert command.endswith(" --config.data.tokenizer=TOKENIZER")


# The study.


def load_file(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def get_config():
    loaded = load_file(ROOT / "configs" / "uptrain.py")
    return lambda kind: from_config_dict(loaded.get_config(kind))


def test_commands(first_run, data, get_config, tmp_path, monkeypatch, capsys):
    convert = load_file(ROOT / "launch" / "convert.py").main
    monkeypatch.chdir(tmp_path)
    tokenizer = first_run[0] / "tokenizer.json"
    given = dataclasses.replace(run_config(data), model=VANILLA)
    save_params("vanilla", given, vanilla_params(), tokenizer=tokenizer)

    convert(["uptrain", "--from=vanilla", "--method=skip", "--block-length=2", "--output=start"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.endswith(" --config=configs/uptrain.py:start --workdir=start-trained")
    config, params = uptrain(VANILLA, vanilla_params(), method="skip", block_length=2)
    start = load_params("start")
    assert (start.config.model, start.step) == (config, 0)
    assert_same(start.params, params)
    wanted = get_config("start")
    assert (wanted.model, wanted.training.init_from) == (config, "start")
    assert wanted.data == dataclasses.replace(data, tokenizer="start/tokenizer.json")

    convert(["lengthen", "--from=start", "--factor=4", "--output=longer"])
    longer = load_params("longer")
    assert longer.config.model.block_length == 8
    assert_same(longer.params, lengthen(config, params, 4)[1])
    assert pathlib.Path("longer/tokenizer.json").read_text() == tokenizer.read_text()

    capsys.readouterr()
    for mistake, message in [
        ("uptrain --from=vanilla --method=skip --output=start", "start: exists already"),
        ("uptrain --from=start --method=skip --output=new", "a block model is what uptrain mak"),
        (
            "uptrain --from=vanilla --method=skip --block_length=5 --block_layers=1 --output=new",
            "error: --block-layers: is for partition only, got 1\n--block-length: 5 does not",
        ),
        ("lengthen --from=start --factor=3 --output=new", "error: --factor: 3 makes blocks of 6"),
        ("uptrain --from=nowhere --method=skip --output=new", "nowhere: there is no such folder"),
        ("lengthen --from=vanilla --output=new", "a vanilla model has no blocks to lengthen"),
    ]:
        with pytest.raises(SystemExit, match="1"):
            convert(mistake.split())
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert {path.name for path in tmp_path.iterdir()} == {"vanilla", "start", "longer"}
    assert_same(load_params("start").params, params)


def test_study_compares_like_with_like(get_config):
    vanilla, uptrained, scratch = map(get_config, ["vanilla", "uptrained", "scratch"])
    shapes = jax.eval_shape(lambda: init_params(build(vanilla.model), jax.random.key(0)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    block, _ = uptrain(vanilla.model, zeros, method="partition", block_length=4)
    assert uptrained.model == scratch.model == block
    assert vanilla.data == uptrained.data == scratch.data
    assert vanilla.training == scratch.training
    assert vanilla.optimizer == scratch.optimizer
    assert uptrained.training.steps * 10 == scratch.training.steps
    assert uptrained.optimizer.warmup_steps * 10 == scratch.optimizer.warmup_steps
    assert uptrained.training.init_from == "runs/uptrain/start"


def test_unknown_study(get_config):
    with pytest.raises(ValueError, match="vanila: unknown; use vanilla, scratch, uptrained, or a"):
        get_config("vanila")


def test_runs_in_one_plot(tmp_path):
    for name, losses in {"one": [5.0, 4.0], "other": [4.5, 3.5], "none": []}.items():
        with MetricsWriter(tmp_path / name) as writer:
            writer.write(1, {"train/loss": 6.0})
            for step, loss in enumerate(losses, 1):
                writer.write(step * 10, {"heldout/loss": loss})
    path = plot_runs([tmp_path / "one", tmp_path / "other"], tmp_path / "plots" / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]
    with pytest.raises(ValueError, match=r"no held-out loss to plot in .*none$"):
        plot_runs([tmp_path / "one", tmp_path / "none"], path)
    with pytest.raises(ValueError, match="no run to plot"):
        plot_runs([], path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot_runs([tmp_path / "nowhere"], path)
