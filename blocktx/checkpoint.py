"""Checkpoints of a run: save, resume, and load only the parameters.

    workdir/config.json, workdir/tokenizer.json
    workdir/checkpoints/<step>/params      nested dict of arrays, names as in the model
                               opt_state   the optax state
                               data        JSON: where the input pipeline stands
                               metadata    JSON: format_version, blocktx_version, step, config

Orbax writes to a folder of another name and renames it when it is whole, so a folder named by its
step is a finished checkpoint.
"""

import dataclasses
import importlib.metadata
import json
import uuid
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import LatestN

from blocktx.config import RunConfig, from_config_dict, to_dict
from blocktx.model import build, init_params
from blocktx.model_config import ModelConfig

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What of a checkpoint one needs to use a model."""

    params: dict[str, Any]
    config: RunConfig
    step: int
    path: epath.Path  # the step's folder


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What of a checkpoint one needs to go on training."""

    params: dict[str, Any]
    opt_state: Any
    data: dict[str, Any]
    step: int


class Checkpoints:
    """The checkpoints of the run in `workdir`, to be used in a `with` block by its training.

    Entering removes what half-written saves have left; leaving waits for the save in progress.
    """

    def __init__(self, workdir: epath.PathLike, config: RunConfig):
        self._config = config
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=LatestN(config.training.keep_checkpoints),
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, those in the course of being saved included."""
        return self._manager.latest_step()

    def save(self, step: int, params: dict[str, Any], opt_state: Any, data: dict[str, Any]) -> None:
        """Starts to save. The arrays have left the device on return, so they may be donated.

        A failure to write is raised by the next `save` or on leaving the `with` block.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                opt_state=ocp.args.StandardSave(opt_state),
                data=ocp.args.JsonSave(data),
                metadata=ocp.args.JsonSave(_metadata(step, self._config)),
            ),
        )

    def restore(self, params: dict[str, Any], opt_state: Any) -> Resumed:
        """The newest checkpoint, with arrays as the given trees of ShapeDtypeStructs describe them.

        Each ShapeDtypeStruct's `sharding` says where its array goes, wherever it was saved from.

        Raises:
          FileNotFoundError: if there is no checkpoint.
          ValueError: if the checkpoint is not one of blocktx, of a newer format, does not fit, is
            damaged, or belongs to a run that differs in `model`, `data` or `seed`.
        """
        folder = find(self.directory)
        step, config = _read_metadata(folder)
        _check_same_run(folder, config, self._config)
        _check_names_and_shapes(folder, params)
        items = _read(
            folder,
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            data=ocp.args.JsonRestore(),
        )
        return Resumed(items.params, items.opt_state, items.data, step)


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
      tokenizer: a tokenizer.json to copy into the folder.

    Raises:
      FileExistsError: if there is something at `workdir`.
    """
    path = epath.Path(workdir).expanduser().absolute()
    if path.exists():
        raise FileExistsError(f"{workdir}: exists already; choose another folder")
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        (unfinished / "checkpoints").mkdir(parents=True)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                unfinished / "checkpoints" / str(step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    metadata=ocp.args.JsonSave(_metadata(step, config)),
                ),
            )
        (unfinished / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        if tokenizer is not None:
            epath.Path(tokenizer).expanduser().copy(unfinished / "tokenizer.json")
        unfinished.rename(path)
    except BaseException:
        if unfinished.exists():
            unfinished.rmtree()
        raise


def load_params(
    path: epath.PathLike,
    sharding: jax.sharding.Sharding | None = None,
    model: ModelConfig | None = None,
) -> Checkpoint:
    """The parameters of a checkpoint, whatever devices it was saved from; nothing else is read.

    Args:
      path: a run's folder or its `checkpoints` folder, which mean the newest checkpoint in them, or
        the folder of one step.
      sharding: where every array goes; None puts them on this process's first device.
      model: what the parameters have to fit, and in whose `param_dtype` they come; None: the
        checkpoint's own configuration.

    Raises:
      FileNotFoundError: if there is no such folder or no finished checkpoint in it.
      ValueError: if the checkpoint is not one of blocktx, of a newer format, does not fit the
        configuration (all that does not is listed), or is damaged.
    """
    folder = find(path)
    step, config = _read_metadata(folder)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = abstract_params(model or config.model, sharding)
    _check_names_and_shapes(folder, params)
    params = _read(folder, params=ocp.args.StandardRestore(params)).params
    return Checkpoint(params, config, step, folder)


def abstract_params(config: ModelConfig, sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """The parameters of a model as ShapeDtypeStructs that all have one sharding."""
    model = build(config)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


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
    path = epath.Path(path).expanduser().absolute()
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


def _metadata(step: int, config: RunConfig) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "blocktx_version": importlib.metadata.version("blocktx"),
        "step": step,
        "config": to_dict(config),
    }


def _read_metadata(folder: epath.Path) -> tuple[int, RunConfig]:
    missing = [item for item in ("params", "metadata") if not (folder / item).is_dir()]
    if missing:
        found = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir()))
        raise ValueError(
            f"{folder}: not a checkpoint of blocktx: no {' and no '.join(missing)} in it, only "
            f"{found or 'files'}"
        )
    metadata = _read(folder, metadata=ocp.args.JsonRestore()).metadata
    fields = ("format_version", "step", "config")
    if not isinstance(metadata, dict) or any(field not in metadata for field in fields):
        raise ValueError(
            f"{folder}: not a checkpoint of blocktx: its metadata lacks {', '.join(fields)}"
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


def _read(folder: epath.Path, **items: Any) -> Any:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder, args=ocp.args.Composite(**items))
    except Exception as error:  # damage surfaces as whatever the layer that meets it raises
        raise ValueError(
            f"{folder}: cannot read {', '.join(items)}, a file may be damaged or missing: {error}"
        ) from error


def _check_names_and_shapes(folder: epath.Path, params: dict[str, Any]) -> None:
    try:
        stored = _shapes(ocp.StandardCheckpointHandler().metadata(folder / "params").tree)
    except Exception as error:
        raise ValueError(
            f"{folder}: cannot read params, a file may be damaged or missing: {error}"
        ) from error
    wanted = _shapes(params)
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


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_same_run(folder: epath.Path, saved: RunConfig, config: RunConfig) -> None:
    old, new = _fixed_fields(saved), _fixed_fields(config)
    problems = [
        f"  {name}: checkpoint {old.get(name, 'lacks it')!r}, now {new.get(name, 'lacks it')!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in old or name not in new or old[name] != new[name]
    ]
    if problems:
        raise ValueError(
            "\n".join(
                [f"{folder}: a resumed run may change only training and optimizer:", *problems]
            )
        )


def _fixed_fields(config: RunConfig) -> dict[str, Any]:
    """Full names and values of the fields that a resumed run must not change."""
    fields = {}

    def walk(name: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{name}.{key}", value)
        else:
            fields[name] = node

    whole = to_dict(config)
    for section in ("model", "data", "seed"):
        walk(f"config.{section}", whole[section])
    del fields["config.data.cache_dir"]  # where the cache lies does not change the data
    return fields
