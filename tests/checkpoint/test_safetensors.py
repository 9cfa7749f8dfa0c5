"""Runs as one safetensors file: nothing is lost, and the folder is as good as a run."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import blocktx
from blocktx.checkpoint.params import load_params, load_tokenizer, save_params
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


def header(file):
    """Return the metadata that are written in a safetensors file."""
    with safe_open(file, "np") as opened:
        return opened.metadata()


def test_what_cannot_be_read(convert, capsys, exported, tmp_path):
    _, output, _, params = exported
    broken = shutil.copytree(output, tmp_path / "broken")
    weights = broken / "model.safetensors"

    def message(metadata, tensors=None):
        save_file(tensors or {"x": np.zeros(1)}, weights, metadata)
        with pytest.raises(ValueError, match=r"^/.*broken") as caught:
            load_params(broken)
        return str(caught.value)

    ours = header(output / "model.safetensors")
    inner = json.loads(ours["metadata"])

    def changed(**fields):
        return ours | {"metadata": json.dumps(inner | fields)}

    assert "model.safetensors: not written by blocktx" in message({"format": "pt"})
    newer = message(changed(format_version=3, blocktx_version="9.0"))
    assert "format_version is 3, and this blocktx reads up to 2; install blocktx 9.0" in newer
    assert "lack 'format_version'" in message({"format": "blocktx"})
    old = {"format": "blocktx", "format_version": "x", "step": "3"}
    assert "model.safetensors: its metadata are damaged: invalid literal" in message(old)
    assert "model.safetensors: its metadata" in message(ours | {"metadata": "[" * 200_000})
    assert "digest differs" in message(changed(step=4))
    unfit = message(ours).splitlines()
    assert "  x: checkpoint (1,), configuration lacks it" in unfit
    assert len(unfit) == len(jax.tree.leaves(params)) + 2
    tensors = load_file(output / "model.safetensors")
    integers = {name: x.astype(np.int32) for name, x in tensors.items()}
    assert "must be floating point, got block_decoder" in message(ours, integers)
    name = "embedder/tokens/embedding"
    wrong = tensors[name].copy()
    wrong.reshape(-1)[5] = np.nan
    with_nan = tensors | {name: wrong}
    assert f"not as they were written (the digest differs): {name};" in message(ours, with_nan)
    with pytest.raises(ValueError, match=f"NaN or infinity in {name};"):
        load_params(broken, verify=False)
    assert load_params(broken, verify=False, allow_nonfinite=True).step == 3
    weights.write_bytes((output / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_params(broken)
    shutil.copy(output / "model.safetensors", weights)
    with pytest.raises(SystemExit, match="1"):
        convert("to-safetensors", f"--checkpoint={output}", f"--output={output}")
    assert "export: exists already" in capsys.readouterr().err


def test_a_config_that_is_not_what_was_written(exported, tmp_path):
    broken = shutil.copytree(exported[1], tmp_path / "broken")
    file = broken / "config.json"
    text = file.read_text()

    def message(content):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"^/.*broken") as caught:
            load_params(broken)
        return str(caught.value)

    whole = json.loads(text)
    assert "config.json: config.model.kind: got 'vanila'" in message(
        '{"model": {"kind": "vanila"}}'
    )
    for section, field in [("model", "prefix_length"), ("data", "end_token")]:
        less = {name: x for name, x in whole[section].items() if name != field}
        refused = message(json.dumps(whole | {section: less}))
        assert f"config.json: config.{section}.{field}: missing; the file is incomplete" in refused
    assert "digest differs" in message(json.dumps(whole | {"seed": 8}))
    assert "config.json: not a description: nested too deeply" in message("[" * 200_000)
    assert "config.json: not JSON" in message(text[:-9])
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"config\.json: not a regular file"):
        load_params(broken)
    file.rmdir()
    platform = whole | {"model": whole["model"] | {"platform": "tpu"}}
    file.write_text(json.dumps(platform))  # an execution choice is not the file's
    assert load_params(broken).config.model.platform == "auto"


def test_a_tokenizer_that_is_not_the_models(exported, tmp_path):
    broken = shutil.copytree(exported[1], tmp_path / "broken")
    file = broken / "tokenizer.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole)))  # other whitespace
    assert blocktx.load(broken)
    changed = json.loads(whole)
    changed["model"]["vocab"]["zz"] = 301
    file.write_text(json.dumps(changed))
    loaded = load_params(broken)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not the tokenizer that .* was saved"):
        load_tokenizer(loaded)
    with pytest.raises(ValueError, match=r"tokenizer\.json: has 302 ids, and the model 300"):
        load_tokenizer(loaded, verify=False)


def test_a_folder_in_place_of_the_weights(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load_params(tmp_path)
