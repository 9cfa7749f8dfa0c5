"""Sharding: the device mesh and the logical-axis rules.

Layers name the axes of their parameters (`named`); a few activations are named with `constrain`.
XLA derives the sharding of all other arrays.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from blocktx.config import MeshConfig, ModelConfig, UserError, divisors

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # shard the rows of a batch


# Logical axis -> axes of the mesh that shard it.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "layers": (),
    "positions": (),  # of tokens, blocks, prefixes or cache slots
    "width": ("fsdp",),  # of matrices only, which are gathered when they are used
    "features": (),  # the same axis of vectors and activations
    "qkv": (),
    "heads": ("tensor",),
    "head_size": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def create_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of `config` over `devices`, by default all devices of the run.

    With several TPU slices (connected by a data centre network, told apart by `slice_index`), the
    `data` axis spans the slices.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is not a multiple of
        the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = _shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise UserError(
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
            f"let the given sizes multiply to one of {divisors(count)}"
            if rest
            else "set one of them to -1, for all remaining devices"
        )
        raise UserError(
            f"config.mesh: {described} does not fit {count} device{'s' * (count > 1)}; {advice}"
        )
    return tuple(count // known if size == -1 else size for size in sizes.values())


def check_model_fits(config: ModelConfig, mesh: Mesh) -> None:
    """Raise a UserError if the mesh's `tensor` axis does not divide heads, MLP or vocabulary."""
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
            raise UserError(
                f"config.mesh.tensor: {tensor} does not divide config.model.{name} {size}; use one "
                f"of {divisors(size, tensor)}, or another {name}"
            )


_STACKS = ("block_decoder", "token_decoder", "decoder")


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of an array with these axis names and this shape.

    Each mesh axis shards the first array axis whose rule names it and whose size it divides. Other
    axes, and axes named None, are replicated.
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
    """Shard `x` over the current mesh (`jax.set_mesh`) according to its axis names.

    Return `x` if no mesh is set. Under `vmap` the mapped axis is sharded by `spmd_axis_name`, or as
    XLA decides if there is none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def axis_parts(name: str) -> int:
    """Return the number of shards of an axis of this name on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in RULES[name]]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over `data` and `fsdp`, replicated over `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Return the number of shards of the rows of a batch."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
