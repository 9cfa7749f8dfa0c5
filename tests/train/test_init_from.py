"""Runs that start from given parameters, and the uptraining study."""

import dataclasses
import importlib.util
import pathlib
import shutil

import jax
import numpy as np
import pytest

import blocktx.train.loop as module
from blocktx.checkpoint.params import load_params, save_params
from blocktx.config.conversion import from_config_dict
from blocktx.config.model import StackConfig, VanillaConfig
from blocktx.convert.uptrain import lengthen, uptrain
from blocktx.data.tokenizer import Tokenizer
from blocktx.model.build import build, init_params
from blocktx.train.loop import train
from blocktx.train.loss_plot import plot_runs
from blocktx.train.metrics import MetricsWriter, read
from tests.helpers.random_weights import random_params
from tests.helpers.tiny_run import MODEL, STACK, run_config

ROOT = pathlib.Path(__file__).parents[2]
VANILLA = VanillaConfig(
    vocab_size=50, context_length=16, decoder=StackConfig(layers=4, width=16, heads=2)
)


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


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
    refused = pytest.raises(
        ValueError, match=r"no .*without/tokenizer.json, .*data.tokenizer=\.\.\.$"
    )
    with monkeypatch.context() as patched, refused:
        patched.setattr(module, "prepare_corpus", None)  # before the corpus is tokenised
        train(config, "run")
    assert not pathlib.Path("run").exists()
    given = dataclasses.replace(data, tokenizer=str(first_run[0] / "tokenizer.json"))
    train(dataclasses.replace(config, data=given), "run")

    save_params(
        "vanilla", dataclasses.replace(config, model=VANILLA), random_params(build(VANILLA))
    )
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
    save_params("vanilla", given, random_params(build(VANILLA)), tokenizer=tokenizer)

    convert(["uptrain", "--from=vanilla", "--method=skip", "--block-length=2", "--output=start"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.endswith(" --config=configs/uptrain.py:start --workdir=start-trained")
    config, params = uptrain(VANILLA, random_params(build(VANILLA)), method="skip", block_length=2)
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
        ("uptrain --from=start --method=skip --output=new", "uptrain starts from a vanilla model"),
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
    with pytest.raises(ValueError, match=r"nowhere: no metrics\.jsonl"):
        plot_runs([tmp_path / "nowhere"], path)
