"""A model in one file that any framework reads: model.safetensors, config.json, tokenizer.json.

    DIR/model.safetensors   the parameters, named by their paths, as in `embedder/tokens/embedding`
        config.json         the run's configuration, as in a run's folder
        tokenizer.json      if the run has one

`python launch/convert.py to-safetensors` writes it; the metadata in model.safetensors are `format`
("blocktx"), `format_version`, `blocktx_version` and `step`. `blocktx.load`, `blocktx.load_params`
and all that is built on them take DIR like a run's folder, and so does `training.init_from`.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from blocktx.checkpoint.folder import (
    FORMAT_VERSION,
    blocktx_version,
    check_fit,
    new_folder,
    path_name,
    shapes,
)
from blocktx.config import RunConfig, from_config_dict, to_dict
from blocktx.data import copy_tokenizer

_FILE = "model.safetensors"


_OURS = "blocktx"


def is_safetensors(path: epath.PathLike) -> bool:
    """Whether `path` is a folder with a model.safetensors, and not that of a run."""
    path = epath.Path(path).expanduser()
    return (path / _FILE).exists() and not (path / "checkpoints").is_dir()


def is_ours(path: epath.PathLike) -> bool:
    """Whether `write` has written the folder `path`, and its model.safetensors is whole."""
    try:
        return is_safetensors(path) and _metadata(epath.Path(path).expanduser())["format"] == _OURS
    except (ValueError, KeyError):
        return False


def write(
    folder: epath.PathLike,
    params: Mapping[str, Any],
    config: RunConfig,
    *,
    step: int,
    tokenizer: epath.PathLike | None = None,
) -> None:
    """Writes a new folder, all or nothing; every tensor in the dtype that it has in `params`.

    Args:
      folder: the local folder, which must not exist.
      params: nested dict of arrays.
      config: of the run.
      step: that the parameters are of.
      tokenizer: a tokenizer.json to copy into the folder, with the files that accompany it.

    Raises:
      FileExistsError: if there is something at `folder`.
    """
    leaves = jax.tree.leaves_with_path(params)
    tensors = {path_name(path): np.ascontiguousarray(leaf) for path, leaf in leaves}
    metadata = {
        "format": _OURS,
        "format_version": str(FORMAT_VERSION),
        "blocktx_version": blocktx_version(),
        "step": str(step),
    }
    with new_folder(folder) as unfinished:
        save_file(tensors, unfinished / _FILE, metadata)
        (unfinished / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, unfinished)


def read_config(folder: epath.PathLike) -> tuple[int, RunConfig]:
    """The step and the configuration of the run that a model is of.

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if the model is not one of blocktx, of a newer format, or damaged.
    """
    folder = epath.Path(folder).expanduser()
    metadata = _metadata(folder)
    if metadata.get("format") != _OURS:
        raise ValueError(
            f"{folder / _FILE}: not written by blocktx, its metadata lack format={_OURS!r}; "
            "launch/convert.py official and neox bring models of other code here"
        )
    if int(metadata["format_version"]) > FORMAT_VERSION:
        raise ValueError(
            f"{folder / _FILE}: format_version is {metadata['format_version']}, and this blocktx "
            f"reads up to {FORMAT_VERSION}; install blocktx {metadata['blocktx_version']} or newer"
        )
    try:
        config = from_config_dict(json.loads((folder / "config.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return int(metadata["step"]), config


def read_params(folder: epath.PathLike, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, with dtypes and places of a tree of ShapeDtypeStructs.

    Raises:
      ValueError: if they differ from `params` in name or shape; all that do are listed.
    """
    folder = epath.Path(folder).expanduser()
    with safe_open(folder / _FILE, "np") as file:
        names = file.keys()
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        check_fit(folder, stored, shapes(params))

        def read(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            tensor = file.get_tensor(path_name(path)).astype(wanted.dtype)
            return jax.device_put(tensor, wanted.sharding)

        return jax.tree.map_with_path(read, params)


def _metadata(folder: epath.Path) -> dict[str, str]:
    try:
        with safe_open(folder / _FILE, "np") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{folder / _FILE}: not a whole safetensors file: {error}") from error
