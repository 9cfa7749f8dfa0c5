"""The folder of a checkpoint: finding it, reading it, and checking that it is what is asked for."""

import contextlib
import importlib.metadata
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from blocktx.config import RunConfig, from_config_dict, to_dict
from blocktx.files import absolute

FORMAT_VERSION = 1


Shapes = dict[str, tuple[int, ...]]


def blocktx_version() -> str:
    """Of this package, to be written into what it writes."""
    try:
        return importlib.metadata.version("blocktx")
    except importlib.metadata.PackageNotFoundError:  # used from a clone
        return "unknown"


@contextlib.contextmanager
def new_folder(folder: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to write into, which in the end is renamed to `folder`, or after an error removed.

    Raises:
      FileExistsError: if there is something at `folder`.
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
    """Whether there is a finished checkpoint of the run in `workdir`."""
    try:
        find(epath.Path(workdir) / "checkpoints")
    except FileNotFoundError:
        return False
    return True


def find(path: epath.PathLike) -> epath.Path:
    """The folder of one finished checkpoint: `path` itself, or the newest one in it.

    Raises:
      FileNotFoundError: if there is no such folder or no finished checkpoint in it.
    """
    path = absolute(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder")
    if (path / "_CHECKPOINT_METADATA").exists():  # orbax marks each checkpoint with this file
        if not ocp.path.step.is_path_finalized(path):
            raise FileNotFoundError(f"{path}: a save that was never finished; choose another step")
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = list(ocp.path.step.standard_name_format().find_all(root))
    if not steps:
        raise FileNotFoundError(
            f"{path}: no finished checkpoint; give a run's folder, its checkpoints folder or the "
            "folder of one step"
        )
    return max(steps, key=lambda found: found.step).path


def read_metadata(folder: epath.Path) -> tuple[int, RunConfig]:
    """The step and the configuration of the run that a checkpoint is of.

    Raises:
      ValueError: if the checkpoint is not one of blocktx, of a newer format, or damaged.
    """
    missing = [item for item in ("params", "metadata") if not (folder / item).is_dir()]
    if missing:
        found = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir()))
        raise ValueError(
            f"{folder}: not a checkpoint of blocktx: no {' and no '.join(missing)} in it, only "
            f"{found or 'files'}"
        )
    metadata = read(folder, metadata=ocp.args.JsonRestore()).metadata
    fields = ("format_version", "step", "config")
    if not isinstance(metadata, dict) or any(field not in metadata for field in fields):
        raise ValueError(
            f"{folder}: not a checkpoint of blocktx: its metadata lacks {', '.join(fields)}"
        )
    if type(metadata["format_version"]) is not int:
        raise ValueError(
            f"{folder}: not a checkpoint of blocktx: its format_version is "
            f"{metadata['format_version']!r}"
        )
    if metadata["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder}: format_version is {metadata['format_version']}, and this blocktx reads up "
            f"to {FORMAT_VERSION}; install blocktx {metadata.get('blocktx_version')} or newer"
        )
    try:
        return metadata["step"], from_config_dict(metadata["config"])
    except ValueError as error:
        raise ValueError(f"{folder}: metadata: {error}") from error


def read(folder: epath.Path, **items: Any) -> Any:
    """The items of a checkpoint, each read as its Orbax arguments say, as attributes.

    Raises:
      ValueError: if one of them cannot be read.
    """
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder, args=ocp.args.Composite(**items))
    except Exception as error:  # damage surfaces as whatever the layer that meets it raises
        raise ValueError(
            f"{folder}: cannot read {', '.join(items)}, a file may be damaged or missing: {error}"
        ) from error


def check_names_and_shapes(folder: epath.Path, params: dict[str, Any]) -> None:
    """Raises a ValueError that lists all parameters that differ from `params` in name or shape."""
    try:
        stored = shapes(ocp.StandardCheckpointHandler().metadata(folder / "params").tree)
    except Exception as error:
        raise ValueError(
            f"{folder}: cannot read params, a file may be damaged or missing: {error}"
        ) from error
    check_fit(folder, stored, shapes(params))


def check_fit(folder: epath.Path, stored: Shapes, wanted: Shapes) -> None:
    """Raises a ValueError that lists all parameters that are not stored as a model wants them."""
    problems = [
        f"  {name}: checkpoint {stored.get(name, 'lacks it')}, "
        f"configuration {wanted.get(name, 'lacks it')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if problems:
        raise ValueError(
            "\n".join([f"{folder}: parameters do not fit the configuration:", *problems])
        )


def shapes(tree: Any) -> Shapes:
    """The shapes of a tree's arrays, by name."""
    return {
        path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def path_name(path: Any) -> str:
    """The name of a parameter by its path in the tree, such as `embedder/tokens/embedding`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def build_metadata(step: int, config: RunConfig, version: str) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "blocktx_version": version,
        "step": step,
        "config": to_dict(config),
    }
