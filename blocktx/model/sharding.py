"""Logical axis names of parameters, and their shardings by the rules of `blocktx.parallel`."""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from blocktx.parallel import spec


def named(init: nn.initializers.Initializer, *names: str) -> nn.initializers.Initializer:
    """Return an initializer whose parameter has these names for its axes."""
    return nn.with_logical_partitioning(init, names)


def shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return a NamedSharding for each parameter of a tree that `named` has boxed."""
    return jax.tree.map(
        lambda box: NamedSharding(mesh, spec(box.names, box.value.shape, mesh)),
        boxed,
        is_leaf=nn.meta.is_axis_metadata,
    )
