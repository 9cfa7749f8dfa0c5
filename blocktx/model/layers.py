"""The parts of a GPT-NeoX layer, for one sequence: norm, projections, rotary positions, MLP."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import ModelConfig
from blocktx.ops import gelu, normalize
from blocktx.parallel import BATCH_AXES, constrain, named

WIDE = 1024  # the width from which on layers are wide, see `blocktx.model.stack`


class LayerNorm(nn.Module):
    """LayerNorm with epsilon 1e-5; its result is float32 in every compute dtype."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        return normalize(self.config, x_TxD, [self.weights(x_TxD.shape[-1])])[0]

    @nn.compact
    def weights(self, width: int) -> tuple[jax.Array, jax.Array]:
        """Scale and bias, each `[D]` and float32, for `normalize`."""
        ones, zeros = (
            named(init, "features") for init in (nn.initializers.ones, nn.initializers.zeros)
        )
        scale = self.param("scale", ones, (width,), self.config.param_dtype)
        bias = self.param("bias", zeros, (width,), self.config.param_dtype)
        return scale.astype(jnp.float32), bias.astype(jnp.float32)


def layer_norm(config: ModelConfig, *, name: str) -> LayerNorm:
    return LayerNorm(config, name=name)


class Heads(nn.Module):
    """The parameters of `linear(config, (parts, heads, head_size))`, heads kept side by side.

    XLA for TPU lays out an array that ends in heads and head size with positions along lanes, so as
    not to pad it, and has to transpose it for whoever wants the width there.
    """

    config: ModelConfig
    parts: int
    heads: int
    head_size: int

    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        """All parts by one product: `[T, parts, heads * head_size]`."""
        kernel, bias = self.weights(x_TxD.shape[-1])
        return jnp.einsum("td,dne->tne", x_TxD.astype(kernel.dtype), kernel) + bias.astype(
            kernel.dtype
        )

    def apart(self, x_TxD: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """The parts by a product each, `[T, H * C]`, and the biases `[parts, H * C]` they lack."""
        kernel, bias = self.weights(x_TxD.shape[-1])
        x_TxD = x_TxD.astype(kernel.dtype)
        return [x_TxD @ kernel[:, part] for part in range(self.parts)], bias

    @nn.compact
    def weights(self, width: int) -> tuple[jax.Array, jax.Array]:
        """Kernel `[width, parts, H * C]` in the compute dtype, and bias `[parts, H * C]`."""
        config, features = self.config, (self.parts, self.heads, self.head_size)

        def flat_init(key, shape, dtype):
            init = nn.initializers.normal(config.initializer_range)
            return init(key, (width, math.prod(features)), dtype).reshape(shape)

        axes = ("qkv", "heads", "head_size")
        kernel_init, bias_init = (
            named(flat_init, "width", *axes),
            named(nn.initializers.zeros, *axes),
        )
        kernel = self.param("kernel", kernel_init, (width, *features), config.param_dtype)
        bias = self.param("bias", bias_init, features, config.param_dtype)
        kernel = kernel.astype(config.compute_dtype).reshape(width, self.parts, -1)
        if _converts(config):  # as in `_by_converted_kernel`
            kernel = _put_together(kernel, ("width", "qkv", "heads"), width)
            kernel = jax.lax.optimization_barrier(kernel)
        return kernel, bias.reshape(self.parts, -1)


def linear(
    config: ModelConfig,
    features: int | tuple[int, ...],
    *,
    name: str,
    axes: tuple[str, ...],
    axis: int | tuple[int, ...] = -1,
) -> nn.DenseGeneral:
    """A projection of the last axis, or of `axis`, to one or several axes of `features`.

    `axes` are the names of the kernel's axes (`blocktx.parallel.sharding.RULES`).
    """
    inputs = 1 if isinstance(axis, int) else len(axis)
    bias_axes = ["features" if name == "width" else name for name in axes[inputs:]]
    return nn.DenseGeneral(
        features,
        axis=axis,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        kernel_init=named(nn.initializers.normal(config.initializer_range), *axes),
        dot_general=functools.partial(_by_converted_kernel, axes) if _converts(config) else None,
        bias_init=named(nn.initializers.zeros, *bias_axes),
        name=name,
    )


class Embedding(nn.Embed):
    """A table whose rows, where they are cut along the mesh, are put together before a look-up.

    XLA would look up the parts of rows that a device has and then move them, which costs more. The
    table is not converted before: a row's gradient is a sum over all tokens that it stands for.
    """

    def __call__(self, ids: jax.Array) -> jax.Array:
        table_VxD = self.embedding
        if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1:
            table_VxD = constrain(table_VxD, "vocab", "features")
        return jnp.take(table_VxD, ids, axis=0).astype(self.dtype)


def _converts(config: ModelConfig) -> bool:
    return config.platform == "tpu" and config.param_dtype != config.compute_dtype


def _put_together(kernel: jax.Array, axes: tuple[str, ...], width: int) -> jax.Array:
    """A kernel of a narrow layer, whose axes have these names, no longer cut along its width.

    Among a few chips XLA would hand its parts round in a ring and add up what each of them gives,
    which for block_170m on four takes 1.5 times as long. Wide layers are left to it: a loop over
    layers would keep what was put together for the gradient.
    """
    if width >= WIDE:
        return kernel
    return constrain(kernel, *("features" if name == "width" else name for name in axes))


def _by_converted_kernel(
    axes: tuple[str, ...], x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any
) -> jax.Array:
    """`jax.lax.dot_general` of the last axes of `x` and the first of `kernel`, for TPU.

    XLA would read float32 kernels and convert them in each product, again for each of its tiles;
    and heads that are apart from their size would not lie in whole tiles.
    """
    count = len(dimensions[0][1])
    width = min(math.prod(kernel.shape[:count]), math.prod(kernel.shape[count:]))
    kernel = jax.lax.optimization_barrier(_put_together(kernel, axes, width))
    x = x.reshape(*x.shape[:-count], -1)
    kernel = kernel.reshape(-1, *kernel.shape[count:])
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)


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


class MLP(nn.Module):
    """width -> hidden -> width, with exact GELU between."""

    config: ModelConfig
    hidden: int

    @nn.compact
    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        h_TxF = linear(self.config, self.hidden, name="up", axes=("width", "mlp"))(x_TxD)
        h_TxF = gelu(constrain(h_TxF, None, "mlp"))
        return linear(self.config, x_TxD.shape[-1], name="down", axes=("mlp", "width"))(h_TxF)


def over_blocks(method: Callable, in_axes: int | tuple = 0, **options: Any) -> Callable:
    """A module's method over one more leading axis, with the same parameters for all.

    The result takes the module first: `over_blocks(Embedder.__call__)(embedder, tokens_NxK, ...)`.
    """
    shared = dict(variable_axes={"params": None}, split_rngs={"params": False})
    return nn.vmap(method, in_axes=in_axes, **shared, **options)


def over_batch(method: Callable, in_axes: int | tuple = 0) -> Callable:
    """As `over_blocks`, over the rows of a batch, which stay spread over the mesh in all of it."""
    return over_blocks(method, in_axes, spmd_axis_name=BATCH_AXES)
