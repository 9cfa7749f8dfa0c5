"""launch/convert.py, and checkpoints that hold nothing but parameters."""

import json
import shlex
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import blocktx
from blocktx.checkpoint.params import load_params, save_params
from blocktx.config import RunConfig, StackConfig, VanillaConfig
from blocktx.convert import load_official, save_folder, to_hf
from blocktx.data.tokenizer import Tokenizer
from blocktx.model import build
from tests.helpers import golden, hf_models, tokenizers
from tests.helpers.random_weights import random_params


def error(convert, capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        convert(*argv)
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    return printed


@pytest.mark.parametrize(("name", "case"), [("official", "cls_sum"), ("neox", "vanilla")])
def test_there_and_back(convert, capsys, tmp_path, name, case):
    run, back = tmp_path / "run", tmp_path / "back"
    convert(name, f"--checkpoint={golden.path(case)}", f"--output={run}")
    kind = "block" if name == "official" else "vanilla"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{kind} model, 0.")
    assert f": {run}\n" in printed
    convert(f"to-{name}", f"--checkpoint={run}", f"--output={back}")
    ours, theirs = load_file(back / "model.safetensors"), load_file(golden.weights_file(case))
    theirs["block_decoder.gpt_neox.embed_in.weight"] = np.zeros((97, 64), np.float32)
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)
    assert (back / "official.yaml").exists() == (name == "official")
    assert load_params(run).config.model.platform == "auto"
    for again in (run, back):
        assert f"{again}: exists already" in error(
            convert, capsys, name, f"--checkpoint={golden.path(case)}", f"--output={again}"
        )


def test_a_tokenizer_that_does_not_fit_is_an_error_and_nothing_is_written(
    convert, capsys, tmp_path
):
    source = hf_models.copy("llama", tmp_path / "source")
    words = Tokenizer.train(["a b"], 97, "<|endoftext|>", "<|padding|>")
    words.save(source / "tokenizer.json")  # 258 tokens: the bytes and two special ones
    unfit = source / "tokenizer.json"
    command = ("hf", f"--checkpoint={source}", f"--output={tmp_path}/a")
    too_many = f"--tokenizer: {unfit} has 258 tokens, more than the 97 of the model"
    assert f"{too_many}\n" in error(convert, capsys, *command, f"--tokenizer={unfit}")
    assert f"{too_many}; --tokenizer=none leaves it out" in error(convert, capsys, *command)
    hf_models.edit_config(source, hidden_act="relu")
    (source / "tokenizer.json").write_text("{}")
    message = error(convert, capsys, *command)
    assert f"--tokenizer: {unfit} is not a tokenizer.json" in message
    assert "config.json: hidden_act: got 'relu'" in message
    assert not (tmp_path / "a").exists()
    hf_models.edit_config(source, hidden_act="silu")
    convert(*command, "--tokenizer=none")
    assert not (tmp_path / "a" / "tokenizer.json").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama model of random weights with a tokenizer, as it would be on the hub."""
    folder = tmp_path_factory.mktemp("small") / "hub"
    tokenizer = tokenizers.make("llama2")
    stack = StackConfig.llama(layers=2, width=32, heads=4, key_value_heads=2)
    config = VanillaConfig(vocab_size=300, context_length=64, decoder=stack, tied_classifier=True)
    model = build(config)
    save_folder(folder, *to_hf(model, random_params(model, 0.1)))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    names = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def printed_commands(capsys):
    """The commands among the printed lines, as lists of arguments after the script."""
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python launch/")]


def test_a_converted_model_generates_with_its_own_tokenizer(convert, capsys, small, tmp_path):
    run, back = tmp_path / "a run", tmp_path / "back"
    convert("hf", f"--checkpoint={small}", f"--output={run}")
    ((script, *arguments),) = printed_commands(capsys)
    assert script == "launch/generate.py"
    assert f"--checkpoint={run}" in arguments
    engine = blocktx.load(run)
    assert (engine.tokenizer.end_ids, engine.tokenizer.pad_id) == ((2, 3), 2)
    assert engine.tokenizer.chat_template == "{{ messages }}"
    assert isinstance(engine.generate("the cat", max_new_tokens=4), str)
    convert("to-hf", f"--checkpoint={run}", f"--output={back}")
    assert (back / "tokenizer.json").read_text() == (small / "tokenizer.json").read_text()
    for name, array in load_file(small / "model.safetensors").items():
        assert load_file(back / "model.safetensors")[name].tobytes() == array.tobytes()
    config = json.loads((back / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == ([2, 3], 1)


def test_a_tokenizer_can_be_added_afterwards(convert, capsys, small, tmp_path):
    run = tmp_path / "run"
    convert("hf", f"--checkpoint={small}", f"--output={run}", "--tokenizer=none")
    ((script, *arguments),) = printed_commands(capsys)
    assert script == "launch/convert.py"
    file = small / "tokenizer.json"
    convert(*(argument.replace("TOKENIZER", str(file)) for argument in arguments))
    (generate,) = printed_commands(capsys)
    folder = next(a.removeprefix("--checkpoint=") for a in generate if "--checkpoint" in a)
    assert blocktx.load(folder).tokenizer.end_ids == (2, 3)
    jax.tree.map(np.testing.assert_array_equal, load_params(folder).params, load_params(run).params)
    (tmp_path / "other").mkdir()
    shutil.copyfile(file, tmp_path / "other" / "tokenizer.json")  # without the files beside it
    command = ("add-tokenizer", f"--checkpoint={run}", f"--output={tmp_path}/b")
    other = f"--tokenizer={tmp_path}/other/tokenizer.json"
    assert "end_token: not given" in error(convert, capsys, *command, other)
    convert(*command, other, "--end-token=</s>")
    assert blocktx.load(tmp_path / "b").tokenizer.end_token == "</s>"


@pytest.mark.parametrize("method", ["all", "partition"])
def test_uptraining_of_a_converted_model(convert, capsys, small, tmp_path, method):
    run, start = tmp_path / "run", tmp_path / "start"
    convert("hf", f"--checkpoint={small}", f"--output={run}")
    how = ["--token-layers=1", "--embedder=mean_mlp"] if method == "all" else []
    convert("uptrain", f"--from={run}", f"--method={method}", f"--output={start}", *how)
    engine = blocktx.load(start)
    assert engine.config.model.kind == "block"
    assert engine.config.model.block_decoder.layers == (2 if method == "all" else 1)
    assert engine.tokenizer.end_ids == (2, 3)
    assert isinstance(engine.generate("the cat", max_new_tokens=8), str)
    bad = ("uptrain", f"--from={run}", f"--output={tmp_path}/x", "--token-layers=1")
    assert "--token-layers: is for the method all" in error(convert, capsys, *bad, "--method=skip")


def test_weights_that_are_not_finite_need_a_flag(convert, capsys, tmp_path):
    source = hf_models.copy("llama_gqa", tmp_path / "source")

    def change(tensors):
        tensors["model.norm.weight"][3] = np.nan

    hf_models.edit_tensors(source, change)
    command = ("hf", f"--checkpoint={source}", f"--output={tmp_path}/run")
    message = error(convert, capsys, *command)
    assert "model.norm.weight: 1 values are NaN or infinite" in message
    assert "--allow-nonfinite" in message
    assert not (tmp_path / "run").exists()
    convert(*command, "--allow-nonfinite")


@pytest.mark.parametrize("content", [None, "{}"])
def test_tokenizer_is_checked_with_the_model(convert, capsys, tmp_path, content):
    source, tokenizer = tmp_path / "source", tmp_path / "tokenizer.json"
    source.mkdir()
    (source / "model.safetensors").write_text("not read yet")
    if content is not None:
        tokenizer.write_text(content)
    command = ("neox", f"--checkpoint={source}", f"--output={tmp_path}/run")
    message = error(convert, capsys, *command, f"--tokenizer={tokenizer}")
    assert f"--tokenizer: {tokenizer} is not a tokenizer.json" in message
    assert "not a whole safetensors file" in message


@pytest.mark.parametrize("name", ["folder", "folder/model.safetensors"])
@pytest.mark.parametrize(("command", "first"), [("uptrain", "hf"), ("lengthen", "official")])
def test_files_of_other_code_come_here_first(convert, capsys, tmp_path, name, command, first):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").touch()
    how = ["--method=skip"] if command == "uptrain" else []
    source = tmp_path / name
    message = error(convert, capsys, command, f"--from={source}", f"--output={tmp_path}/run", *how)
    assert f"convert it first: python launch/convert.py {first} --checkpoint={source} " in message


def test_save_params_is_new_and_whole(tmp_path):
    model, params = load_official(golden.path("lookup_prefix1"))
    config = RunConfig(model=model.config)
    save_params(tmp_path / "run", config, params, step=7)
    loaded = load_params(tmp_path / "run")
    assert (loaded.step, loaded.config) == (7, config)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    with pytest.raises(FileExistsError, match="run: exists already"):
        save_params(tmp_path / "run", config, params)
    with pytest.raises(FileNotFoundError):
        save_params(tmp_path / "other", config, params, tokenizer=tmp_path / "none")
    assert [child.name for child in tmp_path.iterdir()] == ["run"]


def test_config_of_a_file(convert, capsys, tmp_path):
    shutil.copy(golden.weights_file("lookup_prefix1"), tmp_path / "block.safetensors")
    (tmp_path / "small.py").write_text(
        "from blocktx.config import RunConfig, to_config_dict\n"
        "from blocktx.config.model import BlockConfig, StackConfig\n"
        "def get_config(heads='4'):\n"
        "    stack = lambda layers: StackConfig(layers=layers, width=64, heads=int(heads))\n"
        "    return to_config_dict(RunConfig(model=BlockConfig(vocab_size=97, context_length=64,\n"
        "        block_decoder=stack(3), token_decoder=stack(2), prefix_length=1)))\n"
    )
    command = ("official", f"--checkpoint={tmp_path}/block.safetensors", f"--output={tmp_path}/run")
    assert "config.json: absent" in error(convert, capsys, *command)
    assert "--config: there is no file 'no.py'" in error(
        convert, capsys, *command, "--config=no.py"
    )
    message = error(convert, capsys, *command, f"--config={tmp_path}/small.py:5")
    assert "heads: 5 does not divide width 64" in message
    assert not (tmp_path / "run").exists()
    convert(*command, f"--config={tmp_path}/small.py")
    assert load_params(tmp_path / "run").config.model.context_length == 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x = 1\n", "the file has no function get_config()"),
        (b"def get_config(:\n", "SyntaxError: invalid syntax"),
        (b"words, words\n", "NameError: name 'words' is not defined"),
        (b"\x00\xff\n", "SyntaxError: source code "),
        (b"def get_config():\n    return {'modell': 1}\n", "config.modell: unknown field"),
    ],
)
def test_config_that_is_none(convert, capsys, tmp_path, content, message):
    file = tmp_path / "config.txt"
    file.write_bytes(content)
    command = ("neox", f"--checkpoint={tmp_path}", f"--output={tmp_path}/run", f"--config={file}")
    assert error(convert, capsys, *command).startswith(f"error: --config: {message}")


def test_help(convert, capsys):
    for command in ([], ["official"], ["to-neox"]):
        with pytest.raises(SystemExit, match="0"):
            convert(*command, "--help")
    printed = capsys.readouterr().out
    assert "--dtype" in printed
    assert "folder, .safetensors file or hub name" in printed
