"""Measured peaks of a device: arithmetic and memory bandwidth."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blocktx.cost import Cost

# Rows and columns of a matrix, and bytes: enough that starting a program takes no time beside them.
_SIZES = {"cpu": (2048, 256 * 2**20)}
_ACCELERATOR = (8192, 2**30)
_REPEATS = 5


class MeasuredPeaks(NamedTuple):
    """Peaks of the default device."""

    device: str
    flops_per_second: float  # of a product of two square matrices
    bytes_per_second: float  # of a sum
    matrix: int  # rows and columns
    read_bytes: int  # of the sum

    def seconds(self, cost: Cost) -> float:
        """Return the roofline: the longer of the times of arithmetic and of memory traffic."""
        return max(cost.flops / self.flops_per_second, cost.bytes / self.bytes_per_second)


def measure_machine(
    dtype: str, matrix: int | None = None, read_bytes: int | None = None
) -> MeasuredPeaks:
    """Return the best of a few runs.

    Args:
      dtype: of the matrices.
      matrix: their rows and columns. None: 2048 on a CPU, 8192 elsewhere.
      read_bytes: bytes of the sum. None: 256 MB on a CPU, 1 GB elsewhere.
    """
    sizes = _SIZES.get(jax.default_backend(), _ACCELERATOR)
    rows, read_bytes = matrix or sizes[0], read_bytes or sizes[1]
    square = jnp.ones((rows, rows), dtype)
    numbers = jnp.ones(read_bytes // 4)
    product = _best_seconds(lambda: _product(square))
    read = _best_seconds(lambda: _sum(numbers))
    device = jax.devices()[0].device_kind
    return MeasuredPeaks(device, 2 * rows**3 / product, read_bytes / read, rows, read_bytes)


@jax.jit
def _product(matrix: jax.Array) -> jax.Array:
    return matrix @ matrix


@jax.jit
def _sum(numbers: jax.Array) -> jax.Array:
    return numbers.sum()


def _best_seconds(run: Callable[[], jax.Array]) -> float:
    run().block_until_ready()
    best = float("inf")
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run().block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return best
