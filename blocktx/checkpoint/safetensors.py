"""A model in one file that any framework reads: model.safetensors, config.json, tokenizer.json.

    DIR/model.safetensors   the parameters, named by their paths, as in `embedder/tokens/embedding`
        config.json         the run's configuration, as in a run folder
        tokenizer.json      if the run has one

`python launch/convert.py to-safetensors` writes it. The metadata in model.safetensors are `format`
("blocktx") and `metadata`: as JSON, the metadata of a checkpoint (`blocktx.checkpoint.metadata`).
`blocktx.load`, `blocktx.load_params` and `training.init_from` take DIR like a run folder.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from blocktx.checkpoint.digest import file_digest, measure, path_name
from blocktx.checkpoint.errors import DamagedError
from blocktx.checkpoint.folder import new_folder, require_floats, shapes
from blocktx.checkpoint.metadata import (
    Metadata,
    blocktx_version,
    build_metadata,
    check_arrays,
    check_fit,
    parse_metadata,
    read_json,
    require_finite,
)
from blocktx.config import RunConfig, UserError, to_saved
from blocktx.data import copy_tokenizer
from blocktx.files import is_bucket

_FILE = "model.safetensors"
_OURS = "blocktx"

# Names of dtypes in safetensors files; others are not those of parameters.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def is_safetensors(path: epath.PathLike) -> bool:
    """Return whether `path` is a folder with a model.safetensors, and not a run folder."""
    path = epath.Path(path).expanduser()
    file = path / _FILE
    return file.exists() and not file.is_dir() and not (path / "checkpoints").is_dir()


def is_ours(path: epath.PathLike) -> bool:
    """Return whether `write` has written the folder `path`."""
    try:
        return is_safetensors(path) and _header(epath.Path(path).expanduser())["format"] == _OURS
    except (ValueError, KeyError):
        return False


def write(
    folder: epath.PathLike,
    params: Mapping[str, Any],
    config: RunConfig,
    *,
    step: int,
    tokenizer: epath.PathLike | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write a new folder, whole or not at all. Every tensor keeps the dtype of its array.

    Args:
      folder: the local folder, which must not exist.
      params: nested dict of arrays.
      config: of the run.
      step: the training step of the parameters.
      tokenizer: a tokenizer.json to copy into the folder, with the files that accompany it.
      allow_nonfinite: whether NaN and infinity are accepted.

    Raises:
      FileExistsError: `folder` exists.
      UserError: a parameter is not finite.
    """
    leaves = jax.tree.leaves_with_path(params)
    tensors = {path_name(path): np.ascontiguousarray(leaf) for path, leaf in leaves}
    arrays, nonfinite = measure({"params": params})
    require_finite(str(folder), nonfinite, allow_nonfinite)
    with new_folder(folder) as unfinished:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, unfinished)
        digest = file_digest(unfinished / "tokenizer.json")
        metadata = build_metadata(step, config, blocktx_version(), arrays, tokenizer=digest)
        del metadata["config"]  # it is in config.json, and in the digest
        header = {"format": _OURS, "metadata": json.dumps(metadata)}
        save_file(tensors, unfinished / _FILE, header)
        (unfinished / "config.json").write_text(json.dumps(to_saved(config), indent=2) + "\n")


def read_metadata(folder: epath.PathLike, *, verify: bool = True) -> Metadata:
    """Return the metadata of an export.

    Raises:
      FileNotFoundError: there is no config.json.
      UserError: the model is not of blocktx, of a newer format, or damaged.
    """
    folder = epath.Path(folder).expanduser()
    header = _header(folder)
    if header.get("format") != _OURS:
        raise UserError(
            f"{folder / _FILE}: not written by blocktx, its metadata lack format={_OURS!r}; "
            "launch/convert.py official and neox bring models of other code here"
        )
    metadata = _parse_header(folder / _FILE, header)
    config = read_json(folder / "config.json")
    try:
        return parse_metadata(str(folder), metadata | {"config": config}, verify=verify)
    except DamagedError:
        raise
    except UserError as error:
        text = str(error).removeprefix(f"{folder}: metadata: ")
        named = folder / ("config.json" if text.startswith("config") else _FILE)
        raise UserError(f"{named}: {text.removeprefix(f'{folder}: ')}") from error


def _parse_header(file: epath.Path, header: dict[str, str]) -> dict[str, Any]:
    """Return the metadata without the config. Format 1 has a string for each field."""
    try:
        if "metadata" in header:
            metadata = json.loads(header["metadata"])
        else:
            metadata = {name: int(header[name]) for name in ("format_version", "step")}
            metadata["blocktx_version"] = header.get("blocktx_version", "unknown")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its metadata are damaged: {error}") from error
    except KeyError as error:
        raise UserError(f"{file}: its metadata lack {error}") from None
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: its metadata are damaged: not a JSON object")
    return metadata


def read_params(
    folder: epath.PathLike,
    metadata: Metadata,
    params: Mapping[str, Any],
    *,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """Return the parameters with dtypes and shardings of a tree of ShapeDtypeStructs.

    Raises:
      UserError: names or shapes differ (all differences are listed), a tensor is not floating
        point, or has NaN or infinity.
      DamagedError: a tensor is not what was written.
    """
    folder = epath.Path(folder).expanduser()
    with _open(folder) as file:
        names = file.keys()
        views = {name: file.get_slice(name) for name in names}
        check_fit(folder, {x: tuple(v.get_shape()) for x, v in views.items()}, shapes(params))
        kinds = {name: view.get_dtype() for name, view in views.items()}
        require_floats(str(folder / _FILE), {x: _DTYPES.get(k, np.int32) for x, k in kinds.items()})
        nonfinite = []

        def read(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            name = path_name(path)
            tensor = file.get_tensor(name)
            digests, wrong = measure({name: tensor})
            if verify:
                check_arrays(str(folder / _FILE), metadata.arrays, digests, "params/")
            nonfinite.extend(wrong)
            return jax.device_put(tensor.astype(wanted.dtype), wanted.sharding)

        loaded = jax.tree.map_with_path(read, params)
    require_finite(str(folder / _FILE), nonfinite, allow_nonfinite)
    return loaded


@contextlib.contextmanager
def _open(folder: epath.Path) -> Iterator[Any]:
    """Open model.safetensors. A file in a bucket is copied to this machine."""
    with contextlib.ExitStack() as stack:
        path = folder / _FILE
        if is_bucket(path):
            temporary = stack.enter_context(tempfile.TemporaryDirectory())
            path = path.copy(epath.Path(temporary) / _FILE)
        try:
            file = stack.enter_context(safe_open(path, "np"))
        except SafetensorError as error:
            raise UserError(f"{folder / _FILE}: not a whole safetensors file: {error}") from error
        yield file


def _header(folder: epath.Path) -> dict[str, str]:
    with _open(folder) as file:
        return file.metadata() or {}
