"""The environment of a process with several fake CPU devices."""

import importlib.metadata
import os

# MLIR emitters take half of the time to compile for a CPU. An unknown flag aborts the process
# without a word under pytest, and jaxlib 0.12 does not know this one.
_HAS_FLAG = importlib.metadata.version("jaxlib").startswith("0.10.")
FAST_COMPILATION = "--xla_cpu_use_fusion_emitters=false" if _HAS_FLAG else ""


def fake_devices(count: int) -> dict[str, str]:
    """Return environment variables, to be added to those of this process."""
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={count}"]
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
        flags.append(FAST_COMPILATION)
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags).strip()}
