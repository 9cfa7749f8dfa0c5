"""Reads ../shared/golden_hf: weights and outputs of Hugging Face transformers (see its README).

The loader is for tests of the model alone; `blocktx.convert` has the one for users.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from blocktx.config.model import VanillaConfig
from blocktx.config.stack import RotaryScaling, StackConfig

FOLDER = Path(__file__).parents[3] / "shared" / "golden_hf"
LLAMA = [
    "llama",
    "llama_gqa",
    "llama31_rope",
    "llama32_rope",
    "llama_linear_rope",
    "llama_yarn",
    "smollm2_like",
    "qwen25",
    "qwen3",
]
NEOX = ["neox_sequential", "neox_nobias"]


def load(case: str) -> tuple[VanillaConfig, dict, dict[str, np.ndarray]]:
    """Return the config, the parameters with separate layers, and the expected arrays of a case."""
    if not (FOLDER / case).exists():
        pytest.skip(f"golden data is absent: {FOLDER / case}")
    hf = json.loads((FOLDER / case / "config.json").read_text())
    tensors = load_file(FOLDER / case / "model.safetensors")
    read = _neox if case in NEOX else _llama
    with np.load(FOLDER / case / "expected.npz") as arrays:
        return *read(hf, tensors), dict(arrays)


def _config(hf: dict, stack: StackConfig) -> VanillaConfig:
    return VanillaConfig(
        vocab_size=hf["vocab_size"],
        context_length=hf["max_position_embeddings"],
        tied_classifier=hf["tie_word_embeddings"],
        scan_layers=False,
        decoder=stack,
    )


def _scaling(rope: dict) -> RotaryScaling:
    kind = {"default": "none"}.get(rope["rope_type"], rope["rope_type"])
    names = {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "original_max_position_embeddings": "original_context",
    }
    return RotaryScaling(kind, **{ours: rope[name] for name, ours in names.items() if name in rope})


def _llama(hf: dict, tensors: dict) -> tuple[VanillaConfig, dict]:
    heads, kv_heads, size = hf["num_attention_heads"], hf["num_key_value_heads"], hf.get("head_dim")
    size = size or hf["hidden_size"] // heads
    rope = hf["rope_parameters"]
    stack = StackConfig.llama(
        hf["num_hidden_layers"],
        hf["hidden_size"],
        heads,
        key_value_heads=kv_heads,
        head_width=size,
        mlp_width=hf["intermediate_size"],
        norm_epsilon=hf["rms_norm_eps"],
        rotary_base=rope["rope_theta"],
        rotary_scaling=_scaling(rope),
        biases="qkv" if hf["model_type"] == "qwen2" else "none",
        qk_norm=hf["model_type"] == "qwen3",
    )

    def layer(i: int) -> dict:
        prefix = f"model.layers.{i}."

        def get(name: str) -> np.ndarray:
            return tensors[prefix + name]

        def heads_of(name: str, count: int) -> dict:
            found = {"kernel": get(f"{name}.weight").T.reshape(-1, count, size)}
            if f"{prefix}{name}.bias" in tensors:
                found["bias"] = get(f"{name}.bias").reshape(count, size)
            return found

        q, k, v = (
            heads_of(f"self_attn.{name}_proj", count)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        joint = [q, k, v] if heads == kv_heads else [k, v]
        stacked = {name: np.stack([x[name] for x in joint], axis=-3) for name in q}
        attention = {"qkv": stacked} if heads == kv_heads else {"q": q, "kv": stacked}
        attention["out"] = {"kernel": get("self_attn.o_proj.weight").T.reshape(heads, size, -1)}
        for name in ("q_norm", "k_norm"):
            if stack.qk_norm:
                attention[name] = {"scale": get(f"self_attn.{name}.weight")}
        mlp = {x: {"kernel": get(f"mlp.{x}_proj.weight").T} for x in ("gate", "up", "down")}
        return {
            "attention": attention,
            "mlp": mlp,
            "attention_norm": {"scale": get("input_layernorm.weight")},
            "mlp_norm": {"scale": get("post_attention_layernorm.weight")},
        }

    params = _params([layer(i) for i in range(stack.layers)], tensors["model.embed_tokens.weight"])
    params["decoder"]["stack"]["final_norm"] = {"scale": tensors["model.norm.weight"]}
    if not hf["tie_word_embeddings"]:
        params["classifier"] = {"kernel": tensors["lm_head.weight"].T}
    return _config(hf, stack), params


def _neox(hf: dict, tensors: dict) -> tuple[VanillaConfig, dict]:
    heads, rope = hf["num_attention_heads"], hf["rope_parameters"]
    stack = StackConfig.neox(
        hf["num_hidden_layers"],
        hf["hidden_size"],
        heads,
        mlp_width=hf["intermediate_size"],
        norm_epsilon=hf["layer_norm_eps"],
        rotary_base=rope["rope_theta"],
        rotary_fraction=float(rope["partial_rotary_factor"]),
        residual="parallel" if hf["use_parallel_residual"] else "sequential",
        biases="all" if hf["attention_bias"] else "mlp",
    )

    def layer(i: int) -> dict:
        def linear(name: str) -> dict:
            prefix = f"gpt_neox.layers.{i}.{name}"
            found = {"kernel": tensors[f"{prefix}.weight"].T}
            if f"{prefix}.bias" in tensors:
                found["bias"] = tensors[f"{prefix}.bias"]
            return found

        def norm(name: str) -> dict:
            found = linear(name)
            return {"scale": found["kernel"], "bias": found["bias"]}

        qkv, out = linear("attention.query_key_value"), linear("attention.dense")
        size = stack.head_size
        qkv = {
            name: np.swapaxes(x.reshape(*x.shape[:-1], heads, 3, size), -3, -2)
            for name, x in qkv.items()
        }
        out["kernel"] = out["kernel"].reshape(heads, size, -1)
        return {
            "attention": {"qkv": qkv, "out": out},
            "mlp": {"up": linear("mlp.dense_h_to_4h"), "down": linear("mlp.dense_4h_to_h")},
            "attention_norm": norm("input_layernorm"),
            "mlp_norm": norm("post_attention_layernorm"),
        }

    layers = [layer(i) for i in range(stack.layers)]
    params = _params(layers, tensors["gpt_neox.embed_in.weight"])
    scale, bias = (tensors[f"gpt_neox.final_layer_norm.{name}"] for name in ("weight", "bias"))
    params["decoder"]["stack"]["final_norm"] = {"scale": scale, "bias": bias}
    params["classifier"] = {"kernel": tensors["embed_out.weight"].T}
    return _config(hf, stack), params


def _params(layers: list[dict], table: np.ndarray) -> dict:
    stack = {f"layers_{i}": layer for i, layer in enumerate(layers)}
    return {"embed": {"embedding": table}, "decoder": {"stack": stack}}
