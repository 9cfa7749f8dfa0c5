"""Runs in a bucket of Google Cloud, served on this machine by an emulator of its JSON API."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from test_train_endings import send_at_step
from tiny_run import run_config

import blocktx
from blocktx import metrics
from blocktx.checkpoint import load_params
from blocktx.checkpoint_folder import has_checkpoint
from blocktx.run_folder import Lines, copy_folder, write_whole
from blocktx.train import train

EMULATOR = pathlib.Path(sys.executable).with_name("gcp-storage-emulator")


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.fixture(scope="module")
def bucket():
    """A bucket of which all that reads and writes them knows: gcsfs, tensorstore, Google's own."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = [f"--port={port}", "--host=127.0.0.1", "--in-memory", "--default-bucket=bucket"]
    emulator = subprocess.Popen(
        [EMULATOR, "start", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING")
    before = {name: os.environ.get(name) for name in names}
    os.environ |= {names[0]: url, names[1]: url, names[2]: "token"}
    try:
        end = time.monotonic() + 20
        while True:
            with socket.socket() as server:
                if server.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < end, "the emulator did not start"
            time.sleep(0.05)
        yield epath.Path("gs://bucket")
    finally:
        emulator.kill()
        emulator.wait()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@pytest.fixture(scope="module")
def interrupted(finished, bucket):
    """The run of `finished`, in a bucket, stopped after step 3 and resumed; its folder."""
    config, _, _ = finished
    workdir = bucket / "runs" / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, 3, 15)
        with pytest.raises(SystemExit) as stopped:
            train(config, workdir)
    assert stopped.value.code == 143
    assert load_params(workdir).step == 3
    return workdir, train(config, os.fspath(workdir), resume=True)


def test_resuming_is_exact(interrupted, finished):
    workdir, state = interrupted
    _, local, wanted = finished
    assert_same((state.params, state.opt_state), (wanted.params, wanted.opt_state))
    assert_same(load_params(workdir).params, load_params(local).params)
    losses = [(line["step"], line.get("train/loss")) for line in metrics.read(workdir)]
    assert losses == [(line["step"], line.get("train/loss")) for line in metrics.read(local)]


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
        optimizer=dict(learning_rate=0.0, warmup_steps=0),
    )
    assert_same(train(config, tmp_path / "run").params, state.params)


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
                    write_whole(copy / name / path.name, path.read_bytes())
        elif name != "commit_success.txt":
            write_whole(copy / name, (step / name).read_bytes())
    assert "commit_success.txt" in names
    assert not has_checkpoint(bucket / "half")


def test_lines_are_there_when_flushed(bucket):
    path = bucket / "lines"
    lines = Lines(path, ["a"])
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
