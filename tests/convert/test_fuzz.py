"""Damaged files: an error that names the file or tensor, or a model whose weights are finite."""

import json
import random

import jax
import numpy as np
import pytest

from blocktx.convert import load_hf, mapping
from tests.helpers import hf_models

VALUES = [None, True, -1, 0, 10**30, 1e308, float("nan"), "x", [], {}, [[1]], {"type": "yarn"}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(mapping, "check_ours", lambda *_: None)  # traces, and is about the table
    return hf_models.copy("llama_gqa", tmp_path / "checkpoint")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with a bit flipped, a piece removed, repeated or zeroed, or cut short."""
    at = rng.randrange(len(data))
    size = min(rng.choice([1, 2, 8, 64]), len(data) - at)
    middle = {
        "flip": bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 : at + size],
        "remove": b"",
        "repeat": data[at : at + size] * 2,
        "zero": bytes(size),
    }
    how = rng.choice([*middle, "cut"])
    return data[:at] if how == "cut" else data[:at] + middle[how] + data[at + size :]


def load_or_refuse(folder):
    """Load the model, or return the message of its refusal."""
    try:
        _, params = load_hf(folder)
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        message, _ = None, check_finite(params)
    assert message is None or 0 < len(message) < 20_000
    return message


def check_finite(params):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_bytes(folder, name):
    rng = random.Random(name)
    file = folder / name
    whole = file.read_bytes()
    for _ in range(60):
        file.write_bytes(damaged(whole, rng))
        load_or_refuse(folder)


def test_damaged_headers_of_safetensors(folder):
    rng = random.Random(0)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(60):
        header = damaged(whole[8 : 8 + size], rng)
        file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
        refused += load_or_refuse(folder) is not None
    assert refused > 30


def test_any_value_in_any_field_of_config_json(folder):
    config = hf_models.config("llama_gqa")
    for name in config:
        for value in VALUES:
            (folder / "config.json").write_text(json.dumps(config | {name: value}))
            message = load_or_refuse(folder)
            assert message is None or any(
                part in message for part in ("config.json", "tensor", ": shape (")
            )
    for value in VALUES:
        (folder / "config.json").write_text(json.dumps(value))
        assert "config.json" in (load_or_refuse(folder) or "")
