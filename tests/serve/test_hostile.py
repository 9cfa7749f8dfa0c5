"""Hostile clients get a 4xx that says what would work, and hold up nobody."""

import contextlib
import dataclasses
import json
import random
import socket
import time

import httpx
import pytest

from blocktx.serve.body import show
from tests.helpers import malformed, served

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}assistant:"
GET = ["/v1/models", "/tokenizer_info", "/health", "/metrics"]
POST = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
BODY = dict(prompt="the block", max_tokens=4, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def live():
    engine = served.engine(served.model(), chat_template=TEMPLATE)
    with served.serving(engine) as live:
        yield live
        assert live.metric("blocktx:compilations_total") == 0
        assert live.metric("blocktx:slots_used") == 0


def refused(response: httpx.Response, status: int = 400) -> dict:
    """The error object of a response."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} == error.keys()
    assert 0 < len(error["message"]) < 1000
    return error


@pytest.mark.parametrize(
    ("body", "words"), malformed.BODIES.items(), ids=lambda x: str(x[:40]).replace("\0", "")
)
def test_bodies_that_are_no_objects(live, body, words):
    for path in POST:
        error = refused(live.client.post(path, content=body))
        assert words in error["message"]


@pytest.mark.parametrize("fields", malformed.FIELDS, ids=lambda fields: show(fields)[:60])
def test_fields_of_wrong_type_or_range(live, fields):
    url, content = "/v1/completions", malformed.encode(fields)
    error = refused(live.client.post(url, content=content))
    name, value = next(iter(fields.items()))
    if "prompt" in fields and name == "n":
        value = 12_800
    message = error["message"]
    if name != "prompt" or "fit" not in message:
        assert error["param"] == name
        assert message.startswith(name)
        assert " must be " in message or "is not valid Unicode" in message
    else:
        assert "keep prompts to" in message
    if name != "prompt":
        items = value if isinstance(value, list) else []
        shown = [len(items), show(value)[:70], *map(show, items[:1])]
        assert any(f"got {one}" in message for one in shown)
    # Streaming does not begin before a request is accepted.
    if "stream" not in fields and "stream_options" not in fields:
        body = malformed.encode(dict(stream=True) | fields)
        assert refused(live.client.post(url, content=body)) == error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", dict(prompt=3), "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", dict(prompt="\ud800"), "prompt"),
        ("/detokenize", dict(tokens=[300]), "tokens"),
        ("/detokenize", dict(tokens=[True]), "tokens"),
        ("/detokenize", dict(tokens="a"), "tokens"),
        ("/detokenize", {}, "tokens"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", dict(messages=[]), "messages"),
        ("/v1/chat/completions", dict(messages=["a"]), "messages"),
        ("/v1/chat/completions", dict(messages=[dict(role=3)]), "messages"),
        ("/v1/chat/completions", dict(messages=[dict(role="user", content=3)]), "messages"),
        ("/v1/chat/completions", dict(messages=[dict(role="user", content=[3])]), "messages"),
        ("/v1/chat/completions", dict(messages=[dict(role="a", content="\ud800")]), "prompt"),
        ("/v1/chat/completions", dict(messages=[dict(role="a")], top_logprobs=9), "top_logprobs"),
        ("/v1/chat/completions", dict(messages=[dict(role="a")], tools=[{}]), "tools"),
    ],
)
def test_fields_of_other_routes(live, path, body, param):
    error = refused(live.client.post(path, content=json.dumps(body)))
    assert error["param"] == param
    assert param in error["message"]


VALUES = [None, True, False, 0, -1, 1, 3, 2.5, 1e300, -0.0, 2**31, 2**63, 10**30, "", "a", "\ud800"]
VALUES += ["\0", "é" * 300, [], [0], [-1], [""], ["a"], [[]], [[5]], [None], [[[1]]], {}, {"a": {}}]
NAMES = [name for fields in malformed.FIELDS for name in fields]
NAMES += ["messages", "tokens", "top_logprobs", "max_completion_tokens", "tools", "user", "nowhere"]


def test_random_fields_never_fail_inside(live):
    rng, seen = random.Random(0), set()
    for number in range(400):
        path = POST[number % 4]
        body = dict(max_tokens=3, prompt="a", tokens=[1], messages=[dict(role="a")])
        for name in rng.choices(NAMES, k=rng.choice([1, 1, 1, 2, 5])):
            body[name] = rng.choice(VALUES)
        response = live.client.post(path, content=json.dumps(body))
        seen.add((path, response.status_code))
        if response.status_code != 200:
            refused(response, 404 if "does not exist" in response.text else 400)
    assert {(path, status) for path in POST for status in (200, 400)} <= seen


@pytest.mark.parametrize("value", ["text/plain", "application/x-www-form-urlencoded", "x" * 5000])
def test_other_types_of_bodies(live, value):
    for path in POST:
        content = json.dumps(BODY)
        response = live.client.post(path, content=content, headers={"Content-Type": value})
        assert "must be application/json" in refused(response, 415)["message"]
    headers = {"Content-Encoding": "gzip"}
    response = live.client.post("/tokenize", content=b"{}", headers=headers)
    assert "Content-Encoding: got" in refused(response, 415)["message"]
    for right in ("application/json; charset=utf-8", "Application/JSON"):
        headers = {"Content-Type": right}
        response = live.client.post("/tokenize", content=b'{"prompt": ""}', headers=headers)
        assert response.json()["count"] == 0


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"])
def test_other_methods_and_routes(live, method):
    for path in GET + POST:
        allowed = ["GET", "HEAD"] if path in GET else ["POST"]
        response = live.client.request(method, live.url + path)
        if method in allowed:
            assert response.status_code == (200 if path in GET else 400)
            continue
        assert set(response.headers["Allow"].split(", ")) == set(allowed)
        if method == "HEAD":
            assert (response.status_code, response.content) == (405, b"")
        else:
            message = refused(response, 405)["message"]
            assert path in message
            assert allowed[0] in message
    for path in ("/", "//", "/v1/completions/", "/v1/%ff%00", "/" + "a" * 9000):
        response = live.client.request(method, live.url + path)
        assert response.status_code == 404
        if method != "HEAD":
            refused(response, 404)


@contextlib.contextmanager
def connected(live, **options):
    """A socket with its stream of answers."""
    with socket.socket() as client:
        for name, value in options.items():
            client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        client.settimeout(30)
        client.connect(("127.0.0.1", int(live.url.split(":")[2])))
        with client.makefile("rb") as answers:
            yield client, answers


def request(path: str, body: dict | None = None, host: str = "a", announced: int | None = None):
    content = b"" if body is None else json.dumps(body).encode()
    length = len(content) if announced is None else announced
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {host}\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + content


def read(answers) -> tuple[int, bytes]:
    status, length = int(answers.readline().split()[1]), 0
    while line := answers.readline().strip().lower():
        if line.startswith(b"content-length:"):
            length = int(line.split()[1])
    return status, answers.read(length)


def test_pipelined_requests_are_answered_in_order(live):
    with connected(live) as (client, answers):
        bodies = [BODY | dict(max_tokens=count) for count in (40, 1, 8)]
        requests = [request("/v1/completions", body) for body in bodies]
        client.sendall(requests[0] + requests[1] + request("/nowhere") + requests[2])
        found = [read(answers) for _ in range(4)]
    assert [status for status, _ in found] == [200, 200, 404, 200]
    lengths = [json.loads(found[i][1])["usage"]["completion_tokens"] for i in (0, 1, 3)]
    assert lengths == [40, 1, 8]


@pytest.mark.parametrize("host", ["[", "", "a b", "\\"])
def test_an_invalid_host_is_no_error_of_the_server(live, host):
    with connected(live) as (client, answers):
        for path in ("/nowhere", "/v1/completions", "/health"):
            client.sendall(request(path, host=host))
            assert read(answers)[0] in (404, 405, 200)


@pytest.mark.parametrize(
    "head", [b"\0\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST / HTTP/1.1\r\n:\r\n\r\n"]
)
def test_what_is_not_http_is_a_400(live, head):
    with connected(live) as (client, answers):
        client.sendall(head)
        assert read(answers)[0] == 400


def test_a_body_that_does_not_come_is_a_408(live, monkeypatch):
    app = live.server._app
    config = dataclasses.replace(app._config, request_seconds=0.2)
    monkeypatch.setattr(app, "_config", config)
    with connected(live) as (client, answers):
        client.sendall(request("/v1/completions", BODY, announced=9999))
        status, body = read(answers)
    assert status == 408
    assert "the body did not arrive in 0.2 s" in json.loads(body)["error"]["message"]


def test_slow_readers_and_idle_connections_hold_up_nobody(live):
    many = BODY | dict(n=64, max_tokens=100, stream=True, logprobs=5)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connected(live))
        for _ in range(2):  # megabytes that nobody reads
            client, _ = stack.enter_context(connected(live, SO_RCVBUF=4096))
            client.sendall(request("/v1/completions", many))
        deadline = time.monotonic() + 60
        while live.metric("vllm:num_requests_running") or live.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < deadline  # rows are free although nothing was read
        answer = live.client.post("/v1/completions", json=BODY)
        assert answer.json()["usage"]["completion_tokens"] == 4
    # The module's server drains afterwards: nothing waits for the clients.


def test_unusual_requests_are_right(live):
    def post(**fields):
        response = live.client.post("/v1/completions", content=json.dumps(BODY | fields))
        assert response.status_code == 200, response.text
        return response

    text = post().json()["choices"][0]["text"]
    for fields in (
        dict(temperature=1e-50, top_k=10**6),
        dict(temperature=1e-7, top_p=0.9999999999),
        dict(max_tokens=4.0, n=1.0, top_k=-1, stop=[], logprobs=None, stream=None, model=""),
        dict(stop=["\ud800", "\0"], user={"a": 1}, unknown=[[1]]),
        dict(stop="x" * 1000, min_p=0, seed=-(2**63)),
    ):
        assert post(**fields).json()["choices"][0]["text"] == text
    empty = post(prompt=[[], "", [0]]).json()["choices"]
    assert empty[0]["text"] == empty[1]["text"]
    lines = post(n=2, echo=True, stream=True, logprobs=0, prompt=["the", "block"]).text.split(
        "\n\n"
    )
    texts, counts = [""] * 4, [0] * 4
    for line in lines[:-2]:
        for choice in json.loads(line[6:])["choices"]:
            texts[choice["index"]] += choice["text"]
            counts[choice["index"]] += len(choice["logprobs"]["tokens"])
    assert [text[:5] for text in texts[2:]] == ["block"] * 2
    assert texts[0] == texts[1] == "the" + post(prompt="the").json()["choices"][0]["text"]
    for top in range(6):
        for echo in (False, True):
            (choice,) = post(logprobs=top, echo=echo).json()["choices"]
            assert choice["text"].endswith(text)
            for listed in choice["logprobs"]["top_logprobs"][echo:]:
                assert max(top, 1) <= len(listed) <= top + 1
    for top in ({}, dict(top_logprobs=0), dict(top_logprobs=2)):
        body = dict(messages=[dict(role="a", content="b")], max_tokens=3, logprobs=True) | top
        (choice,) = live.client.post("/v1/chat/completions", json=body).json()["choices"]
        for entry in choice["logprobs"]["content"]:
            assert len(entry["top_logprobs"]) == top.get("top_logprobs", 0)
    encode = live.engine.tokenizer.encode
    assert counts == [4 + len(encode("the"))] * 2 + [4 + len(encode("block"))] * 2
