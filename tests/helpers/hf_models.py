"""Reads ../shared/golden_hf: models and outputs of transformers (see its README)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).parents[3] / "shared" / "golden_hf"
TOLERANCE = 1e-4  # absolute, on logits of standard deviation 3

CASES = [
    "llama",
    "llama_gqa",
    "llama_gqa_sharded",
    "llama_bf16",
    "llama31_rope",
    "llama32_rope",
    "llama_linear_rope",
    "llama_yarn",
    "smollm2_like",
    "qwen25",
    "qwen3",
    "neox_sequential",
    "neox_nobias",
]


def path(case: str) -> Path:
    """Return the folder of a case; skip the test if it is absent."""
    found = FOLDER / case
    if not found.exists():
        pytest.skip(f"golden data is absent: {found}")
    return found


def expected(case: str) -> dict[str, np.ndarray]:
    with np.load(path(case) / "expected.npz") as arrays:
        return dict(arrays)


def config(case: str, file: str = "config.json") -> dict:
    return json.loads((path(case) / file).read_text())


def weights(case: str) -> dict[str, np.ndarray]:
    """Return all tensors of a case, of all its files."""
    files = sorted(path(case).glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


def copy(case: str, folder: Path) -> Path:
    """Copy the model of a case, for a test to damage."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.json", "*.safetensors"):
        for file in path(case).glob(pattern):
            shutil.copyfile(file, folder / file.name)
    return folder


def edit_config(folder: Path, **changes) -> None:
    """Change fields of config.json; the value "absent" removes one."""
    merged = json.loads((folder / "config.json").read_text()) | changes
    merged = {name: value for name, value in merged.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(merged))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def bytes_of(tensors: dict[str, np.ndarray]) -> dict:
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()}
