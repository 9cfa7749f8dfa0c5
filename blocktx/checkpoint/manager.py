"""Checkpoints of a run in training: save, and resume."""

import dataclasses
import sys
import uuid
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import LatestN

from blocktx.checkpoint.digest import file_digest, json_digest, measure
from blocktx.checkpoint.errors import DamagedError, raise_everywhere
from blocktx.checkpoint.folder import check_stored, find, find_all, read, read_metadata
from blocktx.checkpoint.metadata import (
    Metadata,
    blocktx_version,
    build_metadata,
    check_arrays,
)
from blocktx.config import RunConfig, UserError, is_storage_full, to_dict
from blocktx.files import absolute

_SET_ASIDE = "set_aside"


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Full training state of a checkpoint."""

    params: dict[str, Any]
    opt_state: Any
    data: dict[str, Any]
    step: int


class Checkpoints:
    """The checkpoints of the run in `workdir`, for use in a `with` block by its training.

    Creation removes what unfinished saves have left. Leaving the block waits for a save under way.
    """

    def __init__(self, workdir: epath.PathLike, config: RunConfig):
        self._config = config
        self._version = blocktx_version()  # must not fail at the first save
        self._workdir = absolute(workdir)
        self.directory = self._workdir / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=LatestN(config.training.keep_checkpoints),
                cleanup_tmp_directories=True,
                # If they are created later and that fails, threads that wait for them block the
                # end of the process for five minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        try:
            self._manager.close()
        except Exception as failed:
            if error is not None:  # that one is the cause, or tells the same
                print(f"warning: {self.directory}: {failed}", file=sys.stderr, flush=True)
                return
            raise self._explained(failed) from failed

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, including one that is being saved."""
        return self._manager.latest_step()

    def save(self, step: int, params: dict[str, Any], opt_state: Any, data: dict[str, Any]) -> None:
        """Start to save. The arrays have left the device on return and may be donated.

        Digests of all arrays are computed first, in one pass over them on their devices.

        Raises:
          UserError: there is no space left, for this save or the one before. Other failures to
            write are raised by the next `save` or on leaving the `with` block.
        """
        arrays, _ = measure({"params": params, "opt_state": opt_state})
        tokenizer = file_digest(self._workdir / "tokenizer.json")
        metadata = build_metadata(
            step, self._config, self._version, arrays, data=data, tokenizer=tokenizer
        )
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    opt_state=ocp.args.StandardSave(opt_state),
                    data=ocp.args.JsonSave(data),
                    metadata=ocp.args.JsonSave(metadata),
                ),
            )
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        """Return the error to raise for a failed save."""
        if not is_storage_full(error):
            return error
        whole = next(iter(find_all(self.directory).values()), None)
        return UserError(
            f"{self.directory}: no space left for a checkpoint; last whole one: "
            f"{whole or 'there is none'}; make space, then run the same command with --resume"
        )

    def restore(
        self,
        params: dict[str, Any],
        opt_state: Any,
        step: int | None = None,
        *,
        verify: bool = True,
    ) -> Resumed:
        """Return the newest whole checkpoint, with arrays as trees of ShapeDtypeStructs describe.

        Each ShapeDtypeStruct's `sharding` is where its array goes, wherever it was saved from. If a
        checkpoint is damaged, a warning is printed and the one before it is read. Newer checkpoints
        than the one returned are moved to `workdir/set_aside`. All processes of the run call this;
        an error in one is raised in all, and all read the same checkpoint.

        Args:
          params: shapes, dtypes and shardings of the parameters.
          opt_state: those of the optimizer's state.
          step: the checkpoint to restore, and no other. None: the newest whole one.
          verify: whether to compare digests of all arrays with those in the metadata.

        Raises:
          FileNotFoundError: there is no checkpoint, or not that one.
          UserError: the checkpoint is not of blocktx, of a newer format, does not fit, holds
            parameters alone, belongs to a run that differs in fields that must not change, or all
            checkpoints are damaged.
        """
        folders = find_all(self.directory)
        if step is not None and step not in folders:
            known = ", ".join(map(str, sorted(folders))) or "there is none"
            raise FileNotFoundError(f"{self.directory}: no checkpoint of step {step}; {known}")
        wanted = list(folders) if step is None else [step]
        first_error = None
        for candidate in wanted:
            try:
                resumed = self._read_everywhere(folders[candidate], params, opt_state, verify)
            except DamagedError as error:
                first_error = first_error or error
                if candidate != wanted[-1]:
                    print(
                        f"warning: {error}\nwarning: trying the checkpoint before it",
                        file=sys.stderr,
                        flush=True,
                    )
                continue
            self._set_aside([folders[newer] for newer in folders if newer > candidate])
            return resumed
        if first_error is not None:
            raise first_error
        find(self.directory)  # raises
        raise FileNotFoundError(f"{self.directory}: no finished checkpoint")

    def _read_everywhere(
        self, folder: epath.Path, params: dict[str, Any], opt_state: Any, verify: bool
    ) -> Resumed:
        metadata = items = error = None
        try:
            metadata, items = self._read(folder, params, opt_state, verify)
        except Exception as failed:
            error = failed
        raise_everywhere(error, folder)
        if verify:
            try:
                _check_items(folder, metadata, items)
            except DamagedError as failed:
                error = failed
            raise_everywhere(error, folder)
        return Resumed(items.params, items.opt_state, items.data, metadata.step)

    def _read(
        self, folder: epath.Path, params: dict[str, Any], opt_state: Any, verify: bool
    ) -> tuple[Metadata, Any]:
        metadata = read_metadata(folder, verify=verify)
        check_same_run(folder, metadata.config, self._config)
        check_stored(folder, params)
        if not (folder / "opt_state").is_dir():
            raise UserError(
                f"{folder}: holds parameters alone, from which no run can be resumed; begin a new "
                f"one with --config.training.init_from={self._workdir} in another workdir"
            )
        items = read(
            folder,
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            data=ocp.args.JsonRestore(),
        )
        return metadata, items

    def _set_aside(self, folders: list[epath.Path]) -> None:
        """Move checkpoints out of the way: Orbax saves no step below its newest one."""
        if not folders:
            return
        target = self._workdir / _SET_ASIDE
        if jax.process_index() == 0:
            target.mkdir(parents=True, exist_ok=True)
            for folder in folders:
                moved = target / f"{folder.name}-{uuid.uuid4().hex[:6]}"
                folder.rename(moved)
                print(f"warning: {folder} was moved to {moved}", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("blocktx: checkpoints set aside")
        self._manager.reload()


def _check_items(folder: epath.Path, metadata: Metadata, items: Any) -> None:
    """Raise a DamagedError if arrays or the state of the data are not what was written."""
    if metadata.arrays is None:  # format 1
        return
    found, _ = measure({"params": items.params, "opt_state": items.opt_state})
    check_arrays(str(folder), metadata.arrays, found, "")
    if metadata.data != json_digest(items.data):
        raise DamagedError(f"{folder}: data: the state of the data was changed in storage")


def check_same_run(folder: epath.Path, saved: RunConfig, config: RunConfig) -> None:
    """Raise a UserError that lists all fields in which a resumed run must not differ.

    These are `model`, `data`, `seed`, `training.batch_size`, and of the optimizer `name` and
    `moment_dtype`. Excepted are fields that say where data are (the documents and the tokenizer are
    compared by their digests), how to compute, and how new parameters are initialised.
    """
    old, new = _fixed_fields(saved), _fixed_fields(config)
    problems = [
        f"  {name}: checkpoint {old.get(name, 'lacks it')!r}, now {new.get(name, 'lacks it')!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in old or name not in new or old[name] != new[name]
    ]
    if problems:
        raise UserError(
            "\n".join([f"{folder}: a resumed run must not change these fields:", *problems])
        )


# Fields of model and data that may change.
_FREE = {
    *(f"config.data.{name}" for name in ("source", "heldout_source", "tokenizer", "cache_dir")),
    "config.data.verify_shards",
    *(f"config.model.{name}" for name in ("remat", "platform", "initializer_range")),
}
_FREE_SECTION = "config.model.formulations"


def _fixed_fields(config: RunConfig) -> dict[str, Any]:
    """Return full names and values of the fields that must not change."""
    fields = {}

    def walk(name: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if name != _FREE_SECTION:
                    walk(f"{name}.{key}", value)
        elif name not in _FREE:
            fields[name] = node

    whole = to_dict(config)
    for section in ("model", "data", "seed"):
        walk(f"config.{section}", whole[section])
    fields["config.training.batch_size"] = config.training.batch_size  # the data's state counts it
    for name in ("name", "moment_dtype"):  # they determine the structure of the optimizer's state
        fields[f"config.optimizer.{name}"] = whole["optimizer"][name]
    return fields
