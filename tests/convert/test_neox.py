"""GPT-NeoX and Pythia: there and back, every layout of files and configurations, and bad ones."""

import dataclasses
import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blocktx.convert import load_neox, save_folder, to_neox
from tests.helpers import golden

HEADS = "decoder.heads: cannot be told"


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden case as the hub would have it, to be spoiled."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(golden.path("vanilla_wide_ffn"), copy)
    config = json.loads((copy / "config.json").read_text())["config"]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def bytes_of(tensors):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()}


def refusal(*args, error=ValueError):
    with pytest.raises(error) as caught:
        load_neox(*args)
    return str(caught.value)


def edit_json(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder):
    """Splits model.safetensors in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


@pytest.mark.parametrize("case", golden.VANILLA)
def test_round_trip_is_exact(case, tmp_path):
    model, params = load_neox(golden.path(case))
    tensors, config = to_neox(model, params)
    assert bytes_of(tensors) == bytes_of(load_file(golden.weights_file(case)))
    theirs = json.loads((golden.path(case) / "config.json").read_text())["config"]
    assert {name: theirs[name] for name in config.keys() & theirs.keys()} == {
        name: config[name] for name in config.keys() & theirs.keys()
    }
    save_folder(tmp_path / "out", tensors, config)
    again, params_again = load_neox(tmp_path / "out")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_short_floats_and_buffers(folder):
    file = folder / "model.safetensors"
    tensors = {name: a.astype("float16") for name, a in load_file(file).items()}
    buffers = {
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 8, 8), bool),
        "gpt_neox.layers.0.attention.masked_bias": np.array(-1e9, np.float32),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": np.ones(1, np.float32),
    }
    save_file(tensors | buffers, file)
    assert bytes_of(to_neox(*load_neox(folder), dtype="float16")[0]) == bytes_of(tensors)


def test_shards_file_and_hub_name_are_the_same_model(folder, monkeypatch):
    whole = bytes_of(to_neox(*load_neox(folder))[0])
    assert bytes_of(to_neox(*load_neox(folder / "model.safetensors"))[0]) == whole
    shard(folder)
    assert bytes_of(to_neox(*load_neox(folder))[0]) == whole
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    assert bytes_of(to_neox(*load_neox("EleutherAI/pythia-14m"))[0]) == whole


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
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "not an index of shards" in refusal(folder)


def test_shards_and_index_have_to_agree(folder):
    index = shard(folder)
    first, second = sorted(index)[:2]
    file = folder / index[first]
    tensors = load_file(file)
    extra = {name: np.zeros(3, np.float32) for name in ("more", second)}
    save_file(tensors | extra, file)
    lines = refusal(folder).splitlines()[1:]
    assert sorted(lines) == [
        f"  extra tensor {second} in {file.name}: the index has it in {index[second]}",
        f"  extra tensor more in {file.name}: the index does not have it",
    ]
    save_file(tensors, file)
    for wrong in (3, "../x", ""):
        changed = index | {second: wrong}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
        problem = f"{second}: got {wrong!r}, must be the name of a file beside it"
        assert f"  model.safetensors.index.json: {problem}" in refusal(folder)


def test_with_a_bad_shard_the_rest_is_checked(folder):
    index = shard(folder)
    names = sorted(index)
    (folder / index[names[1]]).write_bytes(b"short")
    file = folder / index[names[0]]
    tensors = load_file(file)
    lost = "gpt_neox.layers.0.attention.dense.weight"
    lost = lost if index[lost] == file.name else "gpt_neox.layers.0.attention.dense.bias"
    tensors[lost] = tensors[lost][:3]
    gone = next(name for name in tensors if name.startswith("gpt_neox.layers.1."))
    del tensors[gone]
    save_file(tensors, file)
    edit_json(folder, hidden_act="relu")
    lines = refusal(folder).splitlines()[1:]
    assert len(lines) == 4
    assert lines[0].startswith(f"  {index[names[1]]}: not a whole safetensors file")
    assert lines[1] == f"  missing tensor {gone}: the index has it in {file.name}"
    assert lines[2].startswith("  config.json: hidden_act: got 'relu'")
    assert lines[3].startswith(f"  {lost}: shape (3")


@pytest.mark.parametrize(
    "names",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 5000},
        {"rotary_pct": 0.5, "rope_theta": 5000},
        {"partial_rotary_factor": 0.5, "rope_theta": 5000.0},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000}},
    ],
)
def test_rotary_settings_by_every_name(folder, names):
    edit_json(folder, **{"rotary_pct": "absent", "rotary_emb_base": "absent"} | names)
    decoder = load_neox(folder)[0].config.decoder
    assert (decoder.rotary_fraction, decoder.rotary_base) == (0.5, 5000.0)


def test_unsupported_settings_are_listed(folder):
    edit_json(
        folder,
        use_parallel_residual=False,
        hidden_act="gelu_new",
        layer_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "yarn"},
        model_type="llama",
    )
    lines = refusal(folder).splitlines()[1:]
    assert lines == [
        "  config.json: model_type: got 'llama', only 'gpt_neox' is supported",
        "  config.json: use_parallel_residual: got False, only True is supported",
        "  config.json: hidden_act: got 'gelu_new', only 'gelu' is supported",
        "  config.json: layer_norm_eps: got 1e-06, only 1e-05 is supported",
        "  config.json: tie_word_embeddings: got True, only False is supported",
        "  config.json: rope_parameters.rope_type: got 'yarn', must be default",
    ]


def test_config_where_there_is_no_config_json(folder):
    model, params = load_neox(folder)
    (folder / "config.json").unlink()
    assert HEADS in refusal(folder)
    given = dataclasses.replace(model.config, scan_layers=False)
    same, separate = load_neox(folder, given)
    assert same.config == given
    np.testing.assert_array_equal(
        separate["decoder"]["stack"]["layers_1"]["mlp"]["up"]["kernel"],
        params["decoder"]["stack"]["layers"]["mlp"]["up"]["kernel"][1],
    )
    wider = dataclasses.replace(model.config, vocab_size=98)
    assert "vocab_size: tensors 97, configuration 98" in refusal(folder, wider)


def test_everything_that_is_wrong_with_tensors_is_listed(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["gpt_neox.final_layer_norm.bias"]
    tensors["gpt_neox.layers.0.attention.dense.weight"] = np.zeros((32, 31), np.float32)
    tensors["lm_head.weight"] = np.zeros((97, 32), np.float32)
    save_file(tensors, file)
    assert refusal(folder).splitlines()[1:] == [
        "  missing tensor gpt_neox.final_layer_norm.bias (32,)",
        "  gpt_neox.layers.0.attention.dense.weight: shape (32, 31), expected (32, 32)",
        "  extra tensor lm_head.weight (97, 32)",
    ]
    save_file({"something": np.zeros(3, np.float32)}, file)
    assert refusal(folder).splitlines()[1:] == ["  not a GPT-NeoX model (tensors something)"]


@pytest.mark.parametrize(
    ("heads", "line"), [(5, "decoder.heads: 5 does not divide width 32"), ("absent", HEADS)]
)
def test_tensors_are_checked_without_heads(folder, heads, line):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["gpt_neox.final_layer_norm.bias"]
    tensors["embed_out.weight"] = np.zeros((97, 31), np.float32)
    tensors["more"] = np.zeros(3, np.float32)
    save_file(tensors, file)
    edit_json(folder, num_attention_heads=heads)
    first, *lines = refusal(folder).splitlines()[1:]
    assert line in first
    assert lines == [
        "  embed_out.weight: shape (97, 31), expected (97, 32)",
        "  missing tensor gpt_neox.final_layer_norm.bias (32,)",
        "  extra tensor more (3,)",
    ]


def test_names_are_checked_where_sizes_cannot_be_told(folder):
    file = folder / "model.safetensors"
    tensors = {name: a for name, a in load_file(file).items() if "embed" not in name}
    save_file(tensors | {"more": np.zeros(3, np.float32)}, file)
    edit_json(folder, vocab_size="absent")
    message = refusal(folder)
    assert message.splitlines()[2:] == [
        "  missing tensor embed_out.weight",
        "  missing tensor gpt_neox.embed_in.weight",
        "  extra tensor more",
    ]
    assert "  vocab_size: cannot be told" in message


def test_layers_that_are_missing_are_a_line_each(folder):
    edit_json(folder, num_hidden_layers=5)
    lines = refusal(folder).splitlines()[1:]
    layers = load_neox(golden.path("vanilla_wide_ffn"))[0].config.decoder.layers
    assert lines == [
        f"  decoder.layers: tensors {layers}, config.json 5",
        *(f"  missing layer gpt_neox.layers.{i}, all 12 tensors of it" for i in range(layers, 5)),
    ]
    edit_json(folder, num_hidden_layers=10**12)
    lines = refusal(folder).splitlines()[1:]
    assert lines == [f"  decoder.layers: tensors {layers}, config.json {10**12}"]


def test_values_of_wrong_types_are_listed(folder):
    edit_json(
        folder,
        rope_parameters=[1],
        rotary_pct="x",
        max_position_embeddings="big",
        initializer_range=[],
    )
    assert refusal(folder).splitlines()[1:] == [
        "  config.json: rope_parameters: got [1], must be an object",
        "  config.json: rotary_pct: got 'x', must be a number",
        "  config.json: max_position_embeddings: got 'big', must be an integer",
        "  config.json: initializer_range: got [], must be a number",
    ]


def test_initializer_range_is_remembered(folder):
    edit_json(folder, initializer_range=0.5)
    model, params = load_neox(folder)
    assert model.config.initializer_range == 0.5
    assert to_neox(model, params)[1]["initializer_range"] == 0.5


def test_a_config_json_of_a_block_transformer(folder):
    shutil.copy(golden.path("cls_sum") / "config.json", folder / "config.json")
    for path in (folder, folder / "model.safetensors"):
        message = refusal(path)
        assert HEADS in message
        assert "config.json: not used: it is one of a Block Transformer" in message
