"""Reads ../shared/golden: weights, inputs and outputs of the authors' own code (see its README)."""

from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[3] / "shared" / "golden"
TOLERANCE = 1e-4  # absolute, on logits of standard deviation 3

LOOKUP = ["lookup_prefix1", "lookup_prefix1_b1", "lookup_prefix2", "lookup_prefix2_b8"]
BLOCK = [
    *LOOKUP,
    "lookup_projection",
    "megabyte_sum",
    "roberta_prefix",
    "cls_prefix",
    "cls_prefix_concat",
    "cls_sum",
]
VANILLA = ["vanilla", "vanilla_wide_ffn"]
UPTRAINED = ["partition", "partition31", "skip", "duplicate"]


def path(case: str) -> Path:
    """The weights of a case: its folder, or its file in `uptrain`; skips the test without them."""
    found = FOLDER / "uptrain" / f"{case}.safetensors" if case in UPTRAINED else FOLDER / case
    if not found.exists():
        pytest.skip(f"golden data is absent: {found}")
    return found


def weights_file(case: str) -> Path:
    found = path(case)
    return found / "model.safetensors" if found.is_dir() else found


def expected(case: str) -> dict[str, np.ndarray]:
    """Inputs and outputs of a case."""
    found = path(case)
    folder, prefix = (found, "") if found.is_dir() else (found.parent, f"{case}_")
    with np.load(folder / "expected.npz") as arrays:
        return {
            name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)
        }
