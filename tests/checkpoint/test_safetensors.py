"""Runs as one safetensors file: nothing is lost, and the folder is as good as a run."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import blocktx
from blocktx.checkpoint.params import load_params, save_params
from blocktx.config.model import BlockConfig, EmbedderConfig, StackConfig
from blocktx.config.run import RunConfig
from blocktx.data.tokenizer import Tokenizer
from blocktx.model.build import build
from tests.helpers.random_weights import random_params

STACK = StackConfig(layers=1, width=8, heads=1)


def a_run(folder, *, tokenizer=None, **fields):
    model = BlockConfig(
        vocab_size=300, context_length=16, block_decoder=STACK, token_decoder=STACK, **fields
    )
    config, params = RunConfig(model=model, seed=7), random_params(build(model))
    save_params(folder, config, params, step=3, tokenizer=tokenizer)
    return config, params


@pytest.fixture(scope="module")
def exported(convert, tmp_path_factory):
    """A run in bfloat16 with a tokenizer, and its export."""
    folder = tmp_path_factory.mktemp("exported")
    Tokenizer.train(["a b"], 300, "<|endoftext|>", "<|padding|>").save(folder / "tokenizer.json")
    run, output = folder / "run", folder / "export"
    config, params = a_run(
        run,
        tokenizer=folder / "tokenizer.json",
        param_dtype="bfloat16",
        embedder=EmbedderConfig(kind="projection"),
    )
    convert("to-safetensors", f"--checkpoint={run}", f"--output={output}")
    return run, output, config, params


def assert_same_bytes(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_round_trip_is_bit_for_bit(exported):
    run, output, config, params = exported
    loaded = load_params(output)
    assert_same_bytes(loaded.params, params)
    assert (loaded.config, loaded.step) == (config, 3)
    assert jax.tree.leaves(loaded.params)[0].dtype == ml_dtypes.bfloat16
    for name in ("config.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (run / name).read_bytes()
    assert {child.name for child in output.parent.iterdir()} == {"run", "export", "tokenizer.json"}


def test_float32_round_trip_without_tokenizer(convert, tmp_path):
    _, params = a_run(tmp_path / "run")
    convert("to-safetensors", f"--checkpoint={tmp_path}/run", f"--output={tmp_path}/export")
    assert_same_bytes(blocktx.load_params(tmp_path / "export").params, params)
    assert not (tmp_path / "export" / "tokenizer.json").exists()
    with pytest.raises(FileNotFoundError, match=r"export/tokenizer\.json: not found"):
        blocktx.load(tmp_path / "export")


def test_the_file_is_what_the_table_in_the_readme_says(exported):
    _, output, config, params = exported
    tensors = load_file(output / "model.safetensors")
    table = params["embedder"]["tokens"]["embedding"]
    assert tensors["embedder/tokens/embedding"].tobytes() == np.asarray(table).tobytes()
    assert len(tensors) == len(jax.tree.leaves(params))
    described = json.loads((output / "config.json").read_text())
    assert described["model"]["block_length"] == config.model.block_length


def test_an_export_is_as_good_as_a_run(convert, exported, tmp_path):
    run, output, config, params = exported
    assert blocktx.load(output).tokenizer.end_id == blocktx.load(run).tokenizer.end_id
    again = tmp_path / "again"
    convert("to-safetensors", f"--checkpoint={output}", f"--output={again}")
    assert_same_bytes(load_params(again).params, params)
    convert("lengthen", f"--from={output}", f"--output={tmp_path}/longer")
    longer = load_params(tmp_path / "longer").config.model
    assert longer.block_length == 2 * config.model.block_length


def test_what_cannot_be_read(convert, capsys, exported, tmp_path):
    _, output, _, params = exported
    broken = shutil.copytree(output, tmp_path / "broken")
    weights = broken / "model.safetensors"

    def message(**written):
        tensors, metadata = written.get("tensors", {"x": np.zeros(1)}), written["metadata"]
        save_file(tensors, weights, metadata)
        with pytest.raises(ValueError, match=r"^/.*broken") as caught:
            load_params(broken)
        return str(caught.value)

    ours = {"format": "blocktx", "format_version": "1", "blocktx_version": "9.0", "step": "3"}
    assert "model.safetensors: not written by blocktx" in message(metadata={"format": "pt"})
    newer = message(metadata=ours | {"format_version": "2"})
    assert "format_version is 2, and this blocktx reads up to 1; install blocktx 9.0" in newer
    unfit = message(metadata=ours).splitlines()
    assert "  x: checkpoint (1,), configuration lacks it" in unfit
    assert len(unfit) == len(jax.tree.leaves(params)) + 2
    weights.write_bytes((output / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_params(broken)
    (broken / "config.json").write_text('{"model": {"kind": "vanila"}}')
    shutil.copy(output / "model.safetensors", weights)
    with pytest.raises(ValueError, match=r"config\.json: config\.model\.kind: got 'vanila'"):
        load_params(broken)
    with pytest.raises(SystemExit, match="1"):
        convert("to-safetensors", f"--checkpoint={output}", f"--output={output}")
    assert "export: exists already" in capsys.readouterr().err
