"""config.json of transformers 4 and 5: both mean the same, and what is unsupported is named."""

import json

import pytest

from blocktx.convert import hf_config
from tests.helpers import hf_models


def read(config):
    described, problems = hf_config.read(config)
    assert problems == []
    return described


def problems(case, **changes):
    config = hf_models.config(case) | changes
    return hf_config.read({k: v for k, v in config.items() if v != "absent"})[1]


@pytest.mark.parametrize("case", hf_models.CASES)
def test_both_styles_are_the_same_model(case):
    config = read(hf_models.config(case))
    assert read(hf_models.config(case, "config_v4.json")) == config
    mixed = hf_models.config(case) | hf_models.config(case, "config_v4.json")
    assert read(mixed) == config


@pytest.mark.parametrize("case", hf_models.CASES)
def test_what_is_written_is_read_as_the_same_model_by_every_style(case):
    config = read(hf_models.config(case))
    written = json.loads(json.dumps(hf_config.write(config, "float32")))
    assert read(written) == config
    for other in ("rope_parameters", "rope_scaling", "rope_theta"):
        names = {"rope_scaling", "rope_theta"} if other == "rope_parameters" else {other}
        assert read({k: v for k, v in written.items() if k not in names}) == config
    theirs = hf_models.config(case) | hf_models.config(case, "config_v4.json")
    ignored = {"bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"}
    for name in written.keys() & theirs.keys() - ignored - {"rope_parameters", "rope_scaling"}:
        assert written[name] == theirs[name], name


def test_old_and_legacy_names():
    config = hf_models.config("llama_linear_rope", "config_v4.json")
    linear = read(config)
    assert linear.decoder.rotary_scaling.kind == "linear"
    assert linear.decoder.rotary_scaling.factor == 4.0
    assert read(config | {"rope_scaling": {"type": "linear", "factor": 4.0}}) == linear
    both = {"type": "linear", "rope_type": "linear", "factor": 4}
    assert read(config | {"rope_scaling": both}) == linear
    five = {"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    assert read({k: v for k, v in config.items() if not k.startswith("rope")} | five) == linear


def test_absent_fields_mean_what_the_class_means():
    config = hf_models.config("llama", "config_v4.json")
    same = read(config)
    for name in ("num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "rope_theta"):
        assert read({k: v for k, v in config.items() if k != name}) == same
    assert read(config | {"head_dim": None, "num_key_value_heads": None}) == same
    assert not read(config | {"tie_word_embeddings": None}).tied_classifier
    first_llama = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    assert hf_config.read(first_llama)[1] == [
        "config.json: rope_theta: absent, and so are rope_scaling and rope_parameters; add the "
        "base that the model was trained with (10000.0 for the first Llama)"
    ]
    assert problems("qwen3", head_dim="absent") == []
    assert (
        hf_config.read({k: v for k, v in hf_models.config("qwen3").items() if k != "head_dim"})[
            0
        ].decoder.head_size
        == 128
    )


def test_mistral_is_read_unless_it_has_a_window():
    mistral = hf_models.config("llama_gqa") | {"model_type": "mistral", "sliding_window": None}
    assert read(mistral) == read(hf_models.config("llama_gqa"))
    assert read(mistral | {"sliding_window": 256}) == read(mistral)  # as long as the context
    (line,) = hf_config.read(mistral | {"sliding_window": 64})[1]
    assert line == (
        "config.json: sliding_window: got 64; sliding windows are not supported, only null"
    )
    long = mistral | {"max_position_embeddings": 32768}
    (line,) = hf_config.read({k: v for k, v in long.items() if k != "sliding_window"})[1]
    assert "sliding_window: got 4096" in line  # the default of the class


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}


@pytest.mark.parametrize(
    ("case", "changes", "line"),
    [
        ("llama", {"model_type": "gemma3_text"}, "model_type: got 'gemma3_text'; use one of llama"),
        ("llama", {"model_type": None}, "model_type: got None; use one of llama, mistral, qwen2"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            "quantization_config: got {'bits': 4}, o",
        ),
        ("llama", {"num_local_experts": 8}, "num_local_experts: got 8, only 0 is supported"),
        ("llama", {"vision_config": {}}, "vision_config: got {}, only its absence is supported"),
        ("llama", {"attention_bias": True}, "attention_bias: got True, only False is supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias: got True, only False is supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: got 'gelu', only 'silu' or 'swish' is"),
        ("llama", {"hidden_size": "absent"}, "hidden_size: absent"),
        ("llama", {"hidden_size": 64.5}, "hidden_size: got 64.5, must be an integer"),
        ("llama", {"vocab_size": 10**30}, f"vocab_size: got {10**30}, must be less than"),
        (
            "llama",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers: got 1000000000, more than 1000",
        ),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps: got inf, must be a number"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings: got 1, must be true or false"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters: got [1], must be an object"),
        (
            "llama",
            {"rope_theta": 5e5},
            "rope_parameters.rope_theta 10000.0, rope_theta 500000.0: d",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, only 1.0 is"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
            "rope_scaling.type: got 'dynamic'; supported are default, linear, llama3, yarn",
        ),
        (
            "llama",
            {"rope_parameters": {"factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.rope_type: absent, but there is a factor",
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3},
            "rope_parameters.low_freq_factor: absent, needed for",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "mscale": 0.7}},
            "rope_parameters.mscale: got 0.7, is not supported",
        ),
        (
            "llama31_rope",
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "rope_parameters.rope_type llama3, rope_scaling.rope_type linear: differ",
        ),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window: got True, only False is"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: got sliding_attention; only full_attention is supported",
        ),
        ("neox_nobias", {"hidden_act": "gelu_new"}, "hidden_act: got 'gelu_new', only 'gelu' is"),
        (
            "neox_nobias",
            {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.type: got 'linear'; supported are default",
        ),
    ],
)
def test_unsupported_and_impossible_fields_are_named(case, changes, line):
    found = problems(case, **changes)
    assert any(problem.startswith(f"config.json: {line}") for problem in found), found


def test_all_problems_are_listed():
    found = problems("llama", mlp_bias=True, hidden_act="relu", num_experts=4, head_dim="x")
    assert [line.split(":")[1] for line in found] == [
        " num_experts",
        " hidden_act",
        " mlp_bias",
        " head_dim",
    ]
