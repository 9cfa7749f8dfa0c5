"""Where arrays lie: one mesh, one table from the names of their axes to those of the mesh.

Parameters carry a name for each axis from the layer that makes them (`blocktx.model`), the few
activations that matter get theirs from `constrain`. Everything else XLA works out.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from blocktx.config import MeshConfig, ModelConfig, divisors

MESH_AXES = ("data", "fsdp", "tensor")


BATCH_AXES = ("data", "fsdp")  # over which the rows of a batch are spread


# Name of an array's axis -> axes of the mesh that it is cut along.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "layers": (),
    "positions": (),  # of tokens, blocks, prefixes or cache slots
    "width": ("fsdp",),  # of matrices alone: gathered when they are used
    "features": (),  # as wide, of vectors and activations
    "qkv": (),
    "heads": ("tensor",),
    "head_size": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def create_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `config` over `devices`, all of the run by default.

    Devices of several slices (TPU pods that only a data centre network joins) are told apart by
    their `slice_index`; the mesh's `data` axis goes over the slices first.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` is not a multiple of
        the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = _shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(
                f"config.mesh.data: {shape[0]} is no multiple of the {slices} slices that the "
                f"devices are in; use {slices}, and fsdp or tensor inside a slice"
            )
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _shape(config: MeshConfig, count: int) -> tuple[int, ...]:
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    described = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    rest = [axis for axis, size in sizes.items() if size == -1]
    if count % known or (not rest and count != known):
        advice = (
            f"let what is given multiply to one of {divisors(count)}"
            if rest
            else "set one of them to -1, which takes the rest"
        )
        raise ValueError(
            f"config.mesh: {described} does not fit {count} device{'s' * (count > 1)}; {advice}"
        )
    return tuple(count // known if size == -1 else size for size in sizes.values())


def check_model_fits(config: ModelConfig, mesh: Mesh) -> None:
    """Raises a ValueError if heads, MLP or vocabulary cannot be cut along the mesh's `tensor`."""
    tensor = mesh.shape["tensor"]
    sizes = {"vocab_size": config.vocab_size}
    parts = {name: getattr(config, name, None) for name in _STACKS}
    if config.kind == "block" and config.embedder.kind in ("encoder", "cls"):
        parts["embedder.encoder"] = config.embedder.encoder
    for name, part in parts.items():
        if part is not None:
            sizes |= {f"{name}.heads": part.heads, f"{name}.mlp_width": part.mlp_size}
            if getattr(part, "kv_heads", part.heads) != part.heads:
                sizes[f"{name}.key_value_heads"] = part.kv_heads
    for name, size in sizes.items():
        if size % tensor:
            raise ValueError(
                f"config.mesh.tensor: {tensor} does not divide config.model.{name} {size}; use one "
                f"of {divisors(size, tensor)}, or another {name}"
            )


_STACKS = ("block_decoder", "token_decoder", "decoder")


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array of this shape, whose axes have these names, is cut along `mesh`.

    An axis of the mesh cuts the first of the array's that asks for it and that it divides, so that
    a table of odd width is kept whole; None is an axis that is not cut.
    """
    free, cuts = set(mesh.axis_names), []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in RULES[name] if axis in free) if name else ()
        if size % int(np.prod([mesh.shape[axis] for axis in axes])):
            axes = ()
        free -= set(axes)
        cuts.append(axes or None)
    return PartitionSpec(*cuts)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, cut along the mesh that is set (`jax.set_mesh`) as the names of its axes say.

    Without a mesh it is `x`. Under a `vmap` with `spmd_axis_name` the mapped axis is cut along
    that; under one without, XLA decides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def axis_parts(name: str) -> int:
    """The number of parts that an axis of this name is cut into along the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in RULES[name]]))


def replicated(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of an array, its rows, spread over all devices but those of `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are cut into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
