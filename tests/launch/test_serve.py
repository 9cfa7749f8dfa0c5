"""`launch/serve.py` and `launch/load_test.py` as a user runs them."""

import concurrent.futures
import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest

from blocktx.checkpoint.params import save_params
from tests.helpers import served
from tests.helpers.processes import started

ROOT = pathlib.Path(__file__).parents[2]
# Some seconds of work for four rows.
BODY = dict(prompt="the block", max_tokens=110, ignore_eos=True, stream=True, n=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("serve")
    engine = served.engine(served.model())
    engine.tokenizer.save(folder / "tokenizer.json")
    save_params(folder / "run", engine.config, engine.params, tokenizer=folder / "tokenizer.json")
    return folder


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, f"launch/{script}.py", *map(str, arguments)]


@contextlib.contextmanager
def serving(folder, *arguments):
    """The process of a server and its address."""
    flags = [f"--checkpoint={folder / 'run'}", "--rows=4", "--blocks_per_call=1", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with started([command("serve", *flags)], cwd=ROOT, **pipes) as (process,):
        yield process, process.stdout.readline().strip()


def read(url: str, accepted: threading.Semaphore) -> str:
    """How a stream ended; `accepted` is released when it begins."""
    ending, reasons = "closed", []
    try:
        with httpx.stream("POST", f"{url}/completions", json=BODY, timeout=120) as response:
            accepted.release()
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    ending = "done"
                elif line:
                    reasons.append(json.loads(line[6:])["choices"][0]["finish_reason"])
    except httpx.HTTPError:
        return "broken"
    return f"{ending} with {reasons.count('length')} of 32"


@contextlib.contextmanager
def under_load(url: str) -> Iterator[list[concurrent.futures.Future]]:
    """Eight streams that the server has accepted."""
    accepted = threading.Semaphore(0)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(read, url, accepted) for _ in range(8)]
        for _ in streams:
            assert accepted.acquire(timeout=60)
        yield streams


@pytest.mark.slow
def test_sigkill_breaks_streams_and_sigterm_ends_them_whole(folder, tmp_path):
    with serving(folder, "--port=0") as (process, url):
        port = int(url.split(":")[2].split("/")[0])
        flags = [f"--url={url}", "--concurrency=3,8", "--requests=12", "--prompt_tokens=4-40"]
        flags += ["--answer_mean=9", "--answer_max=40", f"--output={tmp_path / 'load'}"]
        loaded = subprocess.run(
            command("load_test", *flags), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert loaded.returncode == 0, loaded.stderr
        found = json.loads((tmp_path / "load" / "load_test.json").read_text())
        assert [one["load"] for one in found["loads"]] == ["3 at once", "8 at once"]
        for one in found["loads"]:
            assert (one["requests"], one["errors"]) == (12, {})
            assert 0 < one["first_token_ms"]["p50"] <= one["last_token_ms"]["p99"]
            assert f"{one['tokens_per_second']:.1f}" in loaded.stdout
        assert (tmp_path / "load" / "load_test.png").exists()
        with under_load(url) as streams:
            process.kill()
            assert {stream.result() for stream in streams} == {"broken"}
    # The port is free again at once.
    with serving(folder, f"--port={port}") as (process, again):
        assert again == url
        with under_load(url) as streams:
            process.send_signal(signal.SIGTERM)
            assert [stream.result() for stream in streams] == ["done with 32 of 32"] * 8
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint=nowhere"], "there is no such"),
        (["--checkpoint={run}", "--context=4000"], "context: got 4000, must be between 1 and 128"),
        (["--checkpoint={run}", "--port={taken}"], "cannot bind 127.0.0.1:"),
        (["--checkpoint={run}", "--request_seconds=-1"], "request_seconds: got -1.0"),
    ],
)
def test_mistake_is_one_line(folder, flags, message):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = dict(run=folder / "run", taken=taken.getsockname()[1])
        flags = [flag.format(**names) for flag in flags]
        done = subprocess.run(
            command("serve", *flags), cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == (1 if "nowhere" in flags[0] else 2)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url=http://127.0.0.1:9"], "does not answer /models"),
        (["--url=http://127.0.0.1:9", "--rate=2,fast"], "--rate: got 'fast'"),
    ],
)
def test_load_test_mistake_is_one_line(flags, message):
    done = subprocess.run(
        command("load_test", *flags), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
