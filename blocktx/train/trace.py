"""What the devices do in some steps of a run, traced for TensorBoard."""

import tempfile
from typing import Any

import jax
from etils import epath

from blocktx.files import copy_folder


class StepTrace:
    """A trace of `steps`, written to `folder` when they are over or the `with` block is left.

    A run that begins or ends between them traces those that it takes.
    """

    def __init__(self, folder: epath.PathLike, steps: range):
        self._folder, self._steps = folder, steps
        self._temporary: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int, state: Any) -> None:
        """To be called before each step, numbered from 0, with what the last one returned."""
        if step not in self._steps:
            if self._temporary is not None:
                jax.block_until_ready(state)  # the last step is in it to its end
            self._stop()
        elif self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._temporary.name)

    def _stop(self) -> None:
        if self._temporary is not None:
            jax.profiler.stop_trace()
            with self._temporary:
                copy_folder(self._temporary.name, self._folder)
            self._temporary = None
