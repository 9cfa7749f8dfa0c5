"""The metadata of checkpoints and exports: configuration, step, and digests of everything."""

import dataclasses
import importlib.metadata
import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from etils import epath

from blocktx.checkpoint.digest import json_digest
from blocktx.checkpoint.errors import DamagedError
from blocktx.config import (
    FORMAT_VERSION,
    RunConfig,
    UserError,
    from_saved,
    to_saved,
    without_execution,
)
from blocktx.files import is_bucket

_LARGEST_JSON = 64 << 20  # bytes
_LISTED = 100


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata item of a checkpoint.

    Attributes:
      step: the training step.
      config: the configuration of the run.
      arrays: digest of each array by name, or None in format 1.
      data: digest of the state of the input pipeline, if it was saved.
      tokenizer: digest of tokenizer.json, if there was one.
    """

    step: int
    config: RunConfig
    arrays: dict[str, str] | None = None
    data: str | None = None
    tokenizer: str | None = None


def blocktx_version() -> str:
    """Return the version of this package, for the files it writes."""
    try:
        return importlib.metadata.version("blocktx")
    except importlib.metadata.PackageNotFoundError:  # used from a clone
        return "unknown"


def build_metadata(
    step: int,
    config: RunConfig,
    version: str,
    arrays: Mapping[str, str],
    *,
    data: Any = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Return the metadata of a checkpoint as a JSON value.

    Args:
      step: the training step.
      config: of the run.
      version: of blocktx.
      arrays: digest of each array by name.
      data: state of the input pipeline, a JSON value.
      tokenizer: digest of tokenizer.json.
    """
    metadata = {
        "format_version": FORMAT_VERSION,
        "blocktx_version": version,
        "step": step,
        "config": json.loads(json.dumps(to_saved(config))),
        "arrays": dict(arrays),
        "data": None if data is None else json_digest(data),
        "tokenizer": tokenizer,
    }
    return metadata | {"digest": _seal(metadata)}


def parse_metadata(where: str, metadata: Any, *, verify: bool = True) -> Metadata:
    """Check the metadata of a checkpoint, and return what it says.

    Args:
      where: the file, for error messages.
      metadata: a JSON value.
      verify: whether the metadata must be what was written.

    Raises:
      UserError: it is not of blocktx, or of a newer format.
      DamagedError: it was changed after it was written.
    """
    fields = ("format_version", "step", "config")
    if not isinstance(metadata, dict) or any(field not in metadata for field in fields):
        raise UserError(
            f"{where}: not a checkpoint of blocktx: its metadata lacks {', '.join(fields)}"
        )
    version = metadata["format_version"]
    if type(version) is not int or version < 1:
        raise UserError(
            f"{where}: not a checkpoint of blocktx: its format_version is {str(version)[:60]!r}"
        )
    if version > FORMAT_VERSION:
        raise UserError(
            f"{where}: format_version is {version}, and this blocktx reads up to "
            f"{FORMAT_VERSION}; install blocktx {metadata.get('blocktx_version')} or newer"
        )
    try:
        config = from_saved(metadata["config"], version)
    except UserError as error:
        raise UserError(f"{where}: metadata: {error}") from error
    step = metadata["step"]
    if type(step) is not int or not 0 <= step < 2**63:
        raise DamagedError(f"{where}: metadata: step: got {str(step)[:60]!r}, expected a number")
    if version == 1 and "digest" not in metadata:
        return Metadata(step, config)
    if verify and metadata.get("digest") != _seal(metadata):
        raise DamagedError(
            f"{where}: its metadata was changed after it was written: the digest differs"
        )
    arrays = metadata.get("arrays")
    return Metadata(
        step,
        config,
        arrays if isinstance(arrays, dict) else {},
        metadata.get("data"),
        metadata.get("tokenizer"),
    )


def _seal(metadata: Mapping[str, Any]) -> str:
    """Return the digest of metadata without its own digest, nulls and execution choices."""
    rest = {k: v for k, v in metadata.items() if k != "digest" and v is not None}
    return json_digest(rest | {"config": without_execution(rest["config"])})


def check_arrays(
    where: str, stored: Mapping[str, str] | None, found: Mapping[str, str], prefix: str
) -> None:
    """Raise a DamagedError that names the arrays whose digests differ from the stored ones."""
    if stored is None:
        return
    wrong = [name for name, digest in found.items() if stored.get(f"{prefix}{name}") != digest]
    if wrong:
        raise DamagedError(
            f"{where}: these arrays are not as they were written (the digest differs): "
            f"{listed(wrong)}; the storage has changed them"
        )


def require_finite(where: str, names: list[str], allowed: bool) -> None:
    """Raise a UserError that names arrays with NaN or infinity, unless they are allowed."""
    if names and not allowed:
        raise UserError(
            f"{where}: NaN or infinity in {listed(names)}; such a model is of no use; "
            "allow_nonfinite accepts it"
        )


def listed(names: list[str], most: int = 10) -> str:
    """Return names for a message: the first ones, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_json(path: epath.PathLike) -> Any:
    """Return the JSON value in a file.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is a folder, a pipe, too large, or not JSON.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found")
    if path.is_dir() or not (is_bucket(path) or stat.S_ISREG(os.stat(path).st_mode)):
        raise UserError(f"{path}: not a regular file")
    size = path.stat().length
    if size > _LARGEST_JSON:
        raise UserError(f"{path}: {size} bytes are too many for a description")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise UserError(f"{path}: not a description: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


Shapes = dict[str, tuple[int, ...]]


def check_fit(folder: epath.PathLike, stored: Shapes, wanted: Shapes) -> None:
    """Raise a UserError that lists all parameters that are not stored as a model needs them."""
    problems = [
        f"  {name}: checkpoint {stored.get(name, 'lacks it')}, "
        f"configuration {wanted.get(name, 'lacks it')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if len(problems) > _LISTED:
        problems[_LISTED:] = [f"  and {len(problems) - _LISTED} more"]
    if problems:
        raise UserError(
            "\n".join([f"{folder}: parameters do not fit the configuration:", *problems])
        )
