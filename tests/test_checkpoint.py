"""Saving, resuming, loading parameters only, and a clear error for everything that can be wrong."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging

from blocktx.checkpoint import Checkpoints, load_params
from blocktx.checkpoint_folder import FORMAT_VERSION, abstract_params, find, local_workdir
from blocktx.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from blocktx.model_config import BlockConfig, StackConfig, VanillaConfig
from blocktx.optimizer import optimizer

STACK = StackConfig(layers=1, width=32, heads=4)
MODEL = BlockConfig(vocab_size=64, context_length=16, block_decoder=STACK, token_decoder=STACK)
CONFIG = RunConfig(model=MODEL, training=TrainingConfig(steps=10, keep_checkpoints=2))
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])
DATA = {"next_index": 7, "nested": {"names": ["a", "b"]}}


def new_params():
    """Made by NumPy: one compiled initialisation would cost more than all of a test."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract_params(MODEL, SHARDING)
    )


def save(workdir, steps=(3,)):
    params = new_params()
    opt_state = optimizer(CONFIG).init(params)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        for step in steps:
            checkpoints.save(step, params, opt_state, DATA)
    return params, opt_state


def restore(workdir, config=CONFIG):
    params = abstract_params(config.model, SHARDING)
    opt_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING),
        jax.eval_shape(optimizer(config).init, params),
    )
    with Checkpoints(workdir, config) as checkpoints:
        return checkpoints.restore(params, opt_state)


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def edit_metadata(workdir, **changes):
    (file,) = (pathlib.Path(workdir) / "checkpoints" / "3" / "metadata").glob("metadata")
    metadata = json.loads(file.read_text())
    metadata.update(changes)
    file.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))


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
    assert set(metadata) == {"format_version", "blocktx_version", "step", "config"}
    assert metadata["format_version"] == FORMAT_VERSION == 1
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


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        load_params(tmp_path / "nowhere")


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_folder_without_checkpoints(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load_params(tmp_path)


def test_restore_without_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        restore(tmp_path)


def test_checkpoint_of_something_else(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign", {"weight": jnp.ones(3)})
    with pytest.raises(ValueError, match="foreign: not a checkpoint of blocktx: no params"):
        load_params(tmp_path / "foreign")


def test_run_of_something_else(tmp_path):
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(1, args=ocp.args.Composite(params=ocp.args.StandardSave({"w": jnp.ones(3)})))
    with pytest.raises(ValueError, match="not a checkpoint of blocktx: no metadata"):
        load_params(tmp_path)


def test_metadata_of_something_else(workdir):
    edit_metadata(workdir, format_version=None)
    with pytest.raises(ValueError, match="not a checkpoint of blocktx: its metadata lacks"):
        load_params(workdir)


@pytest.mark.parametrize("version", ["1", 1.0, True, [1]])
def test_format_version_of_something_else(workdir, version):
    edit_metadata(workdir, format_version=version)
    with pytest.raises(ValueError, match="not a checkpoint of blocktx: its format_version is"):
        load_params(workdir)


def test_package_that_is_not_installed(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    save(tmp_path)
    metadata = tmp_path / "checkpoints" / "3" / "metadata" / "metadata"
    assert json.loads(metadata.read_text())["blocktx_version"] == "unknown"


@pytest.mark.parametrize("load", [load_params, restore])
def test_newer_format_version(workdir, load):
    edit_metadata(workdir, format_version=2, blocktx_version="9.0")
    with pytest.raises(ValueError, match=r"format_version is 2, .* reads up to 1; .* 9\.0 or new"):
        load(workdir)


def test_configuration_that_this_version_does_not_know(workdir):
    edit_metadata(workdir, config={"model": {"kind": "block"}, "secret": 1})
    with pytest.raises(ValueError, match=r"metadata: config\.secret: unknown field"):
        load_params(workdir)


def test_every_parameter_that_does_not_fit_is_named(tmp_path):
    params = new_params()
    params["token_decoder"]["expansion"]["kernel"] = jnp.zeros((5, 5))
    del params["embedder"]
    params["surplus"] = {"bias": jnp.zeros(2)}
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(3, params, {"count": jnp.zeros(())}, DATA)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_params(tmp_path)
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  embedder/tokens/embedding: checkpoint lacks it, configuration (64, 8)",
        "  surplus/bias: checkpoint (2,), configuration lacks it",
        "  token_decoder/expansion/kernel: checkpoint (5, 5), configuration (32, 2, 32)",
    ]
    with pytest.raises(ValueError, match="surplus/bias"):
        restore(tmp_path)


def test_opt_state_of_another_optimizer(workdir):
    params = abstract_params(MODEL, SHARDING)
    with (
        Checkpoints(workdir, CONFIG) as checkpoints,
        pytest.raises(ValueError, match=r"cannot read .*opt_state"),
    ):
        checkpoints.restore(params, {"momentum": params})


def data_files(folder):
    return [file for file in folder.rglob("*") if file.is_file() and file.parent.name == "d"]


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore's
@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
@pytest.mark.parametrize("files", ["arrays", "manifest.ocdbt", "_METADATA"])
def test_damaged_parameters(workdir, damage, files):
    folder = workdir / "checkpoints" / "3" / "params"
    chosen = data_files(folder) if files == "arrays" else [folder / files]
    assert chosen
    for file in chosen:
        damage(file)
    with pytest.raises(ValueError, match="checkpoints/3: cannot read params, a file may be dam"):
        load_params(workdir)


def test_damaged_metadata(workdir):
    truncate(workdir / "checkpoints" / "3" / "metadata" / "metadata")
    with pytest.raises(ValueError, match="checkpoints/3: cannot read metadata"):
        load_params(workdir)


def test_damaged_opt_state(workdir):
    for file in data_files(workdir / "checkpoints" / "3" / "opt_state"):
        truncate(file)
    with pytest.raises(ValueError, match=r"checkpoints/3: cannot read .*opt_state"):
        restore(workdir)


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
from tests.test_checkpoint import CONFIG, DATA, new_params
from blocktx.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], CONFIG) as checkpoints:
    checkpoints.save(9, new_params(), {"big": jnp.ones((1 << 26,))}, DATA)
"""


def test_save_cut_off_by_sigkill(workdir):
    root = pathlib.Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", KILLED, workdir], cwd=root)
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
from tests.test_checkpoint import CONFIG, DATA, new_params
from blocktx.checkpoint import Checkpoints
from blocktx.optimizer import optimizer
mesh = jax.make_mesh((8,), ("x",))
put = lambda x: jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim and x.shape[0] % 8 == 0
                                                else P()))
state = jax.tree.map(put, (new_params(), optimizer(CONFIG).init(new_params())))
with Checkpoints(sys.argv[1], CONFIG) as checkpoints:
    checkpoints.save(3, *state, DATA)
"""
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", script, tmp_path], cwd=root, env=environment, check=True)
    logging.set_verbosity(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for params in (load_params(tmp_path).params, restore(tmp_path).params):
            assert {x.sharding for x in jax.tree.leaves(params)} == {SHARDING}
            assert_same(params, new_params())
    assert capfd.readouterr() == ("", "")


def changed(**sections):
    return dataclasses.replace(CONFIG, **sections)


def test_resume_names_every_field_that_must_not_change(workdir):
    config = changed(
        model=dataclasses.replace(MODEL, initializer_range=0.5),
        data=DataConfig(holdout_every=7),
        training=dataclasses.replace(CONFIG.training, batch_size=4),
        seed=4,
    )
    with pytest.raises(ValueError, match="must not change these fields:\n") as error:
        restore(workdir, config)
    assert str(error.value).splitlines()[1:] == [
        "  config.data.holdout_every: checkpoint 20, now 7",
        "  config.model.initializer_range: checkpoint 0.02, now 0.5",
        "  config.seed: checkpoint 0, now 4",
        "  config.training.batch_size: checkpoint 16, now 4",
    ]


def test_resume_may_change_training_optimizer_and_cache(workdir):
    config = changed(
        data=DataConfig(cache_dir="/elsewhere"),
        training=TrainingConfig(steps=99, microbatches=4),
        optimizer=OptimizerConfig(learning_rate=0.5, clip_norm=0.0, schedule="cosine"),
    )
    assert restore(workdir, config).step == 3


def test_workdir_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        with pytest.raises(NotADirectoryError, match=f"cannot make {tmp_path}/{place}: .*/file is"):
            local_workdir(tmp_path / place)
    with pytest.raises(ValueError, match="gs://bucket/run is not a local folder"):
        local_workdir("gs://bucket/run")
    assert local_workdir(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root
    with pytest.raises(PermissionError, match=f"cannot write to {tmp_path}/run"):
        local_workdir(tmp_path / "run")


def test_resume_names_fields_of_another_kind_of_model(workdir):
    config = changed(model=VanillaConfig(vocab_size=64, context_length=16, decoder=STACK))
    with pytest.raises(ValueError, match=re.escape("config.model.kind: checkpoint 'block'")) as e:
        restore(workdir, config)
    assert "config.model.decoder.layers: checkpoint 'lacks it', now 1" in str(e.value)


def test_saving_and_loading_say_nothing(tmp_path, capfd):
    logging.set_verbosity(logging.WARNING)
    save(tmp_path)
    load_params(tmp_path)
    assert capfd.readouterr() == ("", "")
