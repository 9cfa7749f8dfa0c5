"""The backend of the scripts: quiet without a TPU, and a warning about an idle accelerator."""

import glob
import importlib.util
import os
import pathlib
import pkgutil
import sys

import jax

_GOOGLE = "0x1ae0"  # vendor of TPUs on the PCI bus
_NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jaxlib.cuda")


def choose_backend() -> None:
    """Set JAX's platforms if no accelerator can be used, and print what to install for one.

    With libtpu installed and no TPU, JAX would load libtpu, which prints errors, and fall back to
    the CPU. JAX_PLATFORMS and plugins of other vendors are left alone. Call it before JAX is used.
    """
    if jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS"):
        return
    gpu, cuda = has_nvidia_gpu(), any(map(_installed, _CUDA_PLUGINS))
    tpu, libtpu = has_tpu(), _installed("libtpu")
    if gpu and not cuda:
        _warn("an NVIDIA GPU", "cuda13")
    if tpu and not libtpu:
        _warn("a TPU", "tpu")
    if libtpu and not tpu and not has_other_plugins():
        jax.config.update("jax_platforms", "cuda,cpu" if gpu and cuda else "cpu")


def has_nvidia_gpu() -> bool:
    """Return whether a device file of an NVIDIA driver exists."""
    return any(map(os.path.exists, _NVIDIA))


def has_tpu() -> bool:
    """Return whether a PCI device is Google's; on their virtual machines a network card may be."""
    vendors = map(pathlib.Path, glob.glob("/sys/bus/pci/devices/*/vendor"))
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def has_other_plugins() -> bool:
    """Return whether a plugin of JAX is installed that is not NVIDIA's."""
    if not _installed("jax_plugins"):
        return False
    folders = importlib.util.find_spec("jax_plugins").submodule_search_locations
    return any(not m.name.startswith("xla_cuda") for m in pkgutil.iter_modules(folders))


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _warn(what: str, extra: str) -> None:
    print(
        f"warning: {what} is idle, because JAX has no support for it here; "
        f"pip install -e '.[{extra}]'",
        file=sys.stderr,
        flush=True,
    )
