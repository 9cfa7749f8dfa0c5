"""The environment of a process with several fake CPU devices."""

import os


def fake_devices(count: int) -> dict[str, str]:
    """Return environment variables, to be added to those of this process."""
    flag = f"--xla_force_host_platform_device_count={count}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}
