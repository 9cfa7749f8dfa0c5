"""Exit codes: what a person must look at, and what is tried again."""

import pathlib
import subprocess
import sys

import jax
import pytest
from absl import flags

from blocktx import command_line
from blocktx.checkpoint.errors import DamagedError
from blocktx.config.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def code_of(error, monkeypatch, **settings):
    """Return the exit code of a program that raises `error`."""

    def main():
        raise error

    ran = []
    monkeypatch.setattr(command_line.app, "run", lambda checked, **_: ran.append(checked))
    command_line.run(main, required=(), **settings)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    with pytest.raises(SystemExit) as ended:
        ran[0](["test"])
    return ended.value.code


TRANSIENT = [
    ConnectionResetError("reset"),
    OSError(5, "Input/output error"),
    TimeoutError("timed out"),
    ValueError("UNAVAILABLE: no answer of the bucket"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    RuntimeError("a bug"),
]
FOR_A_PERSON = [
    UserError("config.x"),
    DamagedError("checkpoints/3"),
    FileNotFoundError("no source"),
    PermissionError("forbidden"),
    FloatingPointError("the loss is nan"),
    OSError(28, "No space left on device"),
    ValueError("Error writing: No space left on device"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_another_try_may_do(error, monkeypatch, capsys):
    assert code_of(error, monkeypatch, restarted=True) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", FOR_A_PERSON, ids=repr)
def test_a_person_must_look(error, monkeypatch, capsys):
    assert code_of(error, monkeypatch, restarted=True) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {error}"


def test_ctrl_c_and_programs_that_are_not_restarted(monkeypatch, capsys):
    assert code_of(KeyboardInterrupt(), monkeypatch) == 130
    assert code_of(ValueError("prompt: is empty"), monkeypatch) == 1
    assert capsys.readouterr().err.endswith("error: prompt: is empty\n")


def test_messages_name_the_flag_that_the_user_gave(monkeypatch, capsys):
    flag_of = {"config.data.source": "--data"}
    code_of(UserError("config.data.source: 'a:b' does not exist"), monkeypatch, flag_of=flag_of)
    assert capsys.readouterr().err == "error: --data: 'a:b' does not exist\n"
    code_of(UserError("see config.data.source: x"), monkeypatch, flag_of=flag_of)
    assert capsys.readouterr().err == "error: see config.data.source: x\n"


@pytest.mark.parametrize(
    ("message", "printed", "code"),
    [
        ("rows: got 0", "--rows: got 0", 2),
        ("config.mesh: does not fit", "--config.mesh: does not fit", 2),  # of config.mesh.data
        ("--rate: got 'x'", "--rate: got 'x'", 2),
        ("row: got 0", "row: got 0", 1),
        ("config.model: got 0", "config.model: got 0", 1),
        ("no rows: got 0", "no rows: got 0", 1),
    ],
)
def test_an_invalid_flag_ends_with_2(message, printed, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["test", "--rows=0", "--config.mesh.data=3"])
    assert code_of(ValueError(message), monkeypatch) == code
    assert capsys.readouterr().err == f"error: {printed}\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.py")))
def test_every_script_has_help(script, tmp_path):
    command = [sys.executable, ROOT / "launch" / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--help" in done.stdout
    assert "\\\n" not in done.stdout.replace(" \\\n    ", "")  # a command goes on indented
    assert not list(tmp_path.iterdir())


def launch(*arguments):
    command = [sys.executable, "launch/train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_config_after_a_space_and_flags_of_jax(tmp_path):
    """Reaches the check of a field, so the file was read; the flag of JAX is known."""
    done = launch(
        "--config", "configs/quickstart.py", "--jax_debug_nans", f"--workdir={tmp_path}/run",
        "--config.training.steps=0",
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: config.training.steps: got 0, must be greater than 0" in done.stderr
    done = launch("--config", "nowhere.py", f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stderr) == (2, "error: --config: there is no file 'nowhere.py'\n")


def test_help_is_no_error():
    command = [sys.executable, "launch/plot.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--output: The PNG, SVG or PDF file to write." in done.stdout


@pytest.mark.parametrize(
    ("script", "name"),
    [("benchmark", "plot"), ("evaluate", "plot"), ("needle", "plot"), ("plot", "output")],
)
def test_a_picture_that_cannot_be_written_is_a_mistake_in_the_flags(script, name, tmp_path):
    """Said first: other flags are missing too."""
    flag = f"--{name}={tmp_path}/new/x.png"
    command = [sys.executable, f"launch/{script}.py", flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    problem = f"there is no folder '{tmp_path}/new'; make it first"
    assert (done.returncode, done.stderr) == (2, f"error: flag {flag}: {problem}\n")
    assert not any(tmp_path.iterdir())


def test_an_unknown_flag_points_to_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line._parse(["plot.py", "--nosuch=1"])
    assert ended.value.code == 2
    message = "error: Unknown command line flag 'nosuch'; see --help\n"
    assert capsys.readouterr().err == message


def test_a_misspelt_config_is_named(monkeypatch, capsys):
    known = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=known)
    monkeypatch.setattr(flags, "FLAGS", known)
    for given, hint in [
        ("confg.training.steps", ". Did you mean: config.training.steps ?"),
        ("nothing.like.it", ""),
        ("config.training.steps", ""),  # of a program whose --config has no overrides
    ]:
        with pytest.raises(SystemExit):
            command_line._parse(["plot.py", f"--{given}=1"])
        message = f"error: Unknown command line flag '{given}'{hint}; see --help\n"
        assert capsys.readouterr().err == message


PROGRAM = """
import asyncio, atexit, threading, time
from blocktx import command_line

class Closed:
    def __del__(self):
        raise RuntimeError("Event loop is closed")

def main():
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(OSError(28, "No space left on device"))
    loop.close()
    Closed()
    atexit.register(time.sleep, 1000)
    threading.Thread(target=time.sleep, args=(1000,)).start()
    full = OSError(28, "No space left on device")
    raise command_line.UserError("checkpoints: no space left") from full

command_line.run(main, required=(), restarted=True)
"""


def test_the_message_is_all_and_the_end():
    """Whatever goes on in the background, as after a write to a full disk."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (1, "error: checkpoints: no space left\n")
