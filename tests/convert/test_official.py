"""The authors' checkpoints: there and back, and where the architecture comes from."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blocktx.config import BlockConfig, EmbedderConfig, StackConfig
from blocktx.convert import load_official, save_folder, to_official
from blocktx.model.build import build
from tests.helpers import golden
from tests.helpers.random_weights import random_params
from tests.helpers.spoiled import UNUSED, bytes_of, copy_of_golden, edit, refusal


@pytest.fixture
def folder(tmp_path):
    return copy_of_golden(tmp_path)


@pytest.mark.parametrize("case", golden.BLOCK + golden.UPTRAINED)
def test_round_trip_is_exact(case, tmp_path):
    model, params = load_official(golden.path(case))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    tensors, config = to_official(model, params)
    theirs = load_file(golden.weights_file(case))
    assert tensors.keys() == theirs.keys()
    assert tensors[UNUSED].shape == theirs[UNUSED].shape
    assert bytes_of(tensors) == bytes_of(theirs)
    save_folder(tmp_path / "out", tensors, config)
    again, params_again = load_official(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_round_trip_of_short_floats_is_exact(folder, dtype):
    def shorten(tensors):
        for name, array in tensors.items():
            tensors[name] = array.astype(dtype)

    edit(folder, shorten)
    model, params = load_official(folder)
    tensors, _ = to_official(model, params, dtype=dtype)
    assert bytes_of(tensors) == bytes_of(load_file(folder / "model.safetensors"))


def test_official_yaml_describes_the_model_as_the_authors_do():
    for case in golden.BLOCK:
        ours = to_official(*load_official(golden.path(case)))[1]
        theirs = json.loads((golden.path(case) / "config.json").read_text())
        for name in ("block_decoder", "token_decoder"):
            for field, value in theirs["official_yaml"][name]["config"].items():
                assert ours["official_yaml"][name]["config"][field] == value
        for field in ("cls", "n_embedding_tokens", "projection_method", "n_cls_tokens"):
            resolved = {**theirs["embedder"], "n_embedding_tokens": 1}[field]
            assert ours["official_yaml"]["embedder"][field] == resolved


def test_config_instead_of_config_json(folder):
    expected, params = load_official(folder)
    (folder / "config.json").unlink()
    given = dataclasses.replace(expected.config, scan_layers=False, context_length=64, remat="full")
    model, separate = load_official(folder / "model.safetensors", given)
    assert model.config == given
    first = separate["block_decoder"]["stack"]["layers_0"]["mlp"]["up"]["kernel"]
    stacked = params["block_decoder"]["stack"]["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(first, stacked[0])


def test_config_and_config_json_may_both_be_there_and_have_to_agree(folder):
    model, _ = load_official(folder)
    assert load_official(folder, model.config)[0] == model
    other = dataclasses.replace(
        model.config,
        bos_id=5,
        block_decoder=dataclasses.replace(model.config.block_decoder, heads=8, layers=2),
    )
    message = refusal(folder, other)
    assert "block_decoder.heads: config.json 4, configuration 8" in message
    assert "block_decoder.layers: config.json 3, configuration 2" in message
    assert "bos_id: config.json 0, configuration 5" in message


def test_without_config_json_a_configuration_is_needed(tmp_path):
    stack = StackConfig(layers=1, width=128, heads=4)
    config = BlockConfig(
        vocab_size=97, context_length=2048, block_decoder=stack, token_decoder=stack
    )
    model = build(config)
    tensors = to_official(model, random_params(model))[0]
    file = tmp_path / "x.safetensors"
    save_file(tensors | {"token_decoder.x": np.zeros(3, np.float32)}, file)
    assert refusal(tmp_path).splitlines()[1:] == [
        "  config.json: absent; give the folder that has it, or a configuration"
    ]
    assert refusal(tmp_path, config).splitlines()[1:] == ["  extra tensor token_decoder.x (3,)"]
    save_file(tensors, file)
    assert load_official(tmp_path, config)[0].config == config
    longer = dataclasses.replace(config, prefix_length=4)
    assert "token_decoder.expansion_layer.bias: shape (256,)" in refusal(tmp_path, longer)


@pytest.mark.parametrize("change", ["sequential", "mlp"])
def test_other_gpt_neox_stacks_there_and_back(change, tmp_path):
    field = "biases" if change == "mlp" else "residual"
    stack = StackConfig(layers=1, width=32, heads=4, **{field: change})
    config = BlockConfig(
        vocab_size=97,
        context_length=64,
        block_decoder=stack,
        token_decoder=stack,
        embedder=EmbedderConfig(kind="projection"),
    )
    model = build(config)
    params = random_params(model)
    save_folder(tmp_path / "out", *to_official(model, params))
    again, params_again = load_official(tmp_path / "out")
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
