"""Settings of a run on NVIDIA GPUs. What the environment sets is kept."""

import glob
import os
import pathlib

import jax

from blocktx.parallel.backend import has_nvidia_gpu

_FRACTION = "XLA_CLIENT_MEM_FRACTION"
_HOPPER = ("H100", "H200", "H20", "GH200")


def prepare_gpu(*, training: bool) -> dict[str, str]:
    """Set environment variables and JAX's options for GPUs, where the environment does not.

    - XLA_CLIENT_MEM_FRACTION: 0.9 of the memory, in place of 0.75.
    - When training, JAX's optimization level O1: XLA then overlaps collectives with products.
    - When training on several GPUs of the Hopper generation, CUDA_DEVICE_MAX_CONNECTIONS 1: kernels
      then start in the order in which XLA scheduled them.

    Call it before JAX uses a device. Without an NVIDIA GPU it does nothing.

    Returns:
      What was set, by name.
    """
    if not has_nvidia_gpu():
        return {}
    chosen = {_FRACTION: "0.9"}
    if os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"):  # its older name; both are an error
        chosen = {}
    models = gpu_models()
    if training and len(models) > 1 and all(any(h in m for h in _HOPPER) for m in models):
        chosen["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    chosen = {name: value for name, value in chosen.items() if not os.environ.get(name)}
    os.environ.update(chosen)
    if training and not os.environ.get("JAX_OPTIMIZATION_LEVEL"):
        jax.config.update("jax_optimization_level", "O1")
        chosen["JAX_OPTIMIZATION_LEVEL"] = "O1"
    return chosen


def gpu_models() -> list[str]:
    """Return the models of this machine's GPUs, by the driver's files; empty if it has none."""
    found = []
    for path in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")):
        for line in pathlib.Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Model":
                found.append(value.strip())
    return found
