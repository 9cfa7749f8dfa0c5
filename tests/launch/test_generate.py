"""`launch/generate.py` as a user runs it, from a clone."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import blocktx
from blocktx.checkpoint.manager import Checkpoints
from blocktx.data.corpus import prepare
from blocktx.model.build import build
from tests.helpers.random_weights import random_params
from tests.helpers.tiny_run import run_config, write_corpus

ROOT = pathlib.Path(__file__).parents[2]


def launch(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/generate.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """The folder of a run whose only checkpoint holds random weights."""
    folder = tmp_path_factory.mktemp("generate")
    config = run_config(write_corpus(folder))
    with Checkpoints(folder / "run", config) as checkpoints:
        params = random_params(build(config.model))
        checkpoints.save(1, params, opt_state={"count": np.zeros(1)}, data={})
    tokenizer = prepare(config.data, config.model.vocab_size).tokenizer
    tokenizer.save(folder / "run" / "tokenizer.json")
    return folder / "run"


@pytest.mark.slow
def test_text_and_throughput(run):
    settings = dict(max_new_tokens=8, temperature=0.5, top_k=50, top_p=0.9, min_p=0.01, seed=3)
    settings |= dict(placement="force", stop="zz")
    flags = [f"--{name}={value}" for name, value in settings.items()]
    more = ["--stream", "--against=vanilla"]
    done = launch(f"--checkpoint={run}", "--prompt=token cache", *flags, *more)
    assert done.returncode == 0, done.stderr
    expected = f"token cache{blocktx.load(run).generate('token cache', **settings)}\n"
    assert done.stdout.startswith(expected + "\nDecode throughput in tokens/s on cpu")
    table = done.stdout.removeprefix(expected)
    assert re.search(r"batch +block \(\d+\.\dM\) +vanilla \(\d+\.\dM\) +ratio\n", table)
    rows = [[float(x) for x in line.split()] for line in table.splitlines()[-2:]]
    assert [batch for batch, *_ in rows] == [1, 32]
    for _, block, vanilla, ratio in rows:
        assert block > 0
        assert vanilla > 0
        assert ratio == pytest.approx(block / vanilla, abs=0.06, rel=0.05)


def test_several_prompts(run):
    done = launch(f"--checkpoint={run}", "--prompt=token", "--prompt=cache", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    texts = blocktx.load(run).generate(["token", "cache"], max_new_tokens=5)
    assert done.stdout == f"--- token{texts[0]}\n--- cache{texts[1]}\n"


@pytest.mark.parametrize(
    ("checkpoint", "flags", "message"),
    [
        ("nowhere", [], "there is no such folder"),
        ("run", ["--max_new_tokens=0"], "max_new_tokens: got 0"),
        ("run", ["--prompt=a", "--prompt=b", "--stream"], "--stream: got 2 prompts, prints one"),
    ],
)
def test_mistake_is_one_line(run, checkpoint, flags, message):
    done = launch(f"--checkpoint={run.parent / checkpoint}", *flags)
    assert done.returncode == (1 if checkpoint == "nowhere" else 2)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
