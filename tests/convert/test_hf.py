"""Models of transformers: the same logits and greedy text, and the same bytes on the way back."""

import dataclasses
import functools
import json

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blocktx.convert import load_hf, save_folder, to_hf
from blocktx.decode.generate import generate
from blocktx.model import build, for_decoding
from tests.helpers import golden, hf_models
from tests.helpers.hf_models import bytes_of

load = functools.cache(load_hf)  # each case is loaded once


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, mask):
    return model.apply({"params": params}, tokens, mask)


@pytest.mark.parametrize("case", hf_models.CASES)
def test_logits_and_greedy_text_of_transformers(case):
    model, params = load(hf_models.path(case))
    expected = hf_models.expected(case)
    tokens, mask = expected["input_ids"], expected["attention_mask"]
    logits = forward(model, params, tokens, mask)
    valid = expected["logits_valid"].astype(bool)
    np.testing.assert_allclose(
        logits[valid], expected["logits"][valid], atol=hf_models.TOLERANCE, rtol=0
    )

    # After a long prompt, the greedy text is the likeliest token at every position of itself.
    full, start = expected["genlong_generated"], expected["genlong_input_ids"].shape[1]
    padded = np.pad(full, ((0, 0), (0, tokens.shape[1] - full.shape[1])))
    real = np.broadcast_to(np.arange(tokens.shape[1]) < full.shape[1], padded.shape)
    likeliest = forward(model, params, padded, real.astype(mask.dtype)).argmax(-1)
    np.testing.assert_array_equal(likeliest[:, start - 1 : full.shape[1] - 1], full[:, start:])


@pytest.mark.parametrize(
    "case",
    [
        "llama_gqa",
        "llama31_rope",
        "smollm2_like",
        "qwen25",
        "qwen3",
        "neox_sequential",
        "neox_nobias",
    ],
)
def test_greedy_text_after_prompts_of_different_lengths(case):
    model, params = for_decoding(*load(hf_models.path(case)))
    expected = hf_models.expected(case)
    prompt, full = expected["genpad_input_ids"], expected["genpad_generated"]
    mask, count = expected["genpad_attention_mask"], full.shape[1] - prompt.shape[1]
    new = generate(model, params, prompt, mask, max_new_tokens=count, temperature=0)
    np.testing.assert_array_equal(new, full[:, prompt.shape[1] :])


@pytest.mark.parametrize("case", hf_models.CASES)
def test_there_and_back_is_the_same_bytes(case, tmp_path):
    model, params = load(hf_models.path(case))
    assert model.config.platform == "auto"
    tensors, config = to_hf(model, params)
    assert bytes_of(tensors) == bytes_of(hf_models.weights(case))
    assert config["dtype"] == hf_models.config(case)["dtype"]
    assert config["architectures"] == hf_models.config(case)["architectures"]
    save_folder(tmp_path / "out", tensors, config)
    again, params_again = load_hf(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize("case", golden.VANILLA)
def test_pythia_there_and_back(case):
    model, params = load(golden.path(case))
    tensors, config = to_hf(model, params)
    assert bytes_of(tensors) == bytes_of(load_file(golden.weights_file(case)))
    theirs = json.loads((golden.path(case) / "config.json").read_text())["config"]
    assert {k: theirs[k] for k in config.keys() & theirs.keys() if k != "pad_token_id"} == {
        k: config[k] for k in config.keys() & theirs.keys() if k != "pad_token_id"
    }


def test_for_decoding_and_dtypes_are_those_of_the_configuration():
    model, params = load(hf_models.path("llama_gqa"))
    given = dataclasses.replace(model.config, scan_layers=False, param_dtype="bfloat16")
    same, separate = load_hf(hf_models.path("llama_gqa"), given)
    assert same.config == given
    stacked = params["decoder"]["stack"]["layers"]["mlp"]["up"]["kernel"]
    kernel = separate["decoder"]["stack"]["layers_1"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, stacked[1].astype("bfloat16"))
    tensors, _ = to_hf(same, separate)
    assert tensors["model.norm.weight"].dtype == "bfloat16"
    assert to_hf(same, separate, "float32")[0]["model.norm.weight"].dtype == np.float32


# Layouts of files.


@pytest.fixture
def folder(tmp_path):
    return hf_models.copy("llama", tmp_path / "checkpoint")


def refusal(*args, error=ValueError, **kwargs):
    with pytest.raises(error) as caught:
        load_hf(*args, **kwargs)
    return str(caught.value)


def lines(*args, **kwargs):
    return refusal(*args, **kwargs).splitlines()[1:]


def shard(folder):
    """Split model.safetensors in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    write_index(folder, index)
    return index


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_half_floats_and_buffers(folder):
    def change(tensors):
        for name, array in tensors.items():
            tensors[name] = array.astype("float16")

    hf_models.edit_tensors(folder, change)
    halves = load_file(folder / "model.safetensors")
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32),
        "model.layers.1.attention.masked_bias": np.array(-1e9, np.float32),
    }
    save_file(halves | buffers, folder / "model.safetensors")
    tensors, config = to_hf(*load_hf(folder))
    assert bytes_of(tensors) == bytes_of(halves)
    assert config["torch_dtype"] == "float16"


def test_shards_file_and_hub_name_are_the_same_model(folder, monkeypatch):
    whole = bytes_of(to_hf(*load_hf(folder))[0])
    assert bytes_of(to_hf(*load_hf(folder / "model.safetensors"))[0]) == whole
    shard(folder)
    assert bytes_of(to_hf(*load_hf(folder))[0]) == whole
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    assert bytes_of(to_hf(*load_hf("HuggingFaceTB/SmolLM2-135M"))[0]) == whole


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def fail(name, **_):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refusal("EleutherAI/pythia-14m", error=FileNotFoundError)
    assert "nor reachable on the Hugging Face hub (ConnectionError: no route)" in message


def test_shards_that_are_missing_or_lack_a_tensor(folder):
    index = shard(folder)
    names = sorted(index)
    second = folder / index[names[1]]
    tensors = load_file(second)
    lost = tensors.popitem()[0]
    save_file(tensors, second)
    assert f"missing tensor {lost}: the index has it in {second.name}" in refusal(folder)
    second.unlink()
    (folder / index[names[0]]).write_bytes(b"short")
    message = refusal(folder)
    assert f"missing shard {second.name}" in message
    assert f"{index[names[0]]}: not a whole safetensors file" in message
    for content in ("[]", "{}", "[" * 200_000, '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(content)
        assert "not an index of shards" in refusal(folder)


def test_an_index_of_very_many_shards_is_a_short_error(folder):
    shard(folder)
    write_index(folder, {f"model.layers.{i}.x": f"model-{i}.safetensors" for i in range(20_000)})
    message = refusal(folder)
    assert "... 20000 missing shards in all" in message
    assert len(message) < 10_000


def test_shards_and_index_have_to_agree(folder):
    index = shard(folder)
    first, second = sorted(index)[:2]
    file = folder / index[first]
    tensors = load_file(file)
    extra = {name: np.zeros(3, np.float32) for name in ("more", second)}
    save_file(tensors | extra, file)
    assert sorted(lines(folder)) == [
        f"  extra tensor {second} in {file.name}: the index has it in {index[second]}",
        f"  extra tensor more in {file.name}: the index does not have it",
    ]
    save_file(tensors, file)
    for wrong in (3, "../x", "", "a" * 300, "a\0b"):
        write_index(folder, index | {second: wrong})
        problem = f"{second}: got {wrong!r:.100}, must be the name of a file beside it"
        assert f"  model.safetensors.index.json: {problem}" in refusal(folder)


def test_with_a_bad_shard_the_rest_is_checked(folder):
    index = shard(folder)
    names = sorted(index)
    (folder / index[names[1]]).write_bytes(b"short")
    file = folder / index[names[0]]
    tensors = load_file(file)
    wrong, gone = [name for name in tensors if name.startswith("model.layers.1.")][:2]
    tensors[wrong] = tensors[wrong][:3]
    del tensors[gone]
    save_file(tensors, file)
    hf_models.edit_config(folder, hidden_act="relu")
    first, *rest = lines(folder)
    assert first.startswith(f"  {index[names[1]]}: not a whole safetensors file")
    assert rest[0] == f"  missing tensor {gone}: the index has it in {file.name}"
    assert rest[1].startswith("  config.json: hidden_act: got 'relu'")
    assert rest[2].startswith(f"  {wrong}: shape (3")
    assert len(rest) == 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_or_a_bad_file_in_place_of_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in refusal(folder)
    (folder / name).rmdir()
    (folder / name).write_text("[" * 200_000)
    assert name in refusal(folder)


# One error with all that is wrong.


def test_everything_that_is_wrong_with_tensors_is_listed(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((64, 31), np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors[
            "model.layers.1.mlp.up_proj.weight"
        ].astype(np.int32)
        tensors["more.weight"] = np.zeros((97, 64), np.float32)
        for name in list(tensors):
            if name.startswith("model.layers.3."):
                del tensors[name]

    hf_models.edit_tensors(folder, change)
    width = hf_models.config("llama")["hidden_size"]
    assert lines(folder) == [
        "  missing layer model.layers.3, all 9 tensors of it",
        f"  missing tensor model.norm.weight ({width},)",
        "  extra tensor more.weight (97, 64)",
        f"  model.layers.0.self_attn.o_proj.weight: shape (64, 31), expected ({width}, {width})",
        "  model.layers.1.mlp.up_proj.weight: dtype I32, must be F32, BF16, F16",
    ]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_hidden_layers": 6}, "missing layer model.layers.5, all 9 tensors of it"),
        ({"num_hidden_layers": 3}, "extra tensor model.layers.3.input_layernorm.weight (64,)"),
        ({"hidden_size": 32}, "lm_head.weight: shape (97, 64), expected (97, 32)"),
        ({"vocab_size": 98}, "lm_head.weight: shape (97, 64), expected (98, 64)"),
        ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight: shape (64, 64)"),
        ({"head_dim": 8}, "model.layers.0.self_attn.q_proj.weight: shape (64, 64), expected (32"),
        ({"model_type": "qwen2"}, "missing tensor model.layers.0.self_attn.q_proj.bias (64,)"),
        ({"model_type": "qwen3"}, "missing tensor model.layers.0.self_attn.k_norm.weight (16,)"),
        ({"model_type": "gpt_neox"}, "not one with tensors gpt_neox.*"),
        ({"model_type": "mixtral"}, "model_type: got 'mixtral'; use one of llama, mistral"),
        ({"num_attention_heads": 0}, "heads"),
        ({"max_position_embeddings": -1}, "context_length"),
    ],
)
def test_a_config_json_that_says_something_else(folder, changes, part):
    hf_models.edit_config(folder, **changes)
    message = refusal(folder)
    assert part in message
    assert len(message) < 10_000


def test_tied_or_not_has_to_agree_with_the_tensors(folder, tmp_path):
    hf_models.edit_config(folder, tie_word_embeddings=True)
    assert lines(folder) == [
        "  config.json: tie_word_embeddings: got True, but lm_head.weight is not "
        "model.embed_tokens.weight"
    ]

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    hf_models.edit_tensors(folder, tie)
    model, params = load_hf(folder)  # both are there, and equal
    assert model.config.tied_classifier
    assert "classifier" not in params
    tied = hf_models.copy("llama_gqa", tmp_path / "tied")
    hf_models.edit_config(tied, tie_word_embeddings=False)
    assert lines(tied) == ["  missing tensor lm_head.weight (97, 48)"]


def test_weights_that_are_not_finite_are_refused_by_name(folder):
    def change(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][1, 2:4] = np.nan
        tensors["model.norm.weight"][0] = -np.inf

    hf_models.edit_tensors(folder, change)
    assert sorted(lines(folder)) == [
        "  model.layers.2.mlp.up_proj.weight: 2 values are NaN or infinite",
        "  model.norm.weight: 1 values are NaN or infinite",
    ]
    model, params = load_hf(folder, allow_nonfinite=True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: 1 values are NaN or infinite"):
        to_hf(model, params)
    tensors, _ = to_hf(model, params, allow_nonfinite=True)
    assert bytes_of(tensors) == bytes_of(load_file(folder / "model.safetensors"))


def test_a_configuration_in_place_of_config_json_or_beside_it(folder):
    model, params = load(hf_models.path("llama"))
    longer = dataclasses.replace(model.config, context_length=1024)
    assert load_hf(folder, longer)[0].config == longer
    wider = dataclasses.replace(
        model.config,
        vocab_size=98,
        decoder=dataclasses.replace(model.config.decoder, rotary_base=5e5),
    )
    message = refusal(folder, wider)
    assert "vocab_size: config.json 97, configuration 98" in message
    assert "decoder.rotary_base: config.json 10000.0, configuration 500000.0" in message
    (folder / "config.json").unlink()
    assert lines(folder) == [
        "  config.json: absent; give the folder that has it, or a configuration"
    ]
    same, params_again = load_hf(folder, model.config)
    assert same.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_models_of_other_kinds_are_refused(folder):
    def rename(tensors):
        for name in list(tensors):
            tensors[f"language_{name}"] = tensors.pop(name)

    hf_models.edit_tensors(folder, rename)
    assert lines(folder)[0].startswith("  not one with tensors model.* (tensors language_")
    assert "model_type: got 'gemma3_text'" in refusal(hf_models.path("gemma3"))
    model, params = load(hf_models.path("llama"))
    mixed = dataclasses.replace(
        model.config, decoder=dataclasses.replace(model.config.decoder, rotary_fraction=0.5)
    )
    with pytest.raises(ValueError, match=r"rotary_fraction: got 0.5, which llama .* it has 1.0"):
        to_hf(build(mixed), params)


def test_parameters_that_do_not_fit_are_listed():
    model, params = load(hf_models.path("llama_gqa"))
    with pytest.raises(ValueError, match="missing parameter embed/embedding"):
        to_hf(model, {"decoder": params["decoder"]})
    with pytest.raises(ValueError, match="dtype: got 'float8'"):
        to_hf(model, params, "float8")
    large = params | {"embed": {"embedding": params["embed"]["embedding"] * 1e6}}
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: up to .* too large for float16"):
        to_hf(model, large, "float16")
