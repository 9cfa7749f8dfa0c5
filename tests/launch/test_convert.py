"""launch/convert.py, and checkpoints that hold nothing but parameters."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import blocktx
from blocktx.checkpoint.params import load_params, save_params
from blocktx.config.run import RunConfig
from blocktx.convert import load_official
from blocktx.data.tokenizer import Tokenizer
from tests.helpers import golden


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
    for again in (run, back):
        assert f"{again}: exists already" in error(
            convert, capsys, name, f"--checkpoint={golden.path(case)}", f"--output={again}"
        )


def test_a_run_with_tokenizer_generates(convert, capsys, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden.path("lookup_prefix2"), source)
    words = Tokenizer.train(["a b"], 97, "<|endoftext|>", "<|padding|>")
    words.save(source / "tokenizer.json")  # 258 tokens: the bytes and two special ones
    unfit = source / "tokenizer.json"
    command = ("official", f"--checkpoint={source}")
    message = error(convert, capsys, *command, f"--output={tmp_path}/a", f"--tokenizer={unfit}")
    assert f"--tokenizer: {unfit} has 258 tokens, more than the 97 of the model" in message
    assert not (tmp_path / "a").exists()
    convert(*command, f"--output={tmp_path}/a")  # one that merely lies beside
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"left out {unfit}: has 258 tokens, more than the 97 of the model"
    assert f" --checkpoint={tmp_path}/a --tokenizer=tokenizer.json " in last
    assert not (tmp_path / "a" / "tokenizer.json").exists()

    model, params = load_official(source)
    folder = tmp_path / "run"
    save_params(folder, RunConfig(model=model.config), params, tokenizer=source / "tokenizer.json")
    engine = blocktx.load(folder)
    assert engine.tokenizer.end_id == words.end_id
    assert engine.config.model.kind == "block"


@pytest.mark.parametrize("content", [None, "{}"])
def test_tokenizer_is_checked_first(convert, capsys, tmp_path, content):
    source, tokenizer = tmp_path / "source", tmp_path / "tokenizer.json"
    source.mkdir()
    (source / "model.safetensors").write_text("not read yet")
    if content is not None:
        tokenizer.write_text(content)
    command = ("neox", f"--checkpoint={source}", f"--output={tmp_path}/run")
    message = error(convert, capsys, *command, f"--tokenizer={tokenizer}")
    assert f"--tokenizer: {tokenizer} is not a tokenizer.json" in message


def test_unusable_tokenizer_beside_is_left_out(convert, capsys, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden.path("lookup_prefix1"), source)
    (source / "tokenizer.json").write_text("{}")
    convert("official", f"--checkpoint={source}", f"--output={tmp_path}/run")
    start = f"left out {source}/tokenizer.json: is not a tokenizer.json: "
    assert capsys.readouterr().out.startswith(start)


@pytest.mark.parametrize("name", ["folder", "folder/model.safetensors"])
@pytest.mark.parametrize(("command", "first"), [("uptrain", "neox"), ("lengthen", "official")])
def test_files_of_other_code_come_here_first(convert, capsys, tmp_path, name, command, first):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").touch()
    how = ["--method=skip"] if command == "uptrain" else []
    source = tmp_path / name
    message = error(convert, capsys, command, f"--from={source}", f"--output={tmp_path}/run", *how)
    assert (
        f"bring it here first: python launch/convert.py {first} --checkpoint={source} " in message
    )


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
    assert "token_decoder.heads: cannot be told" in error(convert, capsys, *command)
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
