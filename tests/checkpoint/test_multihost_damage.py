"""Damage that one process alone sees: all processes take the same older checkpoint, or none."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.helpers.fake_devices import fake_devices
from tests.helpers.processes import started

ROOT = pathlib.Path(__file__).parents[2]
PROCESS = """
import dataclasses, sys
from blocktx.parallel import create_mesh, initialize

address, index, workdir = sys.argv[1:]
initialize("auto", address, 2, int(index), heartbeat_timeout=100)
import jax, numpy as np
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("connected")  # the processes find each other in 30 s, or never
from blocktx.checkpoint import Checkpoints, DamagedError, load_params, manager
from blocktx.config import MeshConfig
from blocktx.model.build import abstract_params
from tests.helpers.saved_run import CONFIG, MODEL, new_params

first = jax.process_index() == 0
config = dataclasses.replace(
    CONFIG, training=dataclasses.replace(CONFIG.training, keep_checkpoints=9)
)
mesh = create_mesh(MeshConfig())
like = abstract_params(MODEL, mesh)

def globally(x, like):
    return jax.make_array_from_callback(x.shape, like.sharding, lambda part: np.asarray(x)[part])

params = jax.tree.map(globally, new_params(), like)
read, measure = manager.read, manager.measure

def read_with(errors):
    def patched(folder, **items):
        if folder.name in errors and "params" in items:
            raise errors[folder.name]
        return read(folder, **items)
    return patched

def measured_wrong(tree):
    digests, wrong = measure(tree)
    return digests | {name: "wrong" for name in list(digests)[:1]}, wrong

def restore(name):
    with Checkpoints(workdir, config) as checkpoints:
        try:
            result = checkpoints.restore(like, {"mu": like}).step
        except Exception as error:
            result = type(error).__name__
    print(name, result, flush=True)
    manager.read, manager.measure = read, measure

with jax.set_mesh(mesh):
    with Checkpoints(workdir, config) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, params, {"mu": params}, {})
    restore("whole")
    if not first:
        manager.read = read_with({"4": DamagedError("")})
    restore("read")
    if not first:
        calls = []
        def measured(tree):
            calls.append(1)
            return (measured_wrong if len(calls) == 1 else measure)(tree)
        manager.measure = measured
    restore("digest")
    manager.read = read_with({"2": DamagedError("") if first else ConnectionError("")})
    restore("network")
    manager.read = read_with({"2": DamagedError("")} if first else {"1": DamagedError("")})
    restore("all")
    got = load_params(workdir, mesh)
    restore("again")
"""


@pytest.mark.slow
def test_all_processes_take_the_same_checkpoint(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    env = os.environ | fake_devices(2) | {"PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", PROCESS, address, i, tmp_path / "run"] for i in range(2)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with started(commands, env=env, **pipes) as processes:
        found = [process.communicate(timeout=550) for process in processes]
    errors = "".join(err for _, err in found)
    results = [
        [line.split() for line in out.splitlines() if not line.startswith("[Gloo]")]
        for out, _ in found
    ]
    same = [["whole", "4"], ["read", "3"], ["digest", "2"]]
    for lines in results:
        assert lines[:3] == same, errors
        assert lines[4:] == [["all", "DamagedError"], ["again", "2"]], errors
    assert [lines[3][1] for lines in results] == ["RuntimeError", "ConnectionError"], errors
    assert "checkpoints/4: process 1 could not read it; its own message says why" in errors
    assert {p.name[:2] for p in (tmp_path / "run" / "set_aside").iterdir()} == {"4-", "3-"}
    for process in processes:
        assert process.returncode == 0, errors
