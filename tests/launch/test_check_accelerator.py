"""`launch/check_accelerator.py` on this machine's CPU, at its tiny sizes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from blocktx.benchmark.accelerator import passed
from blocktx.benchmark.accelerator_report import page

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from blocktx.config import BlockConfig, RunConfig, StackConfig, to_config_dict

def get_config():
    stack = StackConfig(1, width=16, heads=2)
    shape = dict(vocab_size=53, context_length=32)
    return to_config_dict(
        RunConfig(BlockConfig(**shape, block_decoder=stack, token_decoder=stack))
    )
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    (folder / "tiny.py").write_text(CONFIG)
    command = [sys.executable, "launch/check_accelerator.py", "--tiny"]
    done = subprocess.run(
        [*command, f"--config={folder}/tiny.py", f"--output={folder}/out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text()), (folder / "out.md").read_text()


@pytest.mark.slow
def test_all_sections_pass_on_a_cpu(checked):
    found, text = checked
    assert found["errors"] == {}
    assert passed(found)
    assert "All checks passed." in text
    assert found["versions"]["platform"] == "cpu"
    assert "jax" in found["versions"]["packages"]
    assert found["peaks"]["flops_per_second"] > 0
    compared = {(r["field"], r["value"]) for r in found["formulations"]}
    assert {("loss", "fused"), ("token_attention", "products"), ("norm", "lean")} < compared
    assert ("self_attention", "cudnn") not in compared  # of a GPU
    assert found["decoding"]["same_tokens"] > 0.9
    assert [r["model"] for r in found["benchmark"]] == ["block", "vanilla"]


def test_a_formulation_that_differs_is_a_failure(checked):
    found, _ = checked
    wrong = found["formulations"][0] | {"error": [0.5, 0.5], "ok": False}
    failed = found | {"formulations": [wrong, *found["formulations"][1:]]}
    assert not passed(failed)
    assert "**Some checks failed**" in page(failed)
    assert "| **failed** |" in page(failed)


def test_an_error_in_a_section_is_in_the_page(checked):
    found, _ = checked
    failed = found | {"training": None, "errors": {"training": "Traceback: out of memory"}}
    assert not passed(failed)
    assert "Traceback: out of memory" in page(failed)
    assert "## Benchmark" in page(failed)
