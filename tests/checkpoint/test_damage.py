"""Changes of a finished checkpoint are found, and an older whole one is used in its place."""

import errno
import json
import os
import pathlib
import random
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocktx.checkpoint import manager
from blocktx.checkpoint.digest import _device_rows, _host_row, measure
from blocktx.checkpoint.errors import DamagedError, is_transient
from blocktx.checkpoint.folder import find, read
from blocktx.checkpoint.manager import Checkpoints
from blocktx.checkpoint.params import load_params, save_params
from blocktx.config.errors import UserError, is_storage_full
from tests.helpers.saved_run import (
    CONFIG,
    assert_same,
    edit_metadata,
    new_params,
    restore,
    save,
)

# When a read fails, Orbax closes its event loop, and TensorStore reports the other reads to it when
# they end, perhaps during the next test.
pytestmark = pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")

ARRAYS = [
    np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7,
    np.array([1.5, -2, 0], np.float16),
    np.array(3, np.int32),
    np.array([True, False]),
    np.zeros((0, 4), np.float32),
    np.arange(5, dtype=np.uint8),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with checkpoints of steps 2 and 3, to be copied before it is changed."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    save(workdir, steps=(2, 3))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def test_digests_are_the_same_on_host_and_device():
    arrays = [*ARRAYS, jnp.arange(7, dtype=jnp.bfloat16)]
    rows = np.asarray(_device_rows([jnp.asarray(x) for x in arrays]))
    for x, row in zip(arrays, rows, strict=True):
        assert _host_row(np.asarray(x)) == tuple(row.tolist())


def test_every_flipped_bit_and_every_swap_changes_a_digest():
    x = ARRAYS[0]
    digests = {measure({"x": x})[0]["x"]}
    for bit in range(x.nbytes * 8):
        changed = bytearray(x.tobytes())
        changed[bit // 8] ^= 1 << bit % 8
        digests.add(measure({"x": np.frombuffer(changed, x.dtype).reshape(x.shape)})[0]["x"])
    for other in (x[::-1], x.reshape(3, 2, 4), x.astype(np.float64), x.view(np.int32)):
        digests.add(measure({"x": np.ascontiguousarray(other)})[0]["x"])
    assert len(digests) == 1 + x.nbytes * 8 + 4


def test_arrays_that_are_not_finite_are_named():
    tree = {"a": {"b": np.array([1, np.inf], np.float32)}, "c": jnp.ones(3)}
    assert measure(tree)[1] == ["a/b"]


def damage_arrays(folder):
    files = [file for file in folder.rglob("*") if file.is_file() and file.parent.name == "d"]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_flipped_bit_is_found_or_harmless(saved, tmp_path):
    """Random bits of all files of a checkpoint: an error, or the same state."""
    rng = random.Random(0)
    wanted = restore(shutil.copytree(saved, tmp_path / "wanted"))
    files = sorted(p for p in (saved / "checkpoints" / "3").rglob("*") if p.is_file())
    for trial in range(12):
        workdir = pathlib.Path(shutil.copytree(saved, tmp_path / f"run{trial}"))
        shutil.rmtree(workdir / "checkpoints" / "2")
        file = workdir / rng.choice(files).relative_to(saved)
        content = bytearray(file.read_bytes())
        if not content:
            continue
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        try:
            got = restore(workdir)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        else:
            message = str(workdir)
            assert_same((got.params, got.opt_state), (wanted.params, wanted.opt_state))
            assert (got.data, got.step) == (wanted.data, wanted.step)
        assert str(workdir) in message


def test_changed_weights_are_found_where_storage_notices_nothing(workdir):
    """Both checkpoints are whole to Orbax, but the arrays of one are under the name of another."""
    params = new_params()
    params["embedder"]["tokens"]["embedding"] = params["embedder"]["tokens"]["embedding"] + 1
    other = workdir.parent / "other"
    save_params(other, CONFIG, params, step=3)
    folder = workdir / "checkpoints" / "3"
    shutil.rmtree(folder / "params")
    shutil.copytree(other / "checkpoints" / "3" / "params", folder / "params")
    with pytest.raises(DamagedError, match=r"digest differs\): embedder/tokens/embedding;"):
        load_params(folder)
    assert load_params(folder, verify=False).step == 3


def test_resuming_falls_back_to_the_checkpoint_before(workdir, capsys):
    damage_arrays(workdir / "checkpoints" / "3" / "params")
    resumed = restore(workdir)
    assert resumed.step == 2
    assert_same(resumed.params, new_params())
    err = capsys.readouterr().err
    assert "checkpoints/3: cannot read" in err
    assert "trying the checkpoint before it" in err
    assert "TensorStore({" not in err  # its own account of an array is 30 lines long
    assert err.count("\n") < 6
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]
    (aside,) = (workdir / "set_aside").iterdir()  # nothing is lost
    assert aside.name.startswith("3-")
    damage_arrays(workdir / "checkpoints" / "2" / "params")
    with pytest.raises(DamagedError, match="checkpoints/2: cannot read"):
        restore(workdir)


def test_a_chosen_step(workdir):
    params, opt_state = new_params(), None
    missing = pytest.raises(FileNotFoundError, match="no checkpoint of step 1; 2, 3")
    with Checkpoints(workdir, CONFIG) as checkpoints, missing:
        checkpoints.restore(params, opt_state, 1)
    assert restore(workdir, step=2).step == 2
    with Checkpoints(workdir, CONFIG) as checkpoints:  # a save of step 3 is not skipped
        checkpoints.save(3, params, {"count": jnp.zeros(())}, {})
    assert find(workdir).name == "3"


def test_an_incomplete_config_is_refused(workdir):
    file = workdir / "checkpoints" / "3" / "metadata" / "metadata"
    config = json.loads(file.read_text())["config"]
    del config["model"]["conditioning"]
    edit_metadata(workdir, config=config)
    with pytest.raises(ValueError, match=r"config\.model\.conditioning: missing"):
        load_params(workdir)


@pytest.mark.parametrize("change", [dict(step=4), dict(arrays={}), dict(digest=None)])
def test_changed_metadata_are_refused(change, workdir):
    edit_metadata(workdir, **change)
    with pytest.raises(DamagedError, match="changed after it was written"):
        load_params(workdir)


def test_the_platform_of_the_writer_is_not_kept(workdir, tmp_path):
    file = workdir / "checkpoints" / "3" / "metadata" / "metadata"
    config = json.loads(file.read_text())["config"]
    assert config["model"]["platform"] == "auto"
    config["model"]["platform"] = "tpu"  # as older versions have written it
    edit_metadata(workdir, config=config)
    assert load_params(workdir).config.model.platform == "auto"


def test_parameters_alone_cannot_be_resumed(tmp_path):
    save_params(tmp_path / "run", CONFIG, new_params(), step=3)
    with pytest.raises(UserError, match=r"parameters alone.*--config\.training\.init_from="):
        restore(tmp_path / "run")


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    params = jax.tree.map(np.array, new_params())
    params["embedder"]["tokens"]["embedding"][0] = np.nan
    with pytest.raises(UserError, match="NaN or infinity in params/embedder/tokens/embedding;"):
        save_params(tmp_path / "run", CONFIG, params)
    assert not (tmp_path / "run").exists()
    save_params(tmp_path / "run", CONFIG, params, allow_nonfinite=True)
    with pytest.raises(UserError, match="NaN or infinity in embedder/tokens/embedding;"):
        load_params(tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        ValueError("UNAVAILABLE: Error reading gs://bucket/x"),
        ValueError("RESOURCE_EXHAUSTED: quota"),
        jax.errors.JaxRuntimeError("INTERNAL: ..."),
    ],
)
def test_errors_of_a_network_are_not_damage(error, workdir, monkeypatch):
    def restoring(*_, **__):
        raise error

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", restoring)
    with pytest.raises(type(error)) as caught:
        read(find(workdir))
    assert caught.value is error
    assert is_transient(error)
    assert not isinstance(caught.value, UserError)


def test_a_full_disk_is_one_clear_error(workdir, monkeypatch):
    full = OSError(28, "No space left on device")
    assert is_storage_full(full)
    assert is_storage_full(ValueError("Error writing: No space left on device [...]"))
    assert not is_storage_full(ValueError("else"))

    def saving(*_, **__):
        raise ValueError("checkpoint write failed") from full

    monkeypatch.setattr(manager.ocp.CheckpointManager, "save", saving)
    refused = pytest.raises(UserError, match=r"no space left for a checkpoint; last whole.*3; make")
    with Checkpoints(workdir, CONFIG) as checkpoints, refused:
        checkpoints.save(4, new_params(), {}, {})


@pytest.mark.parametrize("folder", ["4.", "opt_state."])
def test_a_folder_that_cannot_be_created_leaves_no_thread(folder, workdir, monkeypatch):
    """Such a thread would block the end of any program that trains."""
    mkdir, before = os.mkdir, set(threading.enumerate())

    def full(path, *args, **options):
        if pathlib.Path(path).name.startswith(folder):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        mkdir(path, *args, **options)

    refused = pytest.raises(UserError, match=r"no space left for a checkpoint; last whole.*3; make")
    with refused, monkeypatch.context() as patch, Checkpoints(workdir, CONFIG) as checkpoints:
        patch.setattr(os, "mkdir", full)
        checkpoints.save(4, new_params(), {"count": jnp.ones(2)}, {})
    left = [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
    for thread in left:
        thread.join(10)
    assert not [thread for thread in left if thread.is_alive()]
    assert find(workdir).name == "3"
