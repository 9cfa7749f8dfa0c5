"""A clear error for everything that can be wrong with a checkpoint."""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import shutil

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from blocktx.checkpoint.manager import Checkpoints
from blocktx.checkpoint.params import load_params
from blocktx.config.model import VanillaConfig
from blocktx.config.run import DataConfig, OptimizerConfig, TrainingConfig
from blocktx.model.build import abstract_params
from tests.helpers.saved_run import (
    CONFIG,
    DATA,
    MODEL,
    SHARDING,
    STACK,
    edit_metadata,
    new_params,
    restore,
    save,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with a checkpoint of step 3, to be copied before it is changed."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    save(workdir)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


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
    edit_metadata(workdir, format_version=3, blocktx_version="9.0")
    with pytest.raises(ValueError, match=r"format_version is 3, .* reads up to 2; .* 9\.0 or new"):
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


def changed(**sections):
    return dataclasses.replace(CONFIG, **sections)


def test_resume_names_every_field_that_must_not_change(workdir):
    config = changed(
        model=dataclasses.replace(MODEL, prefix_length=3, initializer_range=0.5),
        data=DataConfig(holdout_every=7),
        training=dataclasses.replace(CONFIG.training, batch_size=4),
        seed=4,
    )
    with pytest.raises(ValueError, match="must not change these fields:\n") as error:
        restore(workdir, config)
    assert str(error.value).splitlines()[1:] == [
        "  config.data.holdout_every: checkpoint 20, now 7",
        "  config.model.prefix_length: checkpoint 2, now 3",
        "  config.seed: checkpoint 0, now 4",
        "  config.training.batch_size: checkpoint 16, now 4",
    ]


def test_resume_may_change_training_optimizer_and_cache(workdir):
    config = changed(
        model=dataclasses.replace(MODEL, initializer_range=0.5, platform="tpu", remat="full"),
        data=DataConfig(cache_dir="/elsewhere", source="elsewhere.txt", tokenizer="elsewhere.json"),
        training=TrainingConfig(steps=99, microbatches=4),
        optimizer=OptimizerConfig(learning_rate=0.5, clip_norm=0.0, schedule="cosine"),
    )
    assert restore(workdir, config).step == 3


def test_resume_names_fields_of_another_kind_of_model(workdir):
    config = changed(model=VanillaConfig(vocab_size=64, context_length=16, decoder=STACK))
    with pytest.raises(ValueError, match=re.escape("config.model.kind: checkpoint 'block'")) as e:
        restore(workdir, config)
    assert "config.model.decoder.layers: checkpoint 'lacks it', now 1" in str(e.value)
