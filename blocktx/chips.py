"""Published peaks of accelerators."""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip (one JAX device). Bandwidths are in bytes a second.

    `interconnect` is what a chip can send to the others of its slice (TPU: ICI) or host (GPU:
    NVLink) over all its links together, in one direction.
    """

    name: str
    flops: float  # a second, of bfloat16 matrix products
    hbm_bytes: int
    hbm_bandwidth: float
    interconnect: float
    clock: float  # Hz, of a TPU's cores; it is what `flops` and the size of the matrix units make

    def seconds(self, *, flops: float = 0, hbm: float = 0, sent: float = 0) -> dict[str, float]:
        """The least time that each resource needs, by its name; the greatest binds."""
        return {
            "matrix unit": flops / self.flops,
            "HBM": hbm / self.hbm_bandwidth,
            "interconnect": sent / self.interconnect,
        }


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; interconnect is half of what is given there in both
# directions together. NVIDIA's data sheets, of the SXM forms: dense products.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * _GIB, 1228e9, 300e9, 1.05e9),
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 200e9, 1.5e9),
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, 1.75e9),
        Chip("v6e", 918e12, 32 * _GIB, 1640e9, 400e9, 1.75e9),
        Chip("a100", 312e12, 80_000_000_000, 2039e9, 300e9, 0),
        Chip("h100", 989e12, 80_000_000_000, 3350e9, 450e9, 0),
        Chip("h200", 989e12, 141_000_000_000, 4800e9, 450e9, 0),
        Chip("b200", 2250e12, 180_000_000_000, 8000e9, 900e9, 0),
    )
}


_KINDS = {  # of `jax.Device.device_kind`, by how they begin; those that begin alike: longer first
    "TPU v4 lite": None,
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names; None for a CPU and what is not listed here."""
    for beginning, name in _KINDS.items():
        if device_kind.startswith(beginning):
            return CHIPS.get(name)
    return None
