"""Every way for a run to end, and exact resumption after it."""

import dataclasses
import json
import os
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blocktx.evaluate.heldout as evaluation
import blocktx.train.loop as module
import blocktx.train.start as start
from blocktx.checkpoint.params import load_params
from blocktx.config.errors import UserError
from blocktx.config.model import EmbedderConfig, EncoderConfig
from blocktx.data.tokenizer import Tokenizer
from blocktx.model.build import build
from blocktx.train.loop import train
from blocktx.train.metrics import read
from blocktx.train.step import create_state
from tests.helpers.tiny_run import MODEL, run_config


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def send_at_step(monkeypatch, at, *signals):
    """Sends the signals to this process while step `at` is under way."""
    step = module.train_step

    def stepped(state, *args):
        result = step(state, *args)
        if result[0].step == at:
            for number in signals:
                signal.raise_signal(number)
        return result

    monkeypatch.setattr(module, "train_step", stepped)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 2), (signal.SIGTERM, 3)])
def test_signal_saves_and_resuming_is_exact(number, at, finished, tmp_path, monkeypatch, capsys):
    config, uninterrupted, wanted = finished
    workdir = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        send_at_step(patch, at, number)
        with pytest.raises(SystemExit) as stopped:
            train(config, workdir)
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert f"stopped by {number.name} and saved at step {at} of 4" in capsys.readouterr().out
    checkpoint = load_params(workdir)
    assert checkpoint.step == at
    if at == 2:  # what was saved in the background is not what later steps made of it
        later = load_params(uninterrupted / "checkpoints" / "2")
        assert_same(later.params, checkpoint.params)
    state = train(config, workdir, resume=True)
    assert_same((state.params, state.opt_state), (wanted.params, wanted.opt_state))
    lines = read(workdir)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]


def test_second_signal_ends_at_once(finished, tmp_path, monkeypatch):
    config, _, _ = finished
    send_at_step(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    # A shell starts what it puts in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def send_in_evaluation(monkeypatch, number):
    original = evaluation.evaluate

    def evaluated(*args):
        signal.raise_signal(number)
        return original(*args)

    monkeypatch.setattr(evaluation, "evaluate", evaluated)


def test_signal_in_an_evaluation_takes_no_further_step(finished, tmp_path, monkeypatch, capfd):
    config, _, _ = finished  # checkpoints at 2 and 4
    training = dataclasses.replace(config.training, evaluate_every=1)
    send_in_evaluation(monkeypatch, signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        train(dataclasses.replace(config, training=training), tmp_path / "run")
    assert stopped.value.code == 130
    out, err = capfd.readouterr()
    assert "saved at step 1 of 4" in out
    assert err.endswith("stopping after this step, then saving; Ctrl-C to stop at once\n")
    assert load_params(tmp_path / "run").step == 1


def test_signal_in_the_last_evaluation_ends_a_finished_run(finished, tmp_path, monkeypatch):
    config, _, wanted = finished
    send_in_evaluation(monkeypatch, signal.SIGTERM)
    assert_same(train(config, tmp_path / "run").params, wanted.params)
    assert "heldout/loss" in read(tmp_path / "run")[-1]


@pytest.mark.parametrize("begun", [False, True])
def test_signal_before_the_first_step(begun, finished, tmp_path, monkeypatch, capsys):
    config, workdir, _ = finished
    if begun:
        shutil.copytree(workdir, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    summary = module._print_summary

    def print_summary(*args):
        signal.raise_signal(signal.SIGINT)
        summary(*args)

    monkeypatch.setattr(module, "_print_summary", print_summary)
    with pytest.raises(SystemExit) as stopped:
        train(config, tmp_path / "run", resume=True)
    assert stopped.value.code == 130
    where = "and saved at step 2 of 4" if begun else "before the first step"
    assert f"stopped by SIGINT {where} in {tmp_path}" in capsys.readouterr().out


def test_sigterm_while_data_are_prepared_cleans_up(data, tmp_path, monkeypatch):
    def encode_batch(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)
    fresh = dataclasses.replace(data, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stopped:
        train(run_config(fresh), tmp_path / "run")
    assert stopped.value.code == 143
    assert not list((tmp_path / "cache").glob(".unfinished-*"))
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_training_in_another_thread(finished, tmp_path):
    config, _, wanted = finished
    states = []
    thread = threading.Thread(target=lambda: states.append(train(config, tmp_path / "run")))
    thread.start()
    thread.join()
    assert_same(states[0].params, wanted.params)


def poison(monkeypatch, at, in_metrics=True):
    """Gives step `at` parameters, and a loss, that are not finite."""
    step = module.train_step

    def stepped(state, *args):
        state, got = step(state, *args)
        if state.step == at:
            state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
            if in_metrics:
                got = {**got, "loss": got["loss"] * jnp.nan}
        return state, got

    monkeypatch.setattr(module, "train_step", stepped)


@pytest.mark.parametrize("at", [3, 4])
def test_bad_step_stops_and_is_never_saved(at, finished, tmp_path, monkeypatch):
    config, _, _ = finished  # checkpoints at 2 and 4
    poison(monkeypatch, at)
    with pytest.raises(FloatingPointError, match=f"step {at}: the loss is nan") as error:
        train(config, tmp_path / "run")
    assert str(error.value).endswith(f"last good checkpoint: {tmp_path}/run/checkpoints/2")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["2"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_params(tmp_path / "run").params))


def test_bad_step_before_the_first_checkpoint(finished, tmp_path, monkeypatch):
    config, _, _ = finished
    poison(monkeypatch, 1)
    with pytest.raises(FloatingPointError, match=r"step 1: .*last good checkpoint: there is none"):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_parameters_that_overflow_by_a_finite_gradient_are_not_saved(
    finished, tmp_path, monkeypatch
):
    config, _, _ = finished
    poison(monkeypatch, 2, in_metrics=False)
    with pytest.raises(FloatingPointError, match="step 2: the parameters are not finite"):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_folder_with_a_run_is_left_alone(finished):
    config, workdir, _ = finished
    before = sorted(path.stat().st_mtime_ns for path in workdir.rglob("*"))
    with pytest.raises(FileExistsError, match="pass --resume to go on with it, or choose another"):
        train(config, workdir)
    assert sorted(path.stat().st_mtime_ns for path in workdir.rglob("*")) == before


@pytest.mark.parametrize("exists", [True, False])
def test_resume_without_a_run_begins_one(exists, finished, tmp_path):
    config, _, wanted = finished
    if exists:
        (tmp_path / "run").mkdir()
    assert_same(train(config, tmp_path / "run", resume=True).params, wanted.params)


def test_resume_of_a_finished_run_evaluates_only(finished, capsys):
    config, workdir, wanted = finished
    lines = read(workdir)
    state = train(config, workdir, resume=True)
    assert_same(state.params, wanted.params)
    out = capsys.readouterr().out
    assert "at step 4 of 4 already: nothing is left to train" in out
    assert out.splitlines()[-1].startswith("held-out step=4 loss=")
    assert read(workdir) == lines


def test_resume_with_another_model(finished):
    config, workdir, _ = finished
    changed = dataclasses.replace(config, seed=1)
    with pytest.raises(ValueError, match=r"config\.seed: checkpoint 0, now 1"):
        train(changed, workdir, resume=True)
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0


def test_resume_when_documents_have_changed(finished, tmp_path):
    """With the tokenizer that it was, so that nothing else tells."""
    config, _, _ = finished
    shutil.copytree(config.data.source, tmp_path / "corpus")
    train(dataclasses.replace(config), tmp_path / "first")
    tokenizer = str(tmp_path / "first" / "tokenizer.json")
    own = dataclasses.replace(config.data, source=str(tmp_path / "corpus"), tokenizer=tokenizer)
    config = dataclasses.replace(config, data=own)
    train(config, tmp_path / "run")
    with (tmp_path / "corpus" / "a.txt").open("a") as file:
        file.write(" block")
    with pytest.raises(ValueError, match=r"config\.data\.source: .*other documents than when"):
        train(config, tmp_path / "run", resume=True)


def test_mistake_is_found_before_data_are_prepared(data, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "prepare", lambda *_: pytest.fail("prepares"))
    config = run_config(data)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"cannot make {tmp_path}/file"):
        train(config, tmp_path / "file")
    model = dataclasses.replace(MODEL, param_dtype="bfloat16")
    with pytest.raises(
        ValueError, match=r"config\.model\.param_dtype: bfloat16 weights are for dec"
    ):
        train(dataclasses.replace(config, model=model), tmp_path / "run")


def test_resume_when_the_corpus_gives_another_tokenizer(finished, tmp_path):
    config, workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    special = (config.data.end_token, config.data.pad_token)
    other = Tokenizer.train(["zebra quagga okapi"], MODEL.vocab_size, *special)
    other.save(tmp_path / "run" / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json: the run was trained with another"):
        train(config, tmp_path / "run", resume=True)


def test_killed_during_the_last_evaluation(finished, tmp_path):
    """The same command writes what is missing: the evaluation and the plot."""
    config, workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "loss.png").unlink()
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    train(config, tmp_path / "run", resume=True)
    last, wanted = read(tmp_path / "run")[-1], json.loads(lines[-1])
    assert (last.pop("time"), last)[1] == (wanted.pop("time"), wanted)[1]
    assert (tmp_path / "run" / "loss.png").exists()


@pytest.mark.parametrize("written", [True, False])
def test_killed_before_an_evaluation_on_the_way_was_written(written, finished, tmp_path):
    """After the checkpoint of step 2. A run that is resumed has each evaluation once."""
    config, _, _ = finished
    training = dataclasses.replace(config.training, evaluate_every=2)
    config, workdir = dataclasses.replace(config, training=training), tmp_path / "run"
    train(config, workdir)

    def evaluations():
        return [(x["step"], x["heldout/loss"]) for x in read(workdir) if "heldout/loss" in x]

    wanted = evaluations()
    assert [step for step, _ in wanted] == [2, 4]
    shutil.rmtree(workdir / "checkpoints" / "4")
    if not written:
        file = workdir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:2]))  # of steps 1 and 2
    train(config, workdir, resume=True)
    assert evaluations() == wanted
    assert [line["step"] for line in read(workdir) if "train/loss" in line] == [1, 2, 3, 4]


def test_the_same_texts_at_another_path(finished, tmp_path):
    config, workdir, wanted = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.copytree(config.data.source, tmp_path / "moved")
    moved = dataclasses.replace(
        config.data, source=str(tmp_path / "moved"), cache_dir=str(tmp_path / "cache")
    )
    state = train(dataclasses.replace(config, data=moved), tmp_path / "run", resume=True)
    assert_same(state.params, wanted.params)


def test_a_chosen_step(finished, tmp_path):
    config, workdir, wanted = finished
    shutil.copytree(workdir, tmp_path / "run")
    state = train(config, tmp_path / "run", resume=True, step=2)
    assert_same((state.params, state.opt_state), (wanted.params, wanted.opt_state))
    assert [path.name[:2] for path in (tmp_path / "run" / "set_aside").iterdir()] == ["4-"]
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; 2, 4"):
        train(config, tmp_path / "run", resume=True, step=3)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; there is none"):
        train(config, tmp_path / "new", resume=True, step=3)
    assert not (tmp_path / "new").exists()


def test_seeds_that_differ_in_their_high_bits_are_different_runs(data):
    module_ = build(MODEL)

    def params(seed):
        config = dataclasses.replace(run_config(data), seed=seed)
        return create_state(config, module_).params["embedder"]["tokens"]["embedding"]

    assert (params(0) != params(2**32)).any()
    assert (params(0) == params(0)).all()


def test_tokens_outside_the_vocabulary_are_refused(finished, tmp_path, monkeypatch):
    config, _, _ = finished
    batches = module.training_batches

    def wrong(*args):
        iterator = batches(*args)

        class Wrong:
            get_state = iterator.get_state

            def __next__(self):
                rows = next(iterator)
                rows["tokens"][0, 0, 0] = MODEL.vocab_size
                return rows

        return Wrong()

    monkeypatch.setattr(module, "training_batches", wrong)
    with pytest.raises(UserError, match=r"token id 300 is outside the vocabulary .*cache_dir"):
        train(config, tmp_path / "run")


def with_encoder(kind, **ids):
    encoder = EncoderConfig(layers=1, width=32, heads=4, **ids)
    return dict(embedder=EmbedderConfig(kind=kind, encoder=encoder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (with_encoder("encoder", pad_id=2), r"encoder\.pad_id: got 2, .* use 1$"),
        (with_encoder("cls", cls_id=66), r"encoder\.cls_id: 66 is the token of the te"),
        (dict(conditioning="summation", bos_id=66), r"model\.bos_id: 66 is the token of the text"),
    ],
)
def test_ids_that_are_not_the_tokenizers(fields, message, data, tmp_path):
    model = dataclasses.replace(MODEL, **fields)
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(run_config(data), model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_space_for_the_tokenized_documents(finished, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(start, "prepare", full)
    with pytest.raises(UserError, match=r"config\.data\.cache_dir: no space left in "):
        train(finished[0], tmp_path / "run")


def test_failure_to_read_data_leaves_no_run_behind(data, tmp_path):
    bad = dataclasses.replace(data, source=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(run_config(bad), tmp_path / "run")
    assert not (tmp_path / "run").exists()
