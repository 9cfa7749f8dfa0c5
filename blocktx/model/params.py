"""Parameters stacked over layers, or one subtree a layer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blocktx.config import ModelConfig
from blocktx.model.build import Model
from blocktx.model.quantize import Int8Kernel


def for_decoding(model: Model, params: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """Return a model and its parameters as decoding needs them.

    Layers are separate, as a loop that slices stacked arrays copies every weight at every step.
    Parameters are in the compute dtype, as a loop would read wider ones at every step, or XLA hold
    both. Norms are in float32, in which they are computed: to convert their weights at every step
    takes a TPU up to a tenth of its time.
    """
    dtype = model.config.compute_dtype
    config = dataclasses.replace(model.config, scan_layers=False, param_dtype=dtype)

    def cast(tree: dict[str, Any] | jax.Array) -> dict[str, Any] | jax.Array:
        if isinstance(tree, Int8Kernel):
            return tree
        if not isinstance(tree, dict):
            return tree.astype(dtype)
        if "scale" in tree:
            return {name: x.astype(jnp.float32) for name, x in tree.items()}
        return {name: cast(below) for name, below in tree.items()}

    return model.clone(config=config), cast(unstack_layers(params))


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters of a model with `scan_layers` as those of the same model without.

    Every subtree `layers`, whose leaves have a leading layer axis, becomes `layers_0`, ...
    """
    out = {}
    for name, value in params.items():
        if name == "layers":
            count = jax.tree.leaves(value)[0].shape[0]
            for i in range(count):
                out[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
        else:
            out[name] = unstack_layers(value) if isinstance(value, dict) else value
    return out


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Invert `unstack_layers`. Arrays of NumPy stay arrays of NumPy."""
    out = {
        name: stack_layers(value) if isinstance(value, dict) else value
        for name, value in params.items()
        if not name.startswith("layers_")
    }
    layers = [params[f"layers_{i}"] for i in range(len(params)) if f"layers_{i}" in params]
    if layers:
        out["layers"] = jax.tree.map(_stack, *layers)
    return out


def _stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    stack = np.stack if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp.stack
    return stack(leaves)


def classifier_kernel(config: ModelConfig, params: dict[str, Any]) -> jax.Array:
    """Return the classifier `[E, V]`; the transposed embedding table if it is tied."""
    owner = params["token_decoder"] if config.kind == "block" else params
    if config.tied_classifier:
        return jnp.asarray(owner["embed"]["embedding"]).T
    return jnp.asarray(owner["classifier"]["kernel"])
