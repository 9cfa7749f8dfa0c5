"""Llama-type models of unusual sizes against float64 NumPy, and back byte for byte."""

import jax
import numpy as np
import pytest

from blocktx.convert import load_hf, save_folder, to_hf
from tests.helpers.hf_models import TOLERANCE, bytes_of
from tests.helpers.numpy_llama import Llama

CONTEXT = 64
# Names of cases say what is unusual. `rope` is in the style of transformers 5, `style` 4 writes it
# in that of transformers 4.
CASES = {
    "wide-heads-linear": dict(
        model_type="llama",
        sizes=dict(hidden=36, heads=3, kv=1, size=20, layers=3, mlp=50, vocab=61),
        rope=dict(rope_type="linear", factor=2.5, rope_theta=3e4),
        tied=True,
        dtype="float16",
    ),
    "no-head-dim": dict(
        model_type="mistral",
        sizes=dict(hidden=40, heads=10, kv=5, size=4, layers=2, mlp=24, vocab=53),
        rope=dict(rope_type="default", rope_theta=1e6),
        dtype="bfloat16",
        style=4,
        changes=dict(head_dim=None, sliding_window=None),
    ),
    "seven-to-one-yarn": dict(
        model_type="qwen2",
        sizes=dict(hidden=42, heads=7, kv=1, size=6, layers=2, mlp=44, vocab=59),
        rope=dict(
            type="yarn",
            factor=2.0,
            original_max_position_embeddings=32,
            beta_fast=16.0,
            attention_factor=1.2,
            rope_theta=1e3,
        ),
        tied=True,
        dtype="float32",
        style=4,
    ),
    "three-to-one-llama3": dict(
        model_type="qwen3",
        sizes=dict(hidden=24, heads=9, kv=3, size=8, layers=2, mlp=33, vocab=67),
        rope=dict(
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.5,
            high_freq_factor=6.0,
            original_max_position_embeddings=24,
            rope_theta=1e4,
        ),
        dtype="bfloat16",
    ),
    "narrow-heads-one-layer": dict(
        model_type="llama",
        sizes=dict(hidden=50, heads=5, kv=5, size=4, layers=1, mlp=200, vocab=31),
        rope=dict(rope_type="default", rope_theta=1e4),
        dtype="float16",
        changes=dict(num_key_value_heads=None),
    ),
}


def write(folder, case, seed):
    """Write a random model; return its config in the style of transformers 5, and its tensors."""
    rng = np.random.default_rng(seed)
    n, rope, tied = CASES[case]["sizes"], CASES[case]["rope"], CASES[case].get("tied", False)
    model_type, dtype = CASES[case]["model_type"], CASES[case]["dtype"]

    def matrix(rows, columns, scale=1.0):
        return rng.normal(size=(rows, columns)) * scale / np.sqrt(columns)

    def scale(size):
        return 1 + 0.3 * rng.normal(size=size)

    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(n["vocab"], n["hidden"])),
        "model.norm.weight": scale(n["hidden"]),
    }
    if not tied:
        tensors["lm_head.weight"] = matrix(n["vocab"], n["hidden"], 3.0)
    q, kv = n["heads"] * n["size"], n["kv"] * n["size"]
    for i in range(n["layers"]):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        tensors |= {
            f"{layer}.input_layernorm.weight": scale(n["hidden"]),
            f"{layer}.post_attention_layernorm.weight": scale(n["hidden"]),
            f"{layer}.mlp.gate_proj.weight": matrix(n["mlp"], n["hidden"]),
            f"{layer}.mlp.up_proj.weight": matrix(n["mlp"], n["hidden"]),
            f"{layer}.mlp.down_proj.weight": matrix(n["hidden"], n["mlp"]),
            f"{attention}.o_proj.weight": matrix(n["hidden"], q),
        }
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{attention}.{name}_proj.weight"] = matrix(width, n["hidden"], 2.0)
            if model_type == "qwen2":
                tensors[f"{attention}.{name}_proj.bias"] = rng.normal(size=width)
            if model_type == "qwen3" and name != "v":
                tensors[f"{attention}.{name}_norm.weight"] = scale(n["size"])
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    config = dict(
        model_type=model_type,
        hidden_size=n["hidden"],
        intermediate_size=n["mlp"],
        num_hidden_layers=n["layers"],
        num_attention_heads=n["heads"],
        num_key_value_heads=n["kv"],
        head_dim=n["size"],
        vocab_size=n["vocab"],
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=rope,
    )
    written = config | CASES[case].get("changes", {})
    if CASES[case].get("style") == 4:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        plain = scaling == {"rope_type": "default"}
        written |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
        del written["rope_parameters"]
    save_folder(folder, tensors, written)
    return config, tensors


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_numpy_and_bytes_come_back(case, seed, tmp_path):
    config, tensors = write(tmp_path / "there", case, seed)
    model, params = load_hf(tmp_path / "there")
    tokens = np.random.default_rng(seed).integers(0, config["vocab_size"], (2, CONTEXT))
    mask = np.arange(CONTEXT) >= [[0], [11]]  # the second row is padded in front
    got = jax.jit(lambda params: model.apply({"params": params}, tokens, mask))(params)
    reference = Llama(config, tensors)
    for row, begin in ((0, 0), (1, 11)):
        expected = reference.logits(tokens[row, begin:])
        assert expected.std() > 1
        np.testing.assert_allclose(got[row, begin:], expected, atol=TOLERANCE, rtol=0)
    if seed == 0:
        back, written = to_hf(model, params)
        assert bytes_of(back) == bytes_of(tensors)
        save_folder(tmp_path / "back", back, written)
        assert load_hf(tmp_path / "back")[0].config == model.config
