"""The rows of a batch that a host reads, and the arrays over all devices that they become."""

import jax
import numpy as np
from jax.sharding import Mesh

from blocktx.parallel.sharding import batch_sharding


class HostRows:
    """Which rows of batches of `size` this process's devices hold, on `mesh`.

    Attributes:
      size: rows in the whole batch.
      rows: int64, the numbers of those rows, ascending.
    """

    def __init__(self, size: int, mesh: Mesh):
        self.size, self._sharding = size, batch_sharding(mesh)
        parts = self._sharding.addressable_devices_indices_map((size,)).values()
        self.rows = np.unique(np.concatenate([np.arange(size)[part] for part in parts]))

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch as arrays over all devices, `[size, ...]`, from its rows here, `[rows, ...]`.

        The copy to the devices goes on while they compute.
        """
        return {name: self._place(x) for name, x in batch.items()}

    def _place(self, x: np.ndarray) -> jax.Array:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self.size)
            first = np.searchsorted(self.rows, start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((self.size, *x.shape[1:]), self._sharding, read)
