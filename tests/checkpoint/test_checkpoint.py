"""Saving, resuming, loading parameters only, and saves that are cut off."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from absl import logging

from blocktx.checkpoint.folder import FORMAT_VERSION, find
from blocktx.checkpoint.params import load_params
from tests.helpers.fake_devices import fake_devices
from tests.helpers.processes import started
from tests.helpers.saved_run import CONFIG, DATA, SHARDING, assert_same, new_params, restore, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with a checkpoint of step 3, to be copied before it is changed."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    save(workdir)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def test_restore_gives_back_everything(tmp_path):
    params, opt_state = save(tmp_path)
    opt_state = jax.tree.map(jnp.asarray, opt_state)
    resumed = restore(tmp_path)
    assert_same(resumed.params, params)
    assert_same(resumed.opt_state, opt_state)
    assert (resumed.step, resumed.data) == (3, DATA)


def test_layout_is_the_documented_one(workdir):
    folder = workdir / "checkpoints" / "3"
    items = {"params", "opt_state", "data", "metadata"}
    assert {child.name for child in folder.iterdir() if child.is_dir()} == items
    metadata = json.loads((folder / "metadata" / "metadata").read_text())
    assert set(metadata) == {
        *("format_version", "blocktx_version", "step", "config"),
        *("arrays", "data", "tokenizer", "digest"),
    }
    assert metadata["format_version"] == FORMAT_VERSION == 2
    assert metadata["config"]["model"]["kind"] == "block"


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, steps=(1, 2, 3))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]
    assert find(tmp_path).name == "3"


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/3"])
def test_load_params_from_run_checkpoints_or_step_folder(workdir, inside):
    checkpoint = load_params(workdir / inside)
    assert_same(checkpoint.params, new_params())
    assert checkpoint.config == CONFIG
    assert checkpoint.step == 3
    assert pathlib.Path(checkpoint.path) == workdir / "checkpoints" / "3"


def test_load_params_works_without_opt_state_and_data(workdir):
    shutil.rmtree(workdir / "checkpoints" / "3" / "opt_state")
    shutil.rmtree(workdir / "checkpoints" / "3" / "data")
    assert_same(load_params(workdir).params, new_params())


def test_others_can_load_params_with_orbax_alone(workdir):
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(workdir / "checkpoints" / "3" / "params")
    assert_same(params, new_params())


def test_half_written_checkpoint_is_not_picked_up(workdir):
    root = workdir / "checkpoints"
    half = shutil.copytree(root / "3", root / "9.orbax-checkpoint-tmp")
    for marker in pathlib.Path(half).rglob("commit_success.txt"):
        marker.unlink()
    assert load_params(workdir).step == 3
    with pytest.raises(FileNotFoundError, match="never finished"):
        load_params(half)
    assert restore(workdir).step == 3
    assert os.listdir(root) == ["3"]  # and training removes it


KILLED = """
import sys, jax.numpy as jnp
from tests.helpers.saved_run import CONFIG, DATA, new_params
from blocktx.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], CONFIG) as checkpoints:
    checkpoints.save(9, new_params(), {"big": jnp.ones((1 << 26,))}, DATA)
"""


def test_save_cut_off_by_sigkill(workdir):
    root = pathlib.Path(__file__).parents[2]
    with started([[sys.executable, "-c", KILLED, workdir]], cwd=root) as (process,):
        while not list((workdir / "checkpoints").glob("9*")):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert load_params(workdir).step == 3
    assert restore(workdir).step == 3


def test_checkpoint_saved_on_other_devices(tmp_path, capfd):
    """Saved sharded over eight devices, loaded and resumed on one, without warnings."""
    script = """
import sys, jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.helpers.saved_run import CONFIG, DATA, new_params
from blocktx.checkpoint import Checkpoints
from blocktx.train.optimizer import optimizer
mesh = jax.make_mesh((8,), ("x",))
put = lambda x: jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim and x.shape[0] % 8 == 0
                                                else P()))
state = jax.tree.map(put, (new_params(), optimizer(CONFIG).init(new_params())))
with Checkpoints(sys.argv[1], CONFIG) as checkpoints:
    checkpoints.save(3, *state, DATA)
"""
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | fake_devices(8)
    subprocess.run([sys.executable, "-c", script, tmp_path], cwd=root, env=environment, check=True)
    logging.set_verbosity(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for params in (load_params(tmp_path).params, restore(tmp_path).params):
            assert {x.sharding for x in jax.tree.leaves(params)} == {SHARDING}
            assert_same(params, new_params())
    assert capfd.readouterr() == ("", "")


def test_saving_and_loading_say_nothing(tmp_path, capfd):
    logging.set_verbosity(logging.WARNING)
    save(tmp_path)
    load_params(tmp_path)
    assert capfd.readouterr() == ("", "")
