"""The folder of a checkpoint: find it, read it, check it."""

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from blocktx.checkpoint.digest import measure, path_name
from blocktx.checkpoint.errors import DamagedError, is_transient, raise_everywhere
from blocktx.checkpoint.metadata import (
    Metadata,
    Shapes,
    check_arrays,
    check_fit,
    listed,
    parse_metadata,
    require_finite,
)
from blocktx.config import FORMAT_VERSION, UserError
from blocktx.files import absolute

__all__ = ["FORMAT_VERSION", "find", "find_all", "has_checkpoint", "new_folder"]


@contextlib.contextmanager
def new_folder(folder: epath.PathLike) -> Iterator[epath.Path]:
    """Yield a folder to write into. It is renamed to `folder` at the end, or removed on an error.

    Raises:
      FileExistsError: `folder` exists.
    """
    path = absolute(folder)
    if path.exists():
        raise FileExistsError(f"{folder}: exists already; choose another folder")
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        if unfinished.exists():
            unfinished.rmtree()
        raise


def has_checkpoint(workdir: epath.PathLike) -> bool:
    """Return whether `workdir` has a finished checkpoint."""
    return bool(find_all(workdir))


def find_all(workdir: epath.PathLike) -> dict[int, epath.Path]:
    """Return the folders of all finished checkpoints of a run by step, the newest first.

    Args:
      workdir: a run folder or its `checkpoints` folder.
    """
    path = absolute(workdir)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not root.is_dir():
        return {}
    found = {x.step: x.path for x in ocp.path.step.standard_name_format().find_all(root)}
    return dict(sorted(found.items(), reverse=True))


def find(path: epath.PathLike) -> epath.Path:
    """Return the folder of one finished checkpoint: `path` itself, or the newest one in it.

    Raises:
      FileNotFoundError: there is no such folder, or no finished checkpoint in it.
    """
    path = absolute(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder")
    if (path / "_CHECKPOINT_METADATA").exists():  # Orbax marks each checkpoint with this file
        if not ocp.path.step.is_path_finalized(path):
            raise FileNotFoundError(f"{path}: a save that was never finished; choose another step")
        return path
    steps = find_all(path)
    if not steps:
        raise FileNotFoundError(
            f"{path}: no finished checkpoint; give a run's folder, its checkpoints folder or the "
            "folder of one step"
        )
    return next(iter(steps.values()))


def read_metadata(folder: epath.Path, *, verify: bool = True) -> Metadata:
    """Return the metadata of a checkpoint.

    Raises:
      UserError: the checkpoint is not of blocktx, of a newer format, or damaged.
    """
    missing = [item for item in ("params", "metadata") if not (folder / item).is_dir()]
    if missing:
        found = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir()))
        raise UserError(
            f"{folder}: not a checkpoint of blocktx: no {' and no '.join(missing)} in it, only "
            f"{found or 'files'}"
        )
    metadata = read(folder, metadata=ocp.args.JsonRestore()).metadata
    return parse_metadata(str(folder), metadata, verify=verify)


def read(folder: epath.Path, **items: Any) -> Any:
    """Read items of a checkpoint according to their Orbax arguments; return them as attributes.

    No process waits for another one, which may have met an error.

    Raises:
      DamagedError: one of them cannot be read. Errors of a network are raised as they are.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.CompositeCheckpointHandler()
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            return checkpointer.restore(folder, args=ocp.args.Composite(**items))
    except Exception as error:  # damage is reported by whatever layer meets it
        if is_transient(error):
            raise
        raise _damaged(folder, ", ".join(items), error) from error


def _damaged(folder: epath.Path, items: str, error: Exception) -> DamagedError:
    text = str(error).partition("See full TensorStore details")[0].rstrip(" .")
    text = text if len(text) <= 500 else f"{text[:500]}..."
    return DamagedError(f"{folder}: cannot read {items}, a file may be damaged or missing: {text}")


def read_params(
    folder: epath.Path,
    metadata: Metadata,
    wanted: dict[str, Any],
    *,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """Return the parameters of a checkpoint as a tree of ShapeDtypeStructs describes them.

    They are read in the dtypes in which they are stored, checked, and then cast. If other processes
    hold parts of them, all processes call this, and an error in one is raised in all.

    Raises:
      UserError: names or shapes differ (all differences are listed), a parameter is not a floating
        point array, or has NaN or infinity.
      DamagedError: a file cannot be read, or an array is not what was written.
    """
    params = error = None
    try:
        params = _read_as_stored(folder, wanted)
    except Exception as failed:
        error = failed
    shared = any(not x.sharding.is_fully_addressable for x in jax.tree.leaves(wanted))
    _raise(error, folder, shared)
    if verify or not allow_nonfinite:
        digests, nonfinite = measure(params)
        try:
            if verify:
                check_arrays(str(folder), metadata.arrays, digests, "params/")
            require_finite(str(folder), nonfinite, allow_nonfinite)
        except UserError as failed:
            error = failed
        _raise(error, folder, shared)
    return jax.tree.map(
        lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), params, wanted
    )


def _raise(error: Exception | None, folder: epath.Path, shared: bool) -> None:
    if shared:
        raise_everywhere(error, folder)
    elif error is not None:
        raise error


def _read_as_stored(folder: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    dtypes = check_stored(folder, wanted)

    def as_stored(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtypes[path_name(path)], sharding=x.sharding)

    stored = jax.tree.map_with_path(as_stored, wanted)
    return read(folder, params=ocp.args.StandardRestore(stored)).params


def check_stored(folder: epath.Path, params: dict[str, Any]) -> dict[str, Any]:
    """Return the stored dtype of each parameter, after a check of names, shapes and dtypes.

    Raises:
      UserError: parameters differ in name or shape (all are listed), or are not floating point.
    """
    try:
        tree = ocp.StandardCheckpointHandler().metadata(folder / "params").tree
        stored = shapes(tree)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        dtypes = {path_name(path): leaf.dtype for path, leaf in leaves}
    except Exception as error:
        if is_transient(error):
            raise
        raise _damaged(folder, "params", error) from error
    check_fit(folder, stored, shapes(params))
    require_floats(str(folder), dtypes)
    return dtypes


def require_floats(where: str, dtypes: dict[str, Any]) -> None:
    """Raise a UserError that names parameters whose dtypes are not floating point."""
    wrong = [f"{name} ({x})" for name, x in dtypes.items() if not jnp.issubdtype(x, jnp.floating)]
    if wrong:
        raise UserError(f"{where}: parameters must be floating point, got {listed(wrong)}")


def shapes(tree: Any) -> Shapes:
    """Return the shapes of a tree's arrays by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}
