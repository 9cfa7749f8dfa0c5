"""Training on a disk that is really full: no hang, one error, the last whole checkpoint kept."""

import contextlib
import pathlib
import subprocess
import sys

import pytest

from blocktx.checkpoint.folder import find
from blocktx.train.metrics import read
from tests.helpers.processes import started
from tests.helpers.tiny_run import write_corpus

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from blocktx.config import DataConfig, to_config_dict
from tests.helpers.tiny_run import run_config

def get_config():
    return to_config_dict(run_config({data!r}, steps=6, checkpoint_every=2))
"""


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """Mount a tmpfs of this size, or skip."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def launch(folder, workdir):
    """Train; return the exit code and stderr."""
    file = folder / "config.py"
    file.write_text(CONFIG.format(tests=str(ROOT), data=write_corpus(folder)))
    command = [sys.executable, "launch/train.py", f"--config={file}", f"--workdir={workdir}"]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with started([command], cwd=ROOT, **pipes) as (process,):
        _, err = process.communicate(timeout=500)
        return process.returncode, err


def test_no_space_for_a_checkpoint(tmp_path):
    """The first fits, the second does not."""
    with small_disk(tmp_path / "disk", 1200) as disk:
        code, err = launch(tmp_path, disk / "run")
        assert code == 1, err
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith(f"error: {disk}/run/checkpoints: no space left for a checkpoint")
        assert find(disk / "run").name == "2"


@pytest.mark.slow
def test_no_space_for_tensorboard(tmp_path):
    workdir = tmp_path / "run"
    with small_disk(workdir / "tensorboard", 4):
        (workdir / "tensorboard" / "full").write_bytes(b"0" * 4096)
        code, err = launch(tmp_path, workdir)
        assert code == 0, err
        assert f"warning: {workdir}/tensorboard: cannot be written" in err
        steps = [line["step"] for line in read(workdir) if "train/loss" in line]
        assert steps == [1, 2, 3, 4, 5, 6]
