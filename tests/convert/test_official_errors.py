"""The authors' checkpoints, spoiled in every way: all that is wrong is listed."""

import dataclasses
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from blocktx.config.model import BlockConfig, EmbedderConfig, StackConfig
from blocktx.convert import (
    load_neox,
    load_official,
    mapping,
    official,
    save_folder,
    to_neox,
    to_official,
)
from blocktx.model.build import build
from tests.helpers import golden
from tests.helpers.spoiled import UNUSED, bytes_of, copy_of_golden, edit, edit_json, refusal


@pytest.fixture
def folder(tmp_path):
    return copy_of_golden(tmp_path)


def test_config_json_is_absent_or_of_another_model(folder):
    (folder / "config.json").unlink()
    absent = "config.json: absent; give the folder that has it, or a configuration"
    assert absent in refusal(folder)
    (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
    assert "not one of a Block Transformer" in refusal(folder)
    assert absent in refusal(folder / "model.safetensors")


def test_stray_tensors_of_far_layers_make_no_layers(folder):
    def spoil(tensors):
        for i in (5, 999_999_999):
            name = f"block_decoder.gpt_neox.layers.{i}.attention.dense.bias"
            tensors[name] = np.zeros(64, np.float32)

    edit(folder, spoil)
    assert refusal(folder).splitlines()[1:] == [
        f"  extra tensor block_decoder.gpt_neox.layers.{i}.attention.dense.bias (64,)"
        for i in (5, 999_999_999)
    ]


def test_impossible_stacks_are_all_named(folder):
    def change(config):
        for name in ("embedder", "block_decoder", "token_decoder"):
            config[name]["config"]["num_attention_heads"] = 5

    edit_json(folder, change)
    message = refusal(folder)
    for line in (
        "block_decoder.config.heads: 5 does not divide width 64",
        "token_decoder.config.heads: 5 does not divide width 64",
        "embedder.config.heads: 5 does not divide width 24",
    ):
        assert f"  config.json: {line}" in message
    assert len(message.splitlines()) == 4


def test_everything_that_is_wrong_with_tensors_is_listed(folder):
    def spoil(tensors):
        del tensors["block_decoder.gpt_neox.layers.2.mlp.dense_h_to_4h.weight"]
        del tensors["embedder.encoder.layer.1.attention.self.key.bias"]
        for name in list(tensors):
            if name.startswith("token_decoder.gpt_neox.layers.1."):
                del tensors[name]
        tensors["token_decoder.something"] = np.zeros((3, 4), np.float32)
        tensors["token_decoder.embed_out.weight"] = np.zeros((96, 64), np.float32)
        tensors["embedder.projection_layer.bias"] = np.zeros(64, np.int64)
        tensors[UNUSED] = np.zeros((7, 7), np.float32)

    edit(folder, spoil)
    message = refusal(folder)
    for line in (
        "missing tensor block_decoder.gpt_neox.layers.2.mlp.dense_h_to_4h.weight (256, 64)",
        "missing tensor embedder.encoder.layer.1.attention.self.key.bias (24,)",
        "missing layer token_decoder.gpt_neox.layers.1, all 12 tensors of it",
        "extra tensor token_decoder.something (3, 4)",
        "token_decoder.embed_out.weight: shape (96, 64), expected (97, 64)",
        "embedder.projection_layer.bias: dtype I64, must be F32, BF16, F16",
        f"{UNUSED}: shape (7, 7), expected (97, 64)",
    ):
        assert f"  {line}\n" in message + "\n"
    assert len(message.splitlines()) == 8


def test_unused_tensor_and_buffers_may_be_there_or_not(folder):
    def change(tensors):
        del tensors[UNUSED]
        for name in ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"):
            tensors[f"token_decoder.gpt_neox.layers.0.{name}"] = np.ones(3, np.float32)
        tensors["embedder.embeddings.position_ids"] = np.arange(20)[None]

    before = to_official(*load_official(folder))[0]
    edit(folder, change)
    assert bytes_of(to_official(*load_official(folder))[0]) == bytes_of(before)


def test_unsupported_settings_are_listed(folder):
    def change(config):
        config["n_embedding_tokens"] = 2
        config["block_decoder"]["config"]["tie_word_embeddings"] = True
        config["token_decoder"]["config"]["hidden_act"] = "relu"
        config["token_decoder"]["decoding_strategy"] = "cross_attention"
        config["embedder"]["config"]["position_embedding_type"] = "relative_key"
        config["block_length"] = "four"

    edit_json(folder, change)
    message = refusal(folder)
    for part in (
        "n_embedding_tokens: got 2",
        "block_decoder.config.tie_word_embeddings: got True, only False",
        "token_decoder.config.hidden_act: got 'relu', only 'gelu'",
        "token_decoder.decoding_strategy: got 'cross_attention'",
        "embedder.config.position_embedding_type: got 'relative_key'",
        "block_length: got 'four', must be an integer",
    ):
        assert part in message


def test_config_json_has_to_agree_with_tensors_and_itself(folder, tmp_path):
    def change(config):
        config["embedder"]["projection_hidden_size"] = 65
        config["embedder"]["config"]["vocab_size"] = 98
        config["block_decoder"]["config"]["vocab_size"] = 99
        config["block_decoder"]["config"]["rope_parameters"] = {"partial_rotary_factor": 0.5}
        config["token_decoder"]["config"]["rope_theta"] = 5000

    edit_json(folder, change)
    message = refusal(folder)
    for line in (
        "embedder.projection_hidden_size: got 65, but block_decoder has 64",
        "embedder.config.vocab_size 98, block_decoder.config.vocab_size 99, "
        "token_decoder.config.vocab_size 97: differ",
        "block_decoder.config.rope_parameters.partial_rotary_factor 0.5, rotary_pct 0.25: differ",
        "token_decoder.config.rope_theta 5000.0, rotary_emb_base 10000.0: differ",
    ):
        assert f"  config.json: {line}\n" in message
    lookup = tmp_path / "lookup"
    shutil.copytree(golden.path("lookup_prefix1"), lookup)
    edit_json(lookup, lambda config: config["embedder"]["config"].update(hidden_size=17))
    assert "embedder.config.hidden_size: got 17; 4 of it must be" in refusal(lookup)


def test_values_of_wrong_types_are_listed(folder):
    def change(config):
        config["embedder"]["config"] = [1]
        config["embedder"]["projection_hidden_size"] = "wide"
        config["block_decoder"]["config"] |= {"rope_parameters": [1], "rotary_pct": "x"}
        config["block_decoder"]["config"] |= {"max_position_embeddings": "big"}
        config["token_decoder"]["config"]["bos_token_id"] = "first"

    edit_json(folder, change)
    message = refusal(folder)
    for line in (
        "embedder.config: got [1], must be an object",
        "embedder.projection_hidden_size: got 'wide', must be an integer",
        "block_decoder.config.rope_parameters: got [1], must be an object",
        "block_decoder.config.rotary_pct: got 'x', must be a number",
        "block_decoder.config.max_position_embeddings: got 'big', must be an integer",
        "token_decoder.config.bos_token_id: got 'first', must be an integer",
    ):
        assert f"  config.json: {line}\n" in message + "\n"


def test_files_that_are_not_safetensors(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "model.safetensors: not a whole safetensors file" in refusal(folder)
    file.write_bytes(b"PK\x03\x04 and so on, as PyTorch writes it")
    (folder / "config.json").write_text("{")
    message = refusal(folder)
    assert "not a whole safetensors file" in message
    assert "config.json: not readable" in message
    file.rename(folder / "pytorch_model.bin")
    assert "save PyTorch files as safetensors first" in refusal(folder, error=FileNotFoundError)
    assert "no such file or folder" in refusal(folder / "none", error=FileNotFoundError)


def test_other_models_are_refused(tmp_path):
    assert "T5" in refusal(golden.path("cross_attention"))
    names = [f"bert.{i}" for i in range(12)]
    save_file(dict.fromkeys(names, np.zeros(3, np.float32)), tmp_path / "bert.safetensors")
    assert refusal(tmp_path).splitlines()[1:] == [
        "  not a Block Transformer (tensors bert.0, bert.1, bert.10, ... 12 in all)"
    ]
    assert "vanilla GPT-NeoX model" in refusal(golden.path("vanilla"))
    assert "Block Transformer" in refusal(golden.path("cls_sum"), load=load_neox)
    model, params = load_official(golden.path("lookup_prefix1"))
    with pytest.raises(ValueError, match=r"blocktx\.convert\.to_official"):
        to_neox(model, params)
    with pytest.raises(ValueError, match="use to_hf"):
        to_official(*load_neox(golden.path("vanilla")))


def test_models_that_the_authors_do_not_have_are_refused(folder):
    stack = StackConfig(layers=1, width=32, heads=4)
    config = BlockConfig(
        vocab_size=97,
        context_length=64,
        block_decoder=stack,
        token_decoder=stack,
        embeddings_per_block=2,
        embedder=EmbedderConfig(kind="projection"),
        conditioning="cross_attention",
    )
    with pytest.raises(ValueError, match=r"(?s)cross_attention.*embeddings_per_block: got 2"):
        to_official(build(config), {})
    given = dataclasses.replace(
        load_official(golden.path("lookup_prefix1"))[0].config,
        embeddings_per_block=2,
        conditioning="cross_attention",
    )
    message = refusal(golden.path("lookup_prefix1"), given)
    assert "conditioning: cross_attention is T5's" in message
    assert "embeddings_per_block: got 2" in message
    (folder / "config.json").unlink()
    given = dataclasses.replace(load_official(golden.path("cls_sum"))[0].config)
    for change in ({"embeddings_per_block": 2}, {"conditioning": "cross_attention"}):
        lines = refusal(folder, dataclasses.replace(given, **change)).splitlines()[1:]
        assert len(lines) == 1
        assert lines[0].startswith(f"  {next(iter(change))}: ")


def test_a_wrong_table_is_a_bug_and_no_model(monkeypatch):
    monkeypatch.setattr(official, "_embedder_table", lambda config: [])
    monkeypatch.setattr(mapping, "check_tensors", lambda *_: [])
    with pytest.raises(AssertionError, match="missing parameter embedder/tokens/embedding"):
        load_official(golden.path("lookup_prefix1"))


def test_values_that_are_too_large_for_the_dtype_are_listed():
    model, params = load_official(golden.path("lookup_prefix1"))
    params["embedder"]["tokens"]["embedding"][3, 4] = 1e6
    params["token_decoder"]["classifier"]["kernel"][0, 0] = -70_000
    params["token_decoder"]["classifier"]["kernel"][0, 1] = np.inf
    with pytest.raises(ValueError, match="cannot be converted") as caught:
        to_official(model, params, dtype="float16")
    assert str(caught.value).splitlines()[1:] == [
        "  embedder.embeddings.weight: up to 1e+06, too large for float16",
        "  token_decoder.embed_out.weight: up to 7e+04, too large for float16",
    ]
    with pytest.raises(ValueError, match=r"embed_out\.weight: 1 values are NaN or infinite"):
        to_official(model, params, dtype="bfloat16")
    to_official(model, params, dtype="bfloat16", allow_nonfinite=True)


def test_parameters_that_do_not_fit_are_listed():
    model, params = load_official(golden.path("lookup_prefix1"))
    del params["token_decoder"]["classifier"]
    params["embedder"]["tokens"]["embedding"] = np.zeros((3, 3), np.float32)
    params["more"] = np.zeros(3)
    with pytest.raises(ValueError, match="cannot be converted") as caught:
        to_official(model, params)
    assert str(caught.value).splitlines()[1:] == [
        "  missing parameter token_decoder/classifier/kernel (64, 97)",
        "  extra parameter more (3,)",
        "  embedder/tokens/embedding: shape (3, 3), expected (97, 16)",
    ]
    with pytest.raises(ValueError, match="dtype: got 'float8'"):
        to_official(*load_official(golden.path("lookup_prefix1")), dtype="float8")


def test_an_output_folder_is_new_and_whole(tmp_path, monkeypatch):
    tensors, config = to_official(*load_official(golden.path("lookup_prefix1")))
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there"):
        save_folder(tmp_path / "there", tensors, config)
    with pytest.raises(TypeError):
        save_folder(tmp_path / "new", tensors, {"not": {"JSON"}})
    assert [child.name for child in tmp_path.iterdir()] == ["there"]
