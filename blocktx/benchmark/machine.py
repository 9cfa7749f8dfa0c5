"""Measured peaks of a device: arithmetic and memory bandwidth."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blocktx.cost import Cost

_MATRIX = 2048  # rows and columns
_READ_BYTES = 256 * 2**20
_REPEATS = 5


class MeasuredPeaks(NamedTuple):
    """Peaks of the default device."""

    device: str
    flops_per_second: float  # of a product of two matrices of 2048 x 2048
    bytes_per_second: float  # of a sum over 256 MB

    def seconds(self, cost: Cost) -> float:
        """Return the roofline: the longer of the times of arithmetic and of memory traffic."""
        return max(cost.flops / self.flops_per_second, cost.bytes / self.bytes_per_second)


def measure_machine(dtype: str) -> MeasuredPeaks:
    """Return the best of a few runs, with matrices of `dtype`."""
    matrix = jnp.ones((_MATRIX, _MATRIX), dtype)
    numbers = jnp.ones(_READ_BYTES // 4)
    product = _best_seconds(lambda: _product(matrix))
    read = _best_seconds(lambda: _sum(numbers))
    device = jax.devices()[0].device_kind
    return MeasuredPeaks(device, 2 * _MATRIX**3 / product, _READ_BYTES / read)


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
