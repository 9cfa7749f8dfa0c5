"""`launch/benchmark.py` as a user runs it, from a clone."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from blocktx.config import RunConfig, to_config_dict
from blocktx.config import BlockConfig, StackConfig

def get_config(name="one"):
    stack = StackConfig({"one": 1, "two": 2}[name], width=16, heads=2)
    shape = dict(vocab_size=53, context_length=32)
    return to_config_dict(
        RunConfig(BlockConfig(**shape, block_decoder=stack, token_decoder=stack))
    )
"""


def launch(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/benchmark.py", *map(str, flags)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # libtpu, if there, has much to say
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("benchmark") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.mark.slow
def test_table_and_json(config):
    out = config.parent / "out.json"
    shape = ["--prompt=60", "--new=8", "--batch_sizes=1,2", "--repeats=1"]
    done = launch(f"--config={config}:one", "--against=vanilla", *shape, f"--json={out}")
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert [(r["model"], r["batch_size"]) for r in results] == [
        ("one", 1),
        ("vanilla", 1),
        ("one", 2),
        ("vanilla", 2),
    ]
    for result in results:
        assert result["tokens_per_second"] > 0
        assert result["seconds_to_first_token"] > 0
        assert result["prefill_seconds"] > 0
        assert result["bytes_per_sample"] > 0
    assert "GFLOP/s in a product of 2048^3" in done.stdout
    assert "batch 2: one is " in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--setting=custom"], "--setting=custom needs --prompt and --new"),
        (["--setting=prefill_heavy", "--prompt=9"], "prefill_heavy is 2048; use --setting=custom"),
        (["--prompt=8", "--new=8", "--batch_sizes=1,x"], "--batch_sizes: got '1,x'"),
        (["--prompt=8", "--new=8", "--against=nothing"], "--against: KeyError: 'nothing'"),
        (["--checkpoint=run"], "give either --config or --checkpoint"),
        (["--prompt=8", "--new=8", "--memory_limit=1e-9"], "memory_limit: one needs"),
    ],
)
def test_mistake_is_one_line(config, flags, message):
    done = launch(f"--config={config}:one", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
