"""`launch/train.py` as a user runs it, from a clone."""

import pathlib
import signal
import subprocess
import sys

import pytest

from tests.helpers.processes import started
from tests.helpers.tiny_run import write_corpus

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from blocktx.config import DataConfig, to_config_dict
from tests.helpers.tiny_run import run_config

def get_config():
    return to_config_dict(run_config({data!r}, log_every=10))
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("launch")
    file = folder / "config.py"
    file.write_text(CONFIG.format(tests=str(ROOT), data=write_corpus(folder)))
    return file


def command(*flags: object) -> list[str]:
    return [sys.executable, "launch/train.py", *map(str, flags)]


def launch(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    return workdir, launch(f"--config={config_file}", f"--workdir={workdir}")


def test_run(finished):
    workdir, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("model    block, ")
    assert "non-embedding" in lines[0]
    assert lines[1].startswith("data     ")
    assert lines[2].startswith("devices  1 x cpu")
    assert lines[3].startswith("step=1 loss=5.")
    assert lines[-3].startswith("held-out step=4 loss=")
    assert str(workdir / "checkpoints") in lines[-2]
    assert lines[-1] == f"python launch/generate.py --checkpoint={workdir} --prompt='...'"


def test_existing_run_needs_resume(finished, config_file):
    workdir, _ = finished
    done = launch(f"--config={config_file}", f"--workdir={workdir}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {workdir}: there is a run in it")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.training.stepz=5"], "--config.training.stepz=5: the configuration has no fi"),
        (["--config.trainin.steps=5"], "has no field trainin; did you mean training?"),
        (["--config.training.steps=few"], "--config.training.steps=few: invalid literal"),
        (["--config.training.steps=-5"], "config.training.steps: got -5, must be greater than 0"),
        (["--step=2"], "--step: is for --resume only"),
        (["--config.data.source=/nowhere"], "config.data.source: '/nowhere' does not exist"),
        (["--config.mesh.data=3"], "--config.mesh: data 3 x fsdp -1 x tensor 1 does not fit"),
    ],
)
def test_mistake_is_one_line(flags, message, config_file, tmp_path):
    done = launch(f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "--coordinator_address, process_id: missing"),
        (["--distributed=maybe"], "--distributed=maybe"),
        (["--heartbeat_timeout=0"], "--heartbeat_timeout: got 0"),
        (["--distributed=on"], "--distributed: "),
    ],
)
def test_mistake_about_other_processes(flags, message, config_file, tmp_path):
    done = launch(f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_configuration_that_is_not_there(tmp_path):
    done = launch("--config=configs/nowhere.py", f"--workdir={tmp_path / 'run'}")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert "configs/nowhere.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_help():
    done = launch("--help")
    for word in ("--config", "--workdir", "--[no]resume", "configs/quickstart.py", "Ctrl-C"):
        assert word in done.stdout


def test_ctrl_c_saves_and_ends_with_130(config_file, tmp_path):
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    long = command(*flags, "--config.training.steps=100000")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with started([long], cwd=ROOT, **pipes) as (process,):
        for line in process.stdout:
            if line.startswith("step=10 "):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "stopped by SIGINT and saved at step" in out
    assert "--resume" in out
    assert "Traceback" not in err
    assert [path.name.isdigit() for path in (tmp_path / "run" / "checkpoints").iterdir()] == [True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    StackConfig(2, 32, heads=7)", "heads: 7 does not divide width 32"),
        (
            "def get_config():\n    StackConfig(2, 32, layrs=7)",
            "unexpected keyword argument 'layrs'",
        ),
        ("get = 1", "--config: the file has no function get_config()"),
        ("def get_config():\n    return {'model': {'kind': 'blok'}}", "model.kind: got 'blok'"),
        (None, "--config: there is no file"),
    ],
)
def test_mistake_in_a_config_file_is_one_line(text, message, tmp_path):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(f"from blocktx.config.model import StackConfig\n\n{text}\n")
    done = launch(f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()
