"""`launch/restart.sh` around a command that ends as it is told."""

import pathlib
import signal
import subprocess

import pytest

from tests.helpers.processes import started

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 60  # seconds
# Takes the code of each run from the lines of a file, and notes what it was called with.
COMMAND = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$(dirname "$0")/calls"
codes=$(dirname "$0")/codes
code=$(head -n 1 "$codes"); sed -i 1d "$codes"
case $code in
  wait)  # as training does: saves, and says so by its code
    trap 'sleep 0.3; echo saved; exit 143' TERM
    trap 'exit 130' INT
    echo started
    while kill -0 $PPID; do sleep 0.05; done ;;
  kill) kill -KILL $$ ;;
  *) exit "${code:-0}" ;;
esac
"""


@pytest.fixture
def command(tmp_path):
    file = tmp_path / "my train.sh"
    file.write_text(COMMAND)
    file.chmod(0o755)
    return file


def write_codes(command, *codes):
    (command.parent / "codes").write_text("".join(f"{code}\n" for code in codes))


def calls(command):
    return (command.parent / "calls").read_text().splitlines()


def restart(*arguments):
    return ["bash", str(ROOT / "launch" / "restart.sh"), "--backoff=0", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(restart(*arguments), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_codes_that_end_it(code, command):
    write_codes(command, code, 0)
    assert run(command, "--workdir=my runs").returncode == code
    assert calls(command) == ["--workdir=my runs"]


@pytest.mark.parametrize("code", [143, 134, 139, 70, "kill"])
def test_preemption_and_crashes_resume(code, command):
    write_codes(command, code, code, 0)
    done = run(command, "--workdir=a")
    assert done.returncode == 0
    assert calls(command) == ["--workdir=a", "--workdir=a --resume", "--workdir=a --resume"]
    number = 137 if code == "kill" else code
    assert f"ended with code {number}; restart 1 of 10 in 0 seconds" in done.stderr


def test_resume_is_given_once(command):
    write_codes(command, 143, 143)
    run(command, "--resume", "--steps=4")
    assert calls(command) == ["--resume --steps=4"] * 3


def test_gives_up_without_progress(command):
    write_codes(command, *[134] * 9)
    done = run("--max_restarts=3", command)
    assert done.returncode == 134
    assert len(calls(command)) == 4
    assert (
        "error: ended with code 134; gave up after 3 restarts without a run of 600" in done.stderr
    )


def test_long_runs_do_not_count(command):
    write_codes(command, *[143] * 6)
    assert run("--max_restarts=1", "--healthy_after=0", command).returncode == 0
    assert len(calls(command)) == 7


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_is_passed_on_and_waited_for(number, code, command):
    write_codes(command, 134, "wait", 0)
    with started([restart(command)], stdout=subprocess.PIPE, text=True) as (process,):
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert out == ("saved\n" if number == signal.SIGTERM else "")
    assert len(calls(command)) == 2


def test_signal_between_two_runs(command):
    write_codes(command, 134, 0)
    waiting = restart(f"--backoff={10 * PATIENCE}", command)
    with started([waiting], stderr=subprocess.PIPE, text=True) as (process,):
        assert f"in {10 * PATIENCE} seconds" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert len(calls(command)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no command to run"),
        (("--max_restarts=few", "true"), "--max_restarts: got 'few', expected a whole number"),
        (("--restarts=3", "true"), "unknown option '--restarts=3'"),
    ],
)
def test_mistakes(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"restart.sh: error: {message}")


def test_command_that_there_is_not():
    done = run("--max_restarts=0", "/nowhere/train.py")
    assert done.returncode == 127
