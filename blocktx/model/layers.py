"""The parts of a layer for one sequence: norm, projections, tables, classifier, MLP."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from blocktx.config import ModelConfig
from blocktx.model.quantize import Int8Kernel
from blocktx.model.sharding import named
from blocktx.ops import gelu, normalize
from blocktx.parallel import BATCH_AXES, constrain

WIDE = 1024  # layers of this width and more are wide, see `blocktx.model.stack`


class Norm(nn.Module):
    """LayerNorm or RMSNorm; the result is float32 in every compute dtype.

    Parameters: scale `[D]`, and bias `[D]` of a LayerNorm.
    """

    config: ModelConfig
    kind: Literal["layer", "rms"] = "layer"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        return self.apply_all(x_TxD, [self.weights(x_TxD.shape[-1])])[0]

    def apply_all(self, x_TxD: jax.Array, weights: list) -> list[jax.Array]:
        """Return one norm for each `weights` of this and other modules of the same kind."""
        lean = self.config.formulations.norm == "lean"
        return normalize(x_TxD, weights, kind=self.kind, epsilon=self.epsilon, lean=lean)

    @nn.compact
    def weights(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        """Return scale and bias, `[D]` and float32."""

        def param(name: str, init: nn.initializers.Initializer) -> jax.Array:
            init = named(init, "features")
            return self.param(name, init, (width,), self.config.param_dtype).astype(jnp.float32)

        scale = param("scale", nn.initializers.ones)
        return scale, param("bias", nn.initializers.zeros) if self.kind == "layer" else None


class Heads(nn.Module):
    """A projection to `parts` times `heads` heads, side by side.

    XLA for TPU lays out an array that ends in heads and head size with positions along lanes, to
    avoid padding, and has to transpose it for consumers that want the width there.

    Parameters: kernel `[D, parts, H, C]`, without the second axis for one part, and such a bias.
    """

    config: ModelConfig
    parts: int
    heads: int
    head_size: int
    use_bias: bool = True

    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        """Return all parts by one product, `[T, parts, H * C]`."""
        kernel, bias = self.weights(x_TxD.shape[-1])
        y_Txnxe = jnp.einsum("td,dne->tne", x_TxD.astype(kernel.dtype), kernel)
        return y_Txnxe if bias is None else y_Txnxe + bias.astype(kernel.dtype)

    def apart(
        self, x_TxD: jax.Array, repeat: int = 1
    ) -> tuple[list[jax.Array], list[jax.Array | None]]:
        """Return the parts by a product each, without biases, and the biases.

        Args:
          x_TxD: inputs.
          repeat: times that each head is repeated. The weights are repeated, so that the gradient
            of a repeated head is summed in them.
        """
        kernel, bias = self.weights(x_TxD.shape[-1])

        def repeated(w_xnxe: jax.Array) -> jax.Array:
            if repeat == 1:
                return w_xnxe
            w_xnxHxC = w_xnxe.reshape(*w_xnxe.shape[:-1], self.heads, self.head_size)
            return jnp.repeat(w_xnxHxC, repeat, axis=-2).reshape(*w_xnxe.shape[:-1], -1)

        kernel, x_TxD = repeated(kernel), x_TxD.astype(kernel.dtype)
        products = [x_TxD @ kernel[:, part] for part in range(self.parts)]
        return products, [None] * self.parts if bias is None else list(repeated(bias))

    @nn.compact
    def weights(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        """Return kernel `[D, parts, H * C]` in the compute dtype, and bias `[parts, H * C]`."""
        config = self.config
        features = (self.parts, self.heads, self.head_size)
        axes = ("qkv", "heads", "head_size")
        if self.parts == 1:
            features, axes = features[1:], axes[1:]

        def flat_init(key, shape, dtype):
            init = nn.initializers.normal(config.initializer_range)
            return init(key, (width, math.prod(features)), dtype).reshape(shape)

        kernel_init = named(flat_init, "width", *axes)
        kernel = self.param("kernel", kernel_init, (width, *features), config.param_dtype)
        kernel = kernel.astype(config.compute_dtype).reshape(width, self.parts, -1)
        if _casts_kernel(config):  # as in `_bf16_dot_general`
            kernel = _gather_kernel(kernel, ("width", "qkv", "heads"), width)
            kernel = jax.lax.optimization_barrier(kernel)
        if not self.use_bias:
            return kernel, None
        bias_init = named(nn.initializers.zeros, *axes)
        bias = self.param("bias", bias_init, features, config.param_dtype)
        return kernel, bias.reshape(self.parts, -1)


def linear(
    config: ModelConfig,
    features: int | tuple[int, ...],
    *,
    name: str,
    axes: tuple[str, ...],
    axis: int | tuple[int, ...] = -1,
    use_bias: bool = True,
) -> nn.DenseGeneral:
    """Return a projection of the last axis, or of `axis`, to one or several axes of `features`.

    `axes` are the names of the kernel's axes (`RULES` in `blocktx.parallel`).
    """
    inputs = 1 if isinstance(axis, int) else len(axis)
    bias_axes = ["features" if name == "width" else name for name in axes[inputs:]]
    dot_general = functools.partial(_bf16_dot_general, axes) if _casts_kernel(config) else None
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        kernel_init=named(nn.initializers.normal(config.initializer_range), *axes),
        dot_general=dot_general,
        bias_init=named(nn.initializers.zeros, *bias_axes),
        name=name,
    )


class Embedding(nn.Embed):
    """A table whose rows are gathered from the `fsdp` axis before a look-up.

    XLA would look up each device's parts of rows and then move them, which costs more. The table is
    not cast before the look-up: a row's gradient is a sum over all tokens that use it.
    """

    def __call__(self, ids: jax.Array) -> jax.Array:
        table_VxD = self.embedding
        if isinstance(table_VxD, Int8Kernel):
            return table_VxD.rows(ids).astype(self.dtype)
        if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1:
            table_VxD = constrain(table_VxD, "vocab", "features")
        return jnp.take(table_VxD, ids, axis=0).astype(self.dtype)


def _casts_kernel(config: ModelConfig) -> bool:
    wider = config.param_dtype != config.compute_dtype
    return wider and config.formulations.kernels == "cast_first"


def _gather_kernel(kernel: jax.Array, axes: tuple[str, ...], width: int) -> jax.Array:
    """Gather a kernel of a narrow layer along its width.

    On few chips XLA uses a ring collective-permute matmul, 1.5x slower for block_170m on 4 chips.
    Wide layers are left to it: a loop over layers would save the gathered kernel for the gradient.
    """
    if width >= WIDE:
        return kernel
    return constrain(kernel, *("features" if name == "width" else name for name in axes))


def _bf16_dot_general(
    axes: tuple[str, ...], x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any
) -> jax.Array:
    """Contract the last axes of `x` with the first of a kernel that is cast beforehand, for TPU.

    XLA would read float32 kernels and cast them in each product, again for each of its tiles. Heads
    that are apart from their size would not fill tiles.
    """
    count = len(dimensions[0][1])
    width = min(math.prod(kernel.shape[:count]), math.prod(kernel.shape[count:]))
    kernel = jax.lax.optimization_barrier(_gather_kernel(kernel, axes, width))
    x = x.reshape(*x.shape[:-count], -1)
    kernel = kernel.reshape(-1, *kernel.shape[count:])
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)


def embedding(config: ModelConfig, width: int, *, name: str, rows: int | None = None) -> Embedding:
    """Return a table of `rows` (None: `vocab_size`) of `width`."""
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


def classifier(config: ModelConfig, table: Embedding, *, name: str) -> Callable:
    """Return the next-token classifier, without bias: float32 logits in every compute dtype.

    If `config.tied_classifier`, it is the transposed `table` and has no parameters.
    """
    if config.tied_classifier:
        return functools.partial(_tied_logits, config, table)
    return nn.Dense(
        config.vocab_size,
        use_bias=False,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        kernel_init=named(nn.initializers.normal(config.initializer_range), "width", "vocab"),
        dot_general=_float32_dot_general,
        name=name,
    )


def _tied_logits(config: ModelConfig, table: Embedding, hidden_xE: jax.Array) -> jax.Array:
    table_VxE = constrain(table.embedding.astype(config.compute_dtype), "vocab", "features")
    contracted = (((hidden_xE.ndim - 1,), (1,)), ((), ()))
    return _float32_dot_general(hidden_xE.astype(config.compute_dtype), table_VxE, contracted)


_float32_dot_general = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


class MLP(nn.Module):
    """width -> hidden -> width: GELU of `up`, or SwiGLU of `gate` and `up`, then `down`."""

    config: ModelConfig
    hidden: int
    kind: Literal["gelu", "swiglu"] = "gelu"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_TxD: jax.Array) -> jax.Array:
        def project(name: str, features: int, axes: tuple[str, str]) -> nn.DenseGeneral:
            return linear(self.config, features, name=name, axes=axes, use_bias=self.use_bias)

        h_TxF = constrain(project("up", self.hidden, ("width", "mlp"))(x_TxD), None, "mlp")
        if self.kind == "gelu":
            h_TxF = gelu(h_TxF)
        else:
            gate_TxF = project("gate", self.hidden, ("width", "mlp"))(x_TxD)
            h_TxF *= nn.silu(constrain(gate_TxF, None, "mlp"))
        return project("down", x_TxD.shape[-1], ("mlp", "width"))(h_TxF)


def over_blocks(method: Callable, in_axes: int | tuple = 0, **options: Any) -> Callable:
    """Batch a module's method over one more leading axis, with shared parameters.

    The result takes the module first: `over_blocks(Embedder.__call__)(embedder, tokens_NxK, ...)`.
    """
    shared = dict(variable_axes={"params": None}, split_rngs={"params": False})
    return nn.vmap(method, in_axes=in_axes, **shared, **options)


def over_batch(method: Callable, in_axes: int | tuple = 0) -> Callable:
    """`over_blocks` over the batch axis, kept sharded (spmd_axis_name)."""
    return over_blocks(method, in_axes, spmd_axis_name=BATCH_AXES)
