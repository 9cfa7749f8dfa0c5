"""Checkpoints of a run: save, resume, and load only the parameters.

    workdir/config.json, workdir/tokenizer.json
    workdir/checkpoints/<step>/params      nested dict of arrays, names as in the model
                               opt_state   the optax state
                               data        JSON: where the input pipeline stands, and in what
                               metadata    JSON: format_version, blocktx_version, step, config

Orbax writes to a folder of another name and renames it when it is whole, so a folder named by its
step is a finished checkpoint.
"""

import dataclasses
import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, Sharding

from blocktx.checkpoint.folder import (
    blocktx_version,
    build_metadata,
    check_names_and_shapes,
    find,
    new_folder,
    read,
    read_metadata,
)
from blocktx.checkpoint.safetensors import is_safetensors, read_config, read_params
from blocktx.config import ModelConfig, RunConfig, to_dict
from blocktx.data import Tokenizer, copy_tokenizer
from blocktx.model import abstract_params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What of a checkpoint one needs to use a model."""

    params: dict[str, Any]
    config: RunConfig
    step: int
    path: epath.Path  # the folder of the step, or of the export


def save_params(
    workdir: epath.PathLike,
    config: RunConfig,
    params: dict[str, Any],
    step: int = 0,
    tokenizer: epath.PathLike | None = None,
) -> None:
    """Writes a new run folder with one checkpoint of parameters alone, all or nothing.

    `load_params` and `blocktx.load` read it; training cannot be resumed from it.

    Args:
      workdir: the folder, which must not exist.
      config: of the run; only `model` and the special tokens in `data` mean anything.
      params: nested dict of arrays, of numpy or JAX.
      step: the number that the checkpoint gets.
      tokenizer: a tokenizer.json to copy into the folder, with the files that accompany it.

    Raises:
      FileExistsError: if there is something at `workdir`.
    """
    with new_folder(workdir) as unfinished:
        (unfinished / "checkpoints").mkdir()
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                unfinished / "checkpoints" / str(step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    metadata=ocp.args.JsonSave(build_metadata(step, config, blocktx_version())),
                ),
            )
        (unfinished / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, unfinished)


def load_params(
    path: epath.PathLike,
    sharding: Mesh | Sharding | None = None,
    model: ModelConfig | None = None,
) -> Checkpoint:
    """The parameters of a checkpoint, whatever devices it was saved from; nothing else is read.

    Args:
      path: a run's folder or its `checkpoints` folder, which mean the newest checkpoint in them, or
        the folder of one step; or that of an export (`safetensors_folder`).
      sharding: where every array goes; or a mesh, over which they are spread by the rules of
        `blocktx.parallel.sharding`. None puts them on this process's first device.
      model: what the parameters have to fit, and in whose `param_dtype` they come; None: the
        checkpoint's own configuration.

    Raises:
      FileNotFoundError: if there is no such folder or no finished checkpoint in it.
      ValueError: if the checkpoint is not one of blocktx, of a newer format, does not fit the
        configuration (all that does not is listed), or is damaged.
    """
    exported = is_safetensors(path)
    folder, step, config = load_config(path)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = abstract_params(model or config.model, sharding)
    if exported:
        return Checkpoint(read_params(folder, params), config, step, folder)
    check_names_and_shapes(folder, params)
    params = read(folder, params=ocp.args.StandardRestore(params)).params
    return Checkpoint(params, config, step, folder)


def load_config(path: epath.PathLike) -> tuple[epath.Path, int, RunConfig]:
    """Return the folder, step and configuration of a checkpoint, as `load_params` finds it.

    Raises:
      FileNotFoundError, ValueError: as `load_params`.
    """
    if is_safetensors(path):
        folder = epath.Path(path).expanduser().absolute()
        return folder, *read_config(folder)
    folder = find(path)
    return folder, *read_metadata(folder)


def tokenizer_file(path: epath.PathLike) -> epath.Path:
    """Where a checkpoint has its tokenizer.json, if it has one; `path` is as for `load_params`."""
    folder = epath.Path(path).expanduser() if is_safetensors(path) else find(path).parent.parent
    return folder / "tokenizer.json"


def load_tokenizer(loaded: Checkpoint) -> Tokenizer:
    """The tokenizer that was saved with a checkpoint's run.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it lacks one of the run's special tokens.
    """
    file = tokenizer_file(loaded.path)
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: not found; a run's tokenizer stands beside its `checkpoints` folder"
        )
    data = loaded.config.data
    return Tokenizer.load(file, data.end_token, data.pad_token)
