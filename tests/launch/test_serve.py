"""`launch/serve.py` and `launch/load_test.py` as a user runs them."""

import concurrent.futures
import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from blocktx.checkpoint.params import save_params
from tests.helpers import served

ROOT = pathlib.Path(__file__).parents[2]
BODY = dict(prompt="the block", max_tokens=110, ignore_eos=True, stream=True)


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
    process = subprocess.Popen(
        command("serve", *flags),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate(timeout=30)


def read(url: str) -> tuple[str, int]:
    """How a stream ended, and how many events there were."""
    events, ending = 0, "closed"
    try:
        with httpx.stream("POST", f"{url}/completions", json=BODY, timeout=60) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    ending = "done"
                elif line:
                    events += 1
    except httpx.HTTPError:
        ending = "broken"
    return ending, events


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
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(read, url) for _ in range(8)]
            while "num_requests_running" not in metrics(url) or running(url) < 4:
                pass
            process.kill()
            assert {stream.result()[0] for stream in streams} == {"broken"}
    # The port is free again at once.
    with serving(folder, f"--port={port}") as (process, again):
        assert again == url
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(read, url) for _ in range(8)]
            while running(url) < 4:
                pass
            accepted = accepted_requests(url)
            process.send_signal(signal.SIGTERM)
            endings = [stream.result()[0] for stream in streams]
        assert process.wait(30) == 0
        assert accepted == 8
        assert endings == ["done"] * 8


def metrics(url: str) -> str:
    return httpx.get(url.replace("/v1", "/metrics"), timeout=30).text


def running(url: str) -> float:
    (line,) = [x for x in metrics(url).splitlines() if x.startswith("vllm:num_requests_running{")]
    return float(line.split()[-1])


def accepted_requests(url: str) -> float:
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    while True:
        lines = [x for x in metrics(url).splitlines() if x.startswith(names)]
        total = sum(float(line.split()[-1]) for line in lines)
        if total == 8:
            return total


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
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url=http://127.0.0.1:9"], "does not answer /models"),
    ],
)
def test_load_test_mistake_is_one_line(flags, message):
    done = subprocess.run(
        command("load_test", *flags), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
