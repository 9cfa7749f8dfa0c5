"""Chosen steps of a run are traced, whichever of them it takes."""

import json
import os
import subprocess
import sys
import types

import jax
import pytest

import blocktx.train.trace as trace
from blocktx.config.conversion import to_dict
from blocktx.config.errors import UserError
from blocktx.train.trace import StepTrace


@pytest.mark.parametrize(
    ("taken", "traced"),
    [
        (range(0, 8), range(3, 5)),
        (range(4, 8), range(4, 5)),  # resumed in the middle
        (range(0, 4), range(3, 4)),  # ended in the middle
        (range(5, 8), range(0)),
        (range(0, 2), range(0)),
    ],
)
def test_traced_steps(taken, traced, tmp_path, monkeypatch):
    steps = []

    def start(folder):
        steps.append([])
        (tmp_path / "told").write_text(folder)

    def stop():
        with open((tmp_path / "told").read_text() + "/trace", "w") as file:
            file.write(str(steps[-1]))

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    with StepTrace(tmp_path / "profile", range(3, 5)) as tracing:
        for step in taken:
            tracing.before(step, None)
            if steps and not (tmp_path / "profile").exists():
                steps[-1].append(step)
    assert steps == ([list(traced)] if traced else [])
    written = tmp_path / "profile" / "trace"
    assert (written.read_text() == str(list(traced))) if traced else not written.exists()


def test_a_libtpu_that_crashes_the_profiler_is_refused(monkeypatch):
    versions = {"libtpu": "0.0.52", "jax": "0.10.2"}
    monkeypatch.setattr(trace.importlib.metadata, "version", versions.__getitem__)
    needed = ["ml_dtypes>=0.5", 'libtpu==0.0.42.*; extra == "tpu"']
    monkeypatch.setattr(trace.importlib.metadata, "requires", lambda _: needed)
    settings = types.SimpleNamespace(jax_platforms=None)
    monkeypatch.setattr(trace.jax, "config", settings)
    with pytest.raises(UserError, match=r"libtpu 0\.0\.52 is installed, and jax .* needs 0\.0\.42"):
        trace.require_matching_libtpu()
    versions["libtpu"] = "0.0.42.1"
    trace.require_matching_libtpu()


def test_a_run_writes_its_trace(finished, tmp_path):
    config, _, _ = finished
    # In a process of its own: in one where libtpu has compiled for a TPU that is not there, as for
    # tests of `blocktx.compile.aot`, tracing ends in a segmentation fault.
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    code = (
        "import json, sys; from blocktx.config import from_config_dict; "
        "from blocktx.train import train; "
        "config = from_config_dict(json.load(open(sys.argv[1]))); "
        "train(config, sys.argv[2], profile=range(2, 3))"
    )
    command = [sys.executable, "-c", code, tmp_path / "config.json", tmp_path / "run"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
