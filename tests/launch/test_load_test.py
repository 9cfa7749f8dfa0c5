"""`launch/load_test.py` against a server that stops answering, or refuses; its plot."""

import http.server
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import threading

from blocktx import plotting
from tests.helpers.processes import started

ROOT = pathlib.Path(__file__).parents[2]
STREAM = (
    b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "b"}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n'
)


class Server(http.server.ThreadingHTTPServer):
    """An API that answers `left` requests, sets `hanging` at the next, and never answers it.

    Prompts and answers of more than `context` tokens are refused.
    """

    daemon_threads = True

    def __init__(self, left: int, context: int = 2048):
        super().__init__(("127.0.0.1", 0), Handler)
        self.left, self.hanging = left, threading.Event()
        self.context, self.prompts = context, []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        model = {"id": "stub", "max_model_len": self.server.context}
        self.answer(json.dumps({"data": [model]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.prompts.append(len(body["prompt"]))
        if len(body["prompt"]) + body["max_tokens"] > self.server.context:
            refused = {"error": {"message": f"the limit is {self.server.context}"}}
            return self.answer(json.dumps(refused).encode(), 400)
        if self.server.left == 0:
            self.server.hanging.set()
            threading.Event().wait()
        self.server.left -= 1
        self.answer(STREAM)

    def answer(self, body: bytes, status: int = 200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    """A whole load of three requests, and two requests of the next."""
    with Server(left=5) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = [f"--url=http://127.0.0.1:{server.server_port}", "--concurrency=1,1"]
        flags += ["--requests=3", f"--output={tmp_path}"]
        command = [sys.executable, "launch/load_test.py", *flags]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with started([command], cwd=ROOT, **pipes) as (process,):
            assert server.hanging.wait(60)
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate(timeout=60)
        server.shutdown()
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    assert "interrupted: of the requests until then" in printed
    assert printed.count("1 at once") == 2
    found = json.loads((tmp_path / "load_test.json").read_text())
    assert [load["requests"] for load in found["loads"]] == [3, 2]
    assert found["finished"] is False
    assert (tmp_path / "load_test.png").exists()


def run(server, *flags):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        sys.executable,
        "launch/load_test.py",
        f"--url=http://127.0.0.1:{server.server_port}",
    ]
    done = subprocess.run(
        [*command, "--concurrency=1", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    server.shutdown()
    return done


def test_prompts_fit_the_context_of_the_server():
    with Server(left=30, context=300) as server:
        done = run(server, "--requests=30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "errors:" not in done.stdout
    assert 16 <= min(server.prompts) < 30 < max(server.prompts) <= 300 - 256


def test_what_the_server_says_is_printed():
    with Server(left=2, context=40) as server:
        done = run(server, "--requests=2", "--prompt_tokens=100")
    assert (done.returncode, done.stderr) == (1, "error: no request was answered\n")
    assert "errors: 2 HTTP 400\nHTTP 400: the limit is 40\n" in done.stdout


def test_points_of_the_plot_have_room_above(tmp_path, monkeypatch):
    """Also where p95 is nearly flat, and the axis begins at 0."""
    spec = importlib.util.spec_from_file_location("load_test", ROOT / "launch" / "load_test.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shown = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: shown.append(figure))
    for spread in (0.1, 100):
        loads = [
            dict(load=f"{n}/s", tokens_per_second=64 * n, first_token_ms={"p95": 50 + spread * i})
            for i, n in enumerate([1, 2, 5, 20])
        ]
        script.plot({"one": loads}, tmp_path / "load_test.png")
        shown[-1].draw_without_rendering()
        (axes,) = shown[-1].axes
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 1.1 * (50 + 3 * spread)
        assert "1,000" in [label.get_text() for label in axes.get_xticklabels()]
