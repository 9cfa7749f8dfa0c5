"""Runs in a bucket of Google Cloud, served on this machine."""

import os
import signal

import jax
import numpy as np
import pytest
from etils import epath

import blocktx
from blocktx.checkpoint.folder import has_checkpoint
from blocktx.checkpoint.params import load_params, load_tokenizer
from blocktx.checkpoint.safetensors import write
from blocktx.files import AppendLog, copy_folder, write_atomic
from blocktx.train.loop import train
from blocktx.train.metrics import read
from tests.helpers.gcs_server import gcs_server
from tests.helpers.tiny_run import run_config
from tests.train.test_endings import send_at_step


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.fixture(scope="module")
def bucket():
    with gcs_server():
        yield epath.Path("gs://bucket")


@pytest.fixture(scope="module")
def interrupted(finished, bucket):
    """The run of `finished`, in a bucket, stopped after step 3 and resumed; its folder."""
    config, _, _ = finished
    workdir = bucket / "runs" / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            train(config, workdir)
    assert stopped.value.code == 143
    assert load_params(workdir).step == 3
    return workdir, train(config, os.fspath(workdir), resume=True)


@pytest.mark.slow
def test_resuming_is_exact(interrupted, finished):
    workdir, state = interrupted
    _, local, wanted = finished
    assert_same((state.params, state.opt_state), (wanted.params, wanted.opt_state))
    assert_same(load_params(workdir).params, load_params(local).params)
    losses = [(line["step"], line.get("train/loss")) for line in read(workdir)]
    assert losses == [(line["step"], line.get("train/loss")) for line in read(local)]


def test_all_that_a_run_is(interrupted):
    workdir, _ = interrupted
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "tensorboard",
        "tokenizer.json",
    }
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert all(path.stat().length for path in (workdir / "tensorboard").iterdir())


def test_existing_run_needs_resume(interrupted, finished):
    with pytest.raises(FileExistsError, match=r"gs://bucket/runs/tiny: there is a run in it"):
        train(finished[0], interrupted[0])


def test_engine_and_first_parameters_from_a_bucket(interrupted, data, tmp_path):
    workdir, state = interrupted
    engine = blocktx.load(os.fspath(workdir))
    assert isinstance(engine.generate("block", max_new_tokens=4, seed=0), str)
    config = run_config(
        data.__class__(**{**vars(data), "tokenizer": f"{workdir}/tokenizer.json"}),
        steps=1,
        init_from=os.fspath(workdir),
        optimizer=dict(learning_rate=1e-30),
    )
    assert_same(train(config, tmp_path / "run").params, state.params)  # nothing is learned


def test_an_export_in_a_bucket(finished, bucket, tmp_path):
    _, workdir, _ = finished
    run, tokenizer = load_params(workdir), workdir / "tokenizer.json"
    write(tmp_path / "export", run.params, run.config, step=run.step, tokenizer=tokenizer)
    copy_folder(tmp_path / "export", bucket / "export")
    loaded = load_params("gs://bucket/export")
    assert (loaded.config, loaded.step) == (run.config, run.step)
    assert_same(loaded.params, run.params)
    assert load_tokenizer(loaded).fingerprint == load_tokenizer(run).fingerprint


def test_half_a_save_is_no_checkpoint(interrupted, bucket):
    """In a bucket nothing can be renamed: what a save has finished is marked by an object."""
    workdir, _ = interrupted
    step = sorted((workdir / "checkpoints").iterdir())[-1]
    names = {path.name for path in step.iterdir()}
    copy = bucket / "half" / "checkpoints" / step.name
    for name in names:
        if (step / name).is_dir():
            for path in (step / name).iterdir():
                if not path.is_dir():
                    write_atomic(copy / name / path.name, path.read_bytes())
        elif name != "commit_success.txt":
            write_atomic(copy / name, (step / name).read_bytes())
    assert "commit_success.txt" in names
    assert not has_checkpoint(bucket / "half")


def test_lines_are_there_when_flushed(bucket):
    path = bucket / "lines"
    lines = AppendLog(path, ["a"])
    lines.write("b")
    assert path.read_text() == "a\n"
    lines.flush()
    assert path.read_text() == "a\nb\n"
    lines.write("c")
    lines.close()
    assert path.read_text() == "a\nb\nc\n"


def test_copy_of_a_folder(bucket, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").write_bytes(b"\0\xff")
    copy_folder(tmp_path, bucket / "copy")
    assert (bucket / "copy" / "below" / "a").read_bytes() == b"\0\xff"
