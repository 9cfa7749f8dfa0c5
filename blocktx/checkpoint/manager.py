"""Checkpoints of a run in training: save, and resume."""

import dataclasses
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import LatestN

from blocktx.checkpoint.folder import (
    blocktx_version,
    build_metadata,
    check_names_and_shapes,
    find,
    read,
    read_metadata,
)
from blocktx.config import RunConfig, to_dict
from blocktx.files import absolute


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
        self._version = blocktx_version()  # it must not fail at the first save
        self.directory = absolute(workdir) / "checkpoints"
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
                metadata=ocp.args.JsonSave(build_metadata(step, self._config, self._version)),
            ),
        )

    def restore(self, params: dict[str, Any], opt_state: Any) -> Resumed:
        """The newest checkpoint, with arrays as the given trees of ShapeDtypeStructs describe them.

        Each ShapeDtypeStruct's `sharding` says where its array goes, wherever it was saved from.

        Raises:
          FileNotFoundError: if there is no checkpoint.
          ValueError: if the checkpoint is not one of blocktx, of a newer format, does not fit, is
            damaged, or belongs to a run that differs in `model`, `data`, `seed` or
            `training.batch_size`.
        """
        folder = find(self.directory)
        step, config = read_metadata(folder)
        check_same_run(folder, config, self._config)
        check_names_and_shapes(folder, params)
        items = read(
            folder,
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            data=ocp.args.JsonRestore(),
        )
        return Resumed(items.params, items.opt_state, items.data, step)


def check_same_run(folder: epath.Path, saved: RunConfig, config: RunConfig) -> None:
    """Raises a ValueError that lists all fields in which a run must not differ from its resumption.

    Those are `model`, `data`, `seed`, `training.batch_size`, and of the optimizer `name` and
    `moment_dtype`; but the cache may lie elsewhere, and `model.remat` and `model.platform` only say
    how to compute.
    """
    old, new = _fixed_fields(saved), _fixed_fields(config)
    problems = [
        f"  {name}: checkpoint {old.get(name, 'lacks it')!r}, now {new.get(name, 'lacks it')!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in old or name not in new or old[name] != new[name]
    ]
    if problems:
        raise ValueError(
            "\n".join([f"{folder}: a resumed run must not change these fields:", *problems])
        )


def _fixed_fields(config: RunConfig) -> dict[str, Any]:
    """Full names and values of these fields."""
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
    for name in ("cache_dir", "verify_shards"):  # neither changes the data
        del fields[f"config.data.{name}"]
    for name in ("remat", "platform"):  # the same function, computed another way
        del fields[f"config.model.{name}"]
    fields["config.training.batch_size"] = config.training.batch_size  # the data's state counts it
    for name in ("name", "moment_dtype"):  # what the optimizer's state consists of
        fields[f"config.optimizer.{name}"] = whole["optimizer"][name]
    return fields
