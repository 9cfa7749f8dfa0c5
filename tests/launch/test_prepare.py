"""launch/prepare.py, as users and machines start and end it."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from blocktx.data.tokenizer import Tokenizer
from tests.helpers.processes import started

ROOT = pathlib.Path(__file__).parents[2]
WORDS = [f"word{i}" for i in range(500)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with 3 MB of text in JSON Lines, and a tokenizer."""
    folder, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    for name in ("a", "b", "c"):
        lines = (json.dumps({"text": " ".join(rng.choices(WORDS, k=300))}) for _ in range(500))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    Tokenizer.train(WORDS, 300, "<|endoftext|>", "<|padding|>").save(folder / "tokenizer.json")
    return folder


def preparing(inputs, output, *flags):
    """Start a preparation, for a `with` block."""
    command = [
        *(sys.executable, "launch/prepare.py", f"--source={inputs}/*.jsonl"),
        *(f"--output={output}", "--part_megabytes=1", "--workers=2"),
    ]
    if not any(flag.startswith("--tokenizer") for flag in flags):
        command.append(f"--tokenizer={inputs}/tokenizer.json")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return started([[*command, *flags]], cwd=ROOT, **pipes)


def run(*arguments):
    with preparing(*arguments) as (process,):
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def contents(folder):
    return {
        os.fspath(path.relative_to(folder)): path.read_bytes()
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


@pytest.fixture(scope="module")
def wanted(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wanted")
    code, out, err = run(inputs, folder)
    assert code == 0, err
    assert "1,500 documents, " in out
    assert "in 3 shards" in out
    assert out.splitlines()[-1] == f"train with --config.data.source=prepared:{folder}"
    return folder


def kill_and_finish(inputs, wanted, folder, delay):
    """SIGKILL alone reaches the parent; its workers notice that it is gone."""
    with preparing(inputs, folder) as (process,):
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    end = time.monotonic() + 60
    while True:  # a worker may have the lock for as long as it lives
        code, _, err = run(inputs, folder)
        if "another process is preparing" not in err:
            break
        assert time.monotonic() < end, err
        time.sleep(0.2)
    assert code == 0, err
    assert contents(folder) == contents(wanted)


def test_killed_and_finished_by_the_same_command(inputs, wanted, tmp_path):
    kill_and_finish(inputs, wanted, tmp_path, delay=2)


@pytest.mark.slow
@pytest.mark.parametrize("tenths", range(5, 45, 4))
def test_killed_at_ten_places(inputs, wanted, tmp_path, tenths):
    kill_and_finish(inputs, wanted, tmp_path, delay=tenths / 10)


def test_tasks_and_other_numbers_of_workers(inputs, wanted, tmp_path):
    assert "task 1/2 is done" in run(inputs, tmp_path, "--task=1/2", "--workers=1")[1]
    code, out, err = run(inputs, tmp_path, "--task=0/2", "--workers=3")
    assert code == 0, err
    assert "1,500 documents" in out
    assert contents(tmp_path) == contents(wanted)


def test_a_bad_document_ends_all_workers(inputs, tmp_path):
    lines = (inputs / "a.jsonl").read_text().splitlines()
    lines[400] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_bytes((inputs / "b.jsonl").read_bytes())
    tokenizer = f"--tokenizer={inputs}/tokenizer.json"
    for _ in range(2):  # another call does not forget it
        code, _, err = run(tmp_path, tmp_path / "out", tokenizer)
        assert code == 1
        assert "a.jsonl, line 401: not JSON" in err.splitlines()[-1]
    code, out, err = run(tmp_path, tmp_path / "out", tokenizer, "--skip_bad=1")
    assert code == 0, err
    assert "skipped: " in err
    assert "1 bad documents were skipped" in out


@pytest.mark.parametrize(
    ("flag", "match"),
    [
        ("--source=a@0.5,b@0.5", "weights are for training"),
        ("--source=prepared:a", "is prepared already"),
        ("--source=/no/such/place", "'/no/such/place' does not exist"),
        ("--task=2/2", "--task: got '2/2', expected I/N"),
        ("--output=s3://bucket/a", "--output: s3://bucket/a is neither a local folder nor gs://"),
        ("--tokenizer=/no/such.json", "the file '/no/such.json' does not exist"),
    ],
)
def test_mistakes(inputs, tmp_path, flag, match):
    code, _, err = run(inputs, tmp_path / "out", flag)
    assert code == 2
    assert match in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_trains_a_tokenizer(inputs, tmp_path):
    for _ in range(2):  # the second finds it there
        code, _, err = run(inputs, tmp_path, "--tokenizer=train", "--vocab_size=280")
        assert code == 0, err
    special = ("<|endoftext|>", "<|padding|>")
    assert Tokenizer.load(tmp_path / "tokenizer.json", *special).vocab_size == 280
