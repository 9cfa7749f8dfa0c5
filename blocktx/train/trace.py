"""Profiler traces of chosen training steps, for TensorBoard or xprof."""

import importlib.metadata
import re
import tempfile
from typing import Any

import jax
from etils import epath

from blocktx.config import UserError
from blocktx.files import copy_folder


class StepTrace:
    """Traces `steps`, and writes to `folder` after the last one or on leaving the `with` block.

    With several processes each has a folder in it: those on one host have the same file names.
    """

    def __init__(self, folder: epath.Path, steps: range):
        several = jax.process_count() > 1
        self._folder = folder / f"process_{jax.process_index()}" if several else folder
        self._steps = steps
        self._temporary: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int, state: Any) -> None:
        """Start or stop the trace. Call it before each step, counted from 0.

        Args:
          step: the number of the step.
          state: the result of the step before, for which the end of a trace waits.
        """
        if step not in self._steps:
            if self._temporary is not None:
                jax.block_until_ready(state)
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


def require_matching_libtpu() -> None:
    """Raise a UserError if the installed libtpu is not the one that this JAX requires.

    The profiler loads libtpu even without a TPU, and another version is a segmentation fault.
    """
    try:
        installed = importlib.metadata.version("libtpu")
        required = importlib.metadata.requires("jax") or []
    except importlib.metadata.PackageNotFoundError:
        return
    if "tpu" not in (jax.config.jax_platforms or "tpu"):  # it is not loaded
        return
    for requirement in required:
        found = re.match(r"libtpu\s*==\s*([\d.]+)\.\*", requirement)
        if found and not installed.startswith(f"{found[1]}."):
            raise UserError(
                f"--profile: libtpu {installed} is installed, and jax "
                f"{importlib.metadata.version('jax')} needs {found[1]}.*; pip install "
                "'jax[tpu]', or set JAX_PLATFORMS=cpu or cuda"
            )
