"""Weight-only int8: kernels as 8-bit integers with a scale for each output channel.

Decoding reads every kernel for every token, so its time at small batches is that of their bytes.
Products are computed in the compute dtype. XLA converts a kernel where it is used: within the
product on TPUs, before it where the product is a library's.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from blocktx.config import ModelConfig, UserError

QUANTIZATIONS = ("int8",)
_INPUT_AXES = {"out": 2, "projection": 2, "mlp_up": 2}  # of a kernel; of all others the first


@flax.struct.dataclass
class Int8Kernel:
    """A quantized kernel or table, which modules use as an array: `values * scale`.

    `values` comes first: Linen compares the shape of a parameter's first leaf.
    """

    values: jax.Array  # int8, the shape of the kernel
    scale: jax.Array  # float32, with 1 for the axes that share it

    def __jax_array__(self) -> jax.Array:
        return self.values.astype(jnp.float32) * self.scale

    def astype(self, dtype: Any) -> jax.Array:
        """Return the kernel in a floating-point dtype."""
        return self.__jax_array__().astype(dtype)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Return rows of a table, float32."""
        return jnp.take(self.values, ids, axis=0) * jnp.take(self.scale, ids, axis=0)


def quantize(config: ModelConfig, params: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """Return parameters with all kernels, and the table of a tied classifier, in int8.

    Biases, norms and tables that are only looked up keep their dtype. The result takes the place of
    the parameters in `model.apply`, with stacked or with separate layers. It is not for training.

    Args:
      config: of the model.
      params: its parameters.
      kind: "int8". None: return `params`.

    Raises:
      UserError: there is no such kind.
    """
    if kind is None:
        return params
    if kind not in QUANTIZATIONS:
        raise UserError(f"quantize: got {kind!r}, must be None or one of {QUANTIZATIONS}")
    table = ("token_decoder", "embed") if config.kind == "block" else ("embed",)

    def walk(path: tuple[str, ...], tree: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                out[name] = walk((*path, name), value)
            elif name == "kernel":
                stacked = int("layers" in path)
                inputs = _INPUT_AXES.get(path[-1], 1)
                out[name] = _quantized(value, tuple(range(stacked, stacked + inputs)))
            elif name == "embedding" and path == table and config.tied_classifier:
                out[name] = _quantized(value, (1,))
            else:
                out[name] = value
        return out

    return jax.jit(lambda tree: walk((), tree))(params)


def _quantized(kernel: jax.Array, axes: tuple[int, ...]) -> Int8Kernel:
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axes, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / 127)
    return Int8Kernel(jnp.round(kernel / scale).astype(jnp.int8), scale)
