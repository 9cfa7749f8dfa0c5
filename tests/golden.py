"""Reads ../shared/golden: weights, inputs and outputs of the authors' own code (see its README)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from blocktx.model_config import BlockConfig, StackConfig, VanillaConfig

FOLDER = Path(__file__).parents[2] / "shared" / "golden"
TOLERANCE = 1e-4  # absolute, on logits of standard deviation 3


def read(case: str) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray]]:
    """Weights, config and expected arrays of a case; skips the test where they are absent."""
    folder = FOLDER / case
    if not folder.is_dir():
        pytest.skip(f"golden data is absent: {folder}")
    config = json.loads((folder / "config.json").read_text())
    with np.load(folder / "expected.npz") as arrays:
        expected = dict(arrays)
    return load_file(folder / "model.safetensors"), config, expected


def _stack_config(config: dict[str, Any]) -> StackConfig:
    return StackConfig(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        rotary_fraction=config["rotary_pct"],
    )


def _linear(weights: dict[str, np.ndarray], name: str, *features: int) -> dict[str, np.ndarray]:
    kernel = weights[f"{name}.weight"].T
    return {
        "kernel": kernel.reshape(kernel.shape[0], *features) if features else kernel,
        "bias": weights[f"{name}.bias"].reshape(features or -1),
    }


def _norm(weights: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def _layer(weights: dict[str, np.ndarray], name: str, heads: int) -> dict[str, Any]:
    # The authors fuse [q | k | v] head by head.
    qkv = _linear(weights, f"{name}.attention.query_key_value", heads, 3, -1)
    out = _linear(weights, f"{name}.attention.dense")
    width = out["kernel"].shape[-1]
    return {
        "attention": {
            "qkv": {
                "kernel": qkv["kernel"].transpose(0, 2, 1, 3),
                "bias": qkv["bias"].reshape(heads, 3, -1).transpose(1, 0, 2),
            },
            "out": {"kernel": out["kernel"].reshape(heads, -1, width), "bias": out["bias"]},
        },
        "attention_norm": _norm(weights, f"{name}.input_layernorm"),
        "mlp_norm": _norm(weights, f"{name}.post_attention_layernorm"),
        "mlp": {
            "up": _linear(weights, f"{name}.mlp.dense_h_to_4h"),
            "down": _linear(weights, f"{name}.mlp.dense_4h_to_h"),
        },
    }


def _stack(weights: dict[str, np.ndarray], name: str, stack: StackConfig) -> dict[str, Any]:
    out = {"final_norm": _norm(weights, f"{name}.final_layer_norm")}
    for i in range(stack.layers):
        out[f"layers_{i}"] = _layer(weights, f"{name}.layers.{i}", stack.heads)
    return out


def block_model(weights: dict[str, np.ndarray], config: dict[str, Any]):
    """Config (separate layers) and parameters of a lookup + prefix case."""
    token = config["token_decoder"]
    model = BlockConfig(
        vocab_size=weights["token_decoder.embed_out.weight"].shape[0],
        context_length=64 * config["block_length"],
        block_length=config["block_length"],
        prefix_length=token["expansion_ratio"],
        block_decoder=_stack_config(config["block_decoder"]["config"]),
        token_decoder=_stack_config(token["config"]),
        scan_layers=False,
    )
    shape = (model.prefix_length, model.token_decoder.width)
    expansion = weights["token_decoder.expansion_layer.weight"][:, :, 0].T
    params = {
        "embedder": {"tokens": {"embedding": weights["embedder.embeddings.weight"]}},
        "block_decoder": {"stack": _stack(weights, "block_decoder.gpt_neox", model.block_decoder)},
        "token_decoder": {
            "embed": {"embedding": weights["token_decoder.gpt_neox.embed_in.weight"]},
            "prefix": {
                "kernel": expansion.reshape(-1, *shape),
                "bias": weights["token_decoder.expansion_layer.bias"].reshape(shape),
            },
            "stack": _stack(weights, "token_decoder.gpt_neox", model.token_decoder),
            "classifier": {"kernel": weights["token_decoder.embed_out.weight"].T},
        },
    }
    return model, params


def vanilla_model(weights: dict[str, np.ndarray], config: dict[str, Any]):
    """Config (separate layers) and parameters of a vanilla case."""
    model = VanillaConfig(
        vocab_size=weights["embed_out.weight"].shape[0],
        context_length=256,
        decoder=_stack_config(config["config"]),
        scan_layers=False,
    )
    params = {
        "embed": {"embedding": weights["gpt_neox.embed_in.weight"]},
        "decoder": {"stack": _stack(weights, "gpt_neox", model.decoder)},
        "classifier": {"kernel": weights["embed_out.weight"].T},
    }
    return model, params
