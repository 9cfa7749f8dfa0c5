"""Devices of an absent TPU slice or GPU host, to compile for.

`v5e:4x4` is a TPU slice of that shape, through the compiler in `libtpu`; `h100:8` is so many GPUs
of one host, through JAX's CUDA plugin. Neither needs the hardware, a driver, or an environment.
"""

import importlib.util
import os
import pathlib
from typing import NamedTuple

import jax
from jax.experimental import topologies

from blocktx.chips import CHIPS, Chip

_GPUS = ("a100", "h100", "h200", "b200")  # of one host
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")


_CUBES += ("8x16x16", "16x16x16")


_SHAPES = {  # those that cloud.google.com/tpu/docs lists, and a single chip of each kind
    "v4": _CUBES,
    "v5e": _PLANES,
    "v5p": (*_CUBES, "16x16x24"),
    "v6e": _PLANES,
    **dict.fromkeys(_GPUS, ("1", "2", "4", "8")),
}


# Without these libtpu asks the machine that it is on, which is no TPU, and waits for the answer.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of a machine; the topology says what to compile for
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations may run side by side
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


_TARGETS = pathlib.Path(__file__).parent / "gpu_targets"


class Topology(NamedTuple):
    """Devices of one kind, for `blocktx.parallel.create_mesh`.

    `platform` is what `config.model.platform` must be.
    """

    name: str
    chip: Chip
    platform: str
    devices: list[jax.Device]


def find_topology(name: str, target_config: str | os.PathLike[str] | None = None) -> Topology:
    """Return the devices of a topology.

    Restricts JAX to the CPU, unless it is initialised already.

    Args:
      name: such as `v5e:16x16` or `h100:8`.
      target_config: a file that describes the GPU to XLA (a `stream_executor.GpuTargetConfigProto`
        as text), in place of the one in this package; for when XLA comes to want more of it.

    Raises:
      ValueError: there is no such topology, or the compiler for it is not installed.
      FileNotFoundError: `target_config` is not there.
    """
    kind, _, shape = name.partition(":")
    if kind not in _SHAPES:
        raise ValueError(
            f"topology: got {name!r}; it begins with one of {', '.join(_SHAPES)}, as v5e:4x4 does"
        )
    if shape not in _SHAPES[kind]:
        known = ", ".join(f"{kind}:{shape}" for shape in _SHAPES[kind])
        raise ValueError(f"topology: got {name!r}; use one of {known}")
    jax.config.update("jax_platforms", "cpu")
    if kind in _GPUS:
        devices = _gpus(shape, pathlib.Path(target_config or _TARGETS / f"{kind}.txtpb"))
        return Topology(name, CHIPS[kind], "gpu", devices)
    if target_config is not None:
        raise ValueError(f"target_config: is for GPUs, got topology {name!r}")
    return Topology(name, CHIPS[kind], "tpu", _tpus(kind, shape))


def _tpus(kind: str, shape: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("topology: the TPU compiler is missing; pip install -e '.[aot]'")
    options = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on Cloud TPU
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{shape}", **options
    )
    return list(described.devices)


def _gpus(count: str, target: pathlib.Path) -> list[jax.Device]:
    plugins = importlib.util.find_spec("jax_plugins")
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if plugins is None or not any(importlib.util.find_spec(name) for name in names):
        raise ValueError("topology: JAX's CUDA plugin is missing; pip install -e '.[gpu]'")
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=count,
        topology=f"1x1x{count}",  # slices, hosts, devices
        target_config=target.read_text(),
    )
    return list(described.devices)
