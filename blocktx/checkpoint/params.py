"""Parameters of checkpoints and exports: load, save.

    workdir/config.json, workdir/tokenizer.json
    workdir/checkpoints/<step>/params      nested dict of arrays, names as in the model
                               opt_state   the optax state
                               data        JSON: state of the input pipeline, digest of the corpus
                               metadata    JSON: format_version, blocktx_version, step, config,
                                           digests of arrays, data, tokenizer.json, and of itself

Orbax writes to a folder of another name and renames it when it is complete, so a folder named by
its step is a finished checkpoint.
"""

import dataclasses
import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, Sharding

from blocktx.checkpoint import safetensors
from blocktx.checkpoint.digest import file_digest, measure
from blocktx.checkpoint.folder import find, new_folder, read_metadata, read_params
from blocktx.checkpoint.metadata import Metadata, blocktx_version, build_metadata, require_finite
from blocktx.checkpoint.safetensors import is_safetensors
from blocktx.config import ModelConfig, RunConfig, UserError, to_saved, user_errors
from blocktx.data import Tokenizer, copy_tokenizer
from blocktx.files import absolute
from blocktx.model import abstract_params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters and configuration of a checkpoint."""

    params: dict[str, Any]
    config: RunConfig
    step: int
    path: epath.Path  # the folder of the step, or of the export
    tokenizer_digest: str | None = None  # of tokenizer.json, if one was saved with it


def save_params(
    workdir: epath.PathLike,
    config: RunConfig,
    params: dict[str, Any],
    step: int = 0,
    tokenizer: epath.PathLike | None = None,
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Write a new run folder with one checkpoint of parameters alone, whole or not at all.

    `load_params` and `blocktx.load` read it. Training cannot be resumed from it.

    Args:
      workdir: the folder, which must not exist.
      config: of the run; only `model` and the special tokens in `data` matter.
      params: nested dict of NumPy or JAX arrays.
      step: the number of the checkpoint.
      tokenizer: a tokenizer.json to copy into the folder, with the files that accompany it.
      allow_nonfinite: whether NaN and infinity are accepted.

    Raises:
      FileExistsError: `workdir` exists.
      UserError: a parameter is not finite.
    """
    arrays, nonfinite = measure({"params": params})
    require_finite(str(workdir), nonfinite, allow_nonfinite)
    with new_folder(workdir) as unfinished:
        (unfinished / "checkpoints").mkdir()
        if tokenizer is not None:
            copy_tokenizer(tokenizer, unfinished)
        digest = file_digest(unfinished / "tokenizer.json")
        metadata = build_metadata(step, config, blocktx_version(), arrays, tokenizer=digest)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                unfinished / "checkpoints" / str(step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), metadata=ocp.args.JsonSave(metadata)
                ),
            )
        (unfinished / "config.json").write_text(json.dumps(to_saved(config), indent=2) + "\n")


def load_params(
    path: epath.PathLike,
    sharding: Mesh | Sharding | None = None,
    model: ModelConfig | None = None,
    *,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> Checkpoint:
    """Load the parameters of a checkpoint onto any devices. Nothing else of it is read.

    Args:
      path: a run folder or its `checkpoints` folder, for the newest checkpoint; the folder of one
        step; or an export (`blocktx.checkpoint.safetensors`).
      sharding: sharding of every array; or a mesh, on which the rules of
        `blocktx.parallel.sharding` apply. None: this process's first device.
      model: the configuration that the parameters must fit, and whose `param_dtype` they get. None:
        the checkpoint's own.
      verify: whether to compare digests of the arrays with those in the metadata, which takes one
        pass over the arrays.
      allow_nonfinite: whether NaN and infinity are accepted.

    Raises:
      FileNotFoundError: there is no such folder or no finished checkpoint in it.
      UserError: the checkpoint is not of blocktx, of a newer format, does not fit the configuration
        (all differences are listed), is not finite, or is damaged.
    """
    folder, metadata = _find_metadata(path, verify)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = abstract_params(model or metadata.config.model, sharding)
    read = safetensors.read_params if is_safetensors(path) else read_params
    params = read(folder, metadata, wanted, verify=verify, allow_nonfinite=allow_nonfinite)
    return Checkpoint(params, metadata.config, metadata.step, folder, metadata.tokenizer)


def load_config(path: epath.PathLike) -> tuple[epath.Path, int, RunConfig]:
    """Return the folder, step and configuration of a checkpoint, as `load_params` finds it.

    Raises:
      FileNotFoundError, UserError: as `load_params`.
    """
    folder, metadata = _find_metadata(path, verify=True)
    return folder, metadata.step, metadata.config


def _find_metadata(path: epath.PathLike, verify: bool) -> tuple[epath.Path, Metadata]:
    folder = absolute(path)
    if is_safetensors(folder):
        return folder, safetensors.read_metadata(folder, verify=verify)
    folder = find(folder)
    return folder, read_metadata(folder, verify=verify)


def tokenizer_file(path: epath.PathLike) -> epath.Path:
    """Return the path that a checkpoint's tokenizer.json has, if it has one.

    Args:
      path: as for `load_params`.
    """
    folder = epath.Path(path).expanduser() if is_safetensors(path) else find(path).parent.parent
    return folder / "tokenizer.json"


def load_tokenizer(loaded: Checkpoint, *, verify: bool = True) -> Tokenizer:
    """Load the tokenizer that was saved with a checkpoint's run.

    Args:
      loaded: the checkpoint.
      verify: whether it must be the one that was saved with the checkpoint.

    Raises:
      FileNotFoundError: there is none.
      UserError: it lacks one of the run's special tokens, is not the one that the checkpoint was
        saved with, or has more ids than the model.
    """
    file = tokenizer_file(loaded.path)
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: not found; a run's tokenizer stands beside its `checkpoints` folder; "
            "launch/convert.py add-tokenizer adds one"
        )
    if verify and loaded.tokenizer_digest not in (None, file_digest(file)):
        raise UserError(f"{file}: not the tokenizer that {loaded.path} was saved with; restore it")
    data, rows = loaded.config.data, loaded.config.model.vocab_size
    with user_errors():
        tokenizer = Tokenizer.load(file, data.end_token, data.pad_token)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{file}: has {tokenizer.vocab_size} ids, and the model {rows} (config.model.vocab_"
            "size); it is the tokenizer of another model"
        )
    return tokenizer
