"""The parts of a GPT-NeoX layer, for one sequence: norm, projections, rotary positions, MLP."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.model_config import ModelConfig
from blocktx.sharding import BATCH_AXES, constrain, named


def layer_norm(config: ModelConfig, *, name: str) -> nn.LayerNorm:
    """LayerNorm with epsilon 1e-5; its result is float32 in every compute dtype."""
    return nn.LayerNorm(
        epsilon=1e-5,
        dtype=jnp.float32,
        param_dtype=config.param_dtype,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits that the golden tests see
        scale_init=named(nn.initializers.ones, "features"),
        bias_init=named(nn.initializers.zeros, "features"),
        name=name,
    )


def linear(
    config: ModelConfig,
    features: int | tuple[int, ...],
    *,
    name: str,
    axes: tuple[str, ...],
    axis: int | tuple[int, ...] = -1,
) -> nn.DenseGeneral:
    """A projection of the last axis, or of `axis`, to one or several axes of `features`.

    `axes` are the names of the kernel's axes (`blocktx.sharding.RULES`).
    """
    inputs = 1 if isinstance(axis, int) else len(axis)
    bias_axes = ["features" if name == "width" else name for name in axes[inputs:]]
    return nn.DenseGeneral(
        features,
        axis=axis,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        kernel_init=named(nn.initializers.normal(config.initializer_range), *axes),
        bias_init=named(nn.initializers.zeros, *bias_axes),
        name=name,
    )


class Embedding(nn.Embed):
    """A table whose rows are put together before they are looked up, in the compute dtype.

    XLA would look up the parts of rows that a device has and then move them, which costs more.
    """

    def __call__(self, ids: jax.Array) -> jax.Array:
        table_VxD = constrain(self.embedding.astype(self.dtype), "vocab", "features")
        return jnp.take(table_VxD, ids, axis=0)


def embedding(config: ModelConfig, width: int, *, name: str, rows: int | None = None) -> Embedding:
    """A table of `rows` (None: `vocab_size`) of `width`."""
    return Embedding(
        rows or config.vocab_size,
        width,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        embedding_init=named(
            nn.initializers.normal(config.initializer_range),
            "vocab" if rows is None else "positions",
            "width",
        ),
        name=name,
    )


def classifier(config: ModelConfig, *, name: str) -> nn.Dense:
    """Untied next-token classifier without bias; its logits are float32 in every compute dtype."""
    return nn.Dense(
        config.vocab_size,
        use_bias=False,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        kernel_init=named(nn.initializers.normal(config.initializer_range), "width", "vocab"),
        dot_general=_float32_dot_general,
        name=name,
    )


_float32_dot_general = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x * Phi(x).

    `jax.nn.gelu(approximate=False)` goes through erfc, which takes 1.5 times as long on a CPU and
    gains digits only where the result is below 1e-6.
    """
    return x * (0.5 * (1 + jax.lax.erf(x * (1 / math.sqrt(2)))))


class MLP(nn.Module):
    """width -> hidden -> width, with exact GELU between."""

    config: ModelConfig
    hidden: int

    @nn.compact
    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        h_TxF = linear(self.config, self.hidden, name="up", axes=("width", "mlp"))(x_TxD)
        h_TxF = gelu(constrain(h_TxF, None, "mlp"))
        return linear(self.config, x_TxD.shape[-1], name="down", axes=("mlp", "width"))(h_TxF)


def rotary(x_TxHxC: jax.Array, position_T: jax.Array, dims: int, base: float) -> jax.Array:
    """Rotate the first `dims` of each head by its position, half-split; the rest is left alone.

    Dimension i < dims/2 is paired with i + dims/2 and turned by `position * base^(-2i/dims)`.
    """
    if dims == 0:
        return x_TxHxC
    frequency = base ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    angle = position_T[:, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = jnp.split(x_TxHxC, [dims // 2, dims], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x_TxHxC.dtype) for part in turned] + [rest], axis=-1)


def over_blocks(method: Callable, in_axes: int | tuple = 0, **options: Any) -> Callable:
    """A module's method over one more leading axis, with the same parameters for all.

    The result takes the module first: `over_blocks(Embedder.__call__)(embedder, tokens_NxK, ...)`.
    """
    shared = dict(variable_axes={"params": None}, split_rngs={"params": False})
    return nn.vmap(method, in_axes=in_axes, **shared, **options)


def over_batch(method: Callable, in_axes: int | tuple = 0) -> Callable:
    """As `over_blocks`, over the rows of a batch, which stay spread over the mesh in all of it."""
    return over_blocks(method, in_axes, spmd_axis_name=BATCH_AXES)
