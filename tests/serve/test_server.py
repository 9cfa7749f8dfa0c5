"""A live server: answers equal those of the engine, whatever else it does at the time."""

import asyncio
import gc
import json
import random
import threading
import time

import httpx
import jax
import numpy as np
import pytest

from blocktx.decode.continuous import ContinuousDecoder
from blocktx.decode.request import Request
from blocktx.decode.stream import Continuation
from blocktx.evaluate.scoring import score
from blocktx.serve.scheduler import Job
from blocktx.serve.scoring import PromptScorer
from tests.helpers import malformed, served

REQUESTS = 256
CLIENTS = 40


@pytest.fixture(scope="module")
def engine():
    return served.engine(served.model())


def random_body(number: int) -> dict:
    rng = random.Random(number)
    text = "".join(rng.choice(["the block", " token", " by", "é", "\n", "c"]) for _ in range(12))
    body = dict(
        prompt=text[: rng.randint(0, 40)],
        max_tokens=rng.randint(1, 40),
        seed=number,
        temperature=rng.choice([0, 0.5, 1.0, 2.0]),
        logprobs=1,
    )
    if rng.random() < 0.3:
        body |= dict(stop=rng.sample(["e", " t", "a", "o", "zz", "$"], rng.randint(1, 3)))
    if rng.random() < 0.3:
        body |= dict(top_p=0.8, top_k=7, min_p=0.02)
    return body


def of_engine(engine, body):
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
    options = {name: body[name] for name in names if name in body}
    options |= dict(max_new_tokens=body["max_tokens"], return_logprobs=True)
    return engine.generate(body["prompt"], **options)


@pytest.fixture(scope="module")
def expected(engine):
    """What the engine writes, request by request, before the server starts."""
    return [of_engine(engine, random_body(number)) for number in range(REQUESTS)]


@pytest.fixture(scope="module")
def live(engine, expected):
    with served.serving(engine) as live:
        yield live


async def stream(client, url, body):
    """Text, log-probabilities, end and number of chunks of a streamed answer of one choice."""
    text, logprobs, reasons, chunks, done = "", [], [], 0, False
    async with client.stream("POST", url, json=body | dict(stream=True)) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if not line:
                continue
            assert line.startswith("data: ")
            assert not done
            if line == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(line[6:])
            assert {"id", "object", "created", "model"} <= chunk.keys()
            assert "error" not in chunk
            for choice in chunk["choices"]:
                text += choice["text"]
                if choice["logprobs"]:
                    logprobs += choice["logprobs"]["token_logprobs"]
                reasons.append(choice["finish_reason"])
                chunks += 1
    assert done
    assert all(reason is None for reason in reasons[:-1])
    return text, logprobs, reasons[-1], chunks


def run(main):
    async def with_client():
        limits = httpx.Limits(max_connections=CLIENTS)
        timeout = httpx.Timeout(120, pool=None)  # thousands wait for a connection
        async with httpx.AsyncClient(timeout=timeout, limits=limits) as client:
            return await main(client)

    return asyncio.run(with_client())


def test_random_requests_get_what_the_engine_writes(live, expected):
    rng = np.random.default_rng(0)
    order, delay = rng.permutation(REQUESTS), rng.exponential(0.005, REQUESTS).cumsum()
    url = f"{live.url}/v1/completions"
    compiled = live.metric("blocktx:compilations_total")

    async def main(client):
        async def one(place, number):
            await asyncio.sleep(delay[place])
            body = random_body(number)
            if number % 2:
                return number, (await stream(client, url, body))[:3]
            answer = (await client.post(url, json=body)).json()
            (choice,) = answer["choices"]
            usage = answer["usage"]
            assert usage["completion_tokens"] == len(expected[number].tokens)
            logprobs = choice["logprobs"]["token_logprobs"]
            return number, (choice["text"], logprobs, choice["finish_reason"])

        tasks = [one(place, int(number)) for place, number in enumerate(order)]
        return await asyncio.gather(*tasks)

    for number, (text, logprobs, reason) in run(main):
        wanted = expected[number]
        assert (text, reason) == (wanted.text, wanted.finish_reason), number
        np.testing.assert_allclose(logprobs[: len(wanted.logprobs)], wanted.logprobs, atol=1e-5)
    assert {wanted.finish_reason for wanted in expected} == {"stop", "length"}
    assert live.metric("blocktx:compilations_total") == compiled
    assert live.metric("vllm:num_requests_running") == 0
    assert live.metric("blocktx:slots_used") == 0


def test_blocks_are_streamed_as_they_come(live):
    async def main(client):
        body = dict(prompt="the block", max_tokens=60, temperature=0, ignore_eos=True)
        return await stream(client, f"{live.url}/v1/completions", body)

    assert run(main)[3] >= 3  # 16 tokens of a row in a call


@pytest.fixture(scope="module")
def openai(live):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client(openai, engine):
    assert [model.id for model in openai.models.list()] == ["tiny"]
    create = openai.completions.create
    whole = create(model="tiny", prompt="the block", max_tokens=8, seed=3, logprobs=2)
    wanted = engine.generate("the block", max_new_tokens=8, seed=3, return_logprobs=True)
    assert whole.choices[0].text == wanted.text
    assert whole.object == "text_completion"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 8
    logprobs = whole.choices[0].logprobs
    np.testing.assert_allclose(logprobs.token_logprobs, wanted.logprobs, atol=1e-5)
    assert all(len(top) in (2, 3) for top in logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0
    options = dict(model="tiny", prompt="the block", max_tokens=8, seed=3)
    usage = {"include_usage": True}
    chunks = list(create(**options, stream=True, stream_options=usage))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == wanted.text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[-2].choices[0].finish_reason == "length"
    # Several prompts, in text and in ids, and several of each.
    prompts = ["the block", "token"]
    many = create(model="tiny", prompt=prompts, n=2, max_tokens=8, seed=3)
    wanted = engine.generate(["the block"] * 2 + ["token"] * 2, max_new_tokens=8, seed=3)
    assert [choice.text for choice in many.choices] == wanted
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    ids = [engine.tokenizer.encode(prompt) for prompt in prompts]
    assert create(model="tiny", prompt=ids, n=2, max_tokens=8, seed=3).choices == many.choices
    one = create(model="tiny", prompt=ids[0], max_tokens=8, seed=3)
    assert one.choices[0].text == wanted[0]


def test_openai_client_sees_its_exceptions(openai):
    import openai as library

    create = openai.completions.create
    with pytest.raises(library.NotFoundError, match="does not exist"):
        create(model="other", prompt="a")
    with pytest.raises(library.BadRequestError, match="context of 128") as caught:
        create(model="tiny", prompt=[5] * 120, max_tokens=20)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(library.BadRequestError, match="temperature: got -1"):
        create(model="tiny", prompt="a", temperature=-1)
    with pytest.raises(library.NotFoundError, match="no chat template"):
        openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_10_mb_is_refused(live, announced):
    body = json.dumps(dict(prompt="a" * 10**7)).encode()
    content = body if announced else iter([body[:5000], *[body[5000:]] * 2])
    try:
        response = httpx.post(f"{live.url}/v1/completions", content=content, timeout=30)
    except httpx.WriteError:  # the server may close while the client still sends
        return
    assert response.status_code == 413
    assert "larger than 4194304 bytes" in response.json()["error"]["message"]


def test_tokenizer_routes(live, engine):
    tokenizer = engine.tokenizer

    def post(path, **body):
        return httpx.post(live.url + path, json=body).json()

    ids = tokenizer.encode("the block é")
    assert post("/tokenize", prompt="the block é")["tokens"] == ids
    assert post("/detokenize", tokens=ids) == {"prompt": "the block é"}
    assert post("/tokenize", prompt="<|endoftext|>")["tokens"] == [tokenizer.end_id]
    assert post("/tokenize", prompt="<|endoftext|>a")["tokens"] == tokenizer.encode(
        "<|endoftext|>a"
    )
    assert post("/tokenize", prompt="")["tokens"] == []
    info = httpx.get(f"{live.url}/tokenizer_info").json()
    assert (info["eos_token"], info["chat_template"]) == ("<|endoftext|>", None)


def chaos(number: int) -> str:
    kinds = [("disconnect", 10), ("malformed", 5), ("too long", 2), ("right", 83)]
    names, weights = zip(*kinds, strict=True)
    return random.Random(f"chaos {number}").choices(names, weights)[0]


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_nothing_leaks_whatever_clients_do(live, expected, count):
    url = f"{live.url}/v1/completions"

    def resources():
        gc.collect()
        requests = sum(isinstance(x, Job | Request | Continuation) for x in gc.get_objects())
        return threading.active_count(), len(jax.live_arrays()), requests

    async def main(client):
        async def one(number):
            body, kind = random_body(number % REQUESTS), chaos(number)
            if kind == "disconnect":
                body |= dict(stream=bool(number % 2), max_tokens=80)
                soon = httpx.Timeout(0.05, pool=None)  # of the server, not of the pool
                try:
                    async with client.stream("POST", url, json=body, timeout=soon) as response:
                        async for _ in response.aiter_bytes():
                            break
                except httpx.TimeoutException:
                    pass
            elif kind == "malformed":
                content = malformed.ALL[number % len(malformed.ALL)]
                assert 400 <= (await client.post(url, content=content)).status_code < 500
            elif kind == "too long":
                response = await client.post(url, json=body | dict(max_tokens=127 + number))
                assert response.status_code == 400
            else:
                (choice,) = (await client.post(url, json=body)).json()["choices"]
                wanted = expected[number % REQUESTS]
                assert (choice["text"], choice["finish_reason"]) == (
                    wanted.text,
                    wanted.finish_reason,
                )

        await asyncio.gather(*(one(number) for number in range(count)))

    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "blocktx:slots_used")

    def run_until_idle():
        run(main)
        deadline = time.monotonic() + 60
        while any(live.metric(name) for name in names) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [live.metric(name) for name in names] == [0, 0, 0]

    run_until_idle()  # threads and buffers that are made once
    compiled, before = live.metric("blocktx:compilations_total"), resources()
    run_until_idle()
    assert live.metric("blocktx:compilations_total") == compiled
    assert resources() == before == (*before[:2], 0)
    assert httpx.get(f"{live.url}/health").status_code == 200


def long_body(**changes):
    return dict(prompt="a", max_tokens=120, temperature=1.0, seed=1, ignore_eos=True) | changes


def test_a_full_queue_says_when_to_come_back(engine):
    with served.serving(engine, queue=3, blocks_per_call=1) as live:
        url = f"{live.url}/v1/completions"

        async def main(client):
            posts = [client.post(url, json=long_body(seed=seed)) for seed in range(40)]
            return await asyncio.gather(*posts)

        answers = run(main)
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
        assert all(a.json()["error"]["type"] == "RateLimitError" for a in refused)
        rest = [answer for answer in answers if answer.status_code == 200]
        assert len(rest) + len(refused) == 40
        assert all(a.json()["usage"]["completion_tokens"] == 120 for a in rest)
        too_many = httpx.post(url, json=long_body(n=4))
        assert too_many.status_code == 400
        assert live.metric("vllm:num_requests_running") == 0


def test_a_request_that_takes_too_long_is_ended(engine, monkeypatch):
    start = ContinuousDecoder.start

    def slow(*args):  # 30 blocks take 3 s; the body alone has the whole second to arrive
        time.sleep(0.1)
        return start(*args)

    monkeypatch.setattr(ContinuousDecoder, "start", slow)
    with served.serving(engine, request_seconds=1, blocks_per_call=1) as live:
        url = f"{live.url}/v1/completions"
        answer = httpx.post(url, json=long_body(), timeout=30)
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "TimeoutError"
        text = httpx.post(url, json=long_body(stream=True), timeout=30).text
        *_, error, done = text.strip().split("\n\n")
        assert "took too long" in json.loads(error[6:])["error"]["message"]
        assert done == "data: [DONE]"
        assert live.metric("vllm:num_requests_waiting") == 0


def test_a_server_that_stops_finishes_what_it_accepted(engine):
    with served.serving(engine, blocks_per_call=1) as live:
        url = f"{live.url}/v1/completions"

        async def main(client):
            health = []

            async def stop():
                while not live.metric("vllm:num_requests_running"):
                    await asyncio.sleep(0.01)
                live.server.stop()
                await asyncio.sleep(0)
                while live.server._scheduler.accepting:
                    await asyncio.sleep(0.001)
                health.append((await client.get(f"{live.url}/health")).status_code)
                health.append((await client.post(url, json=long_body())).status_code)

            streams = [stream(client, url, long_body(seed=seed)) for seed in range(12)]
            *answers, _ = await asyncio.gather(*streams, stop())
            return answers, health

        answers, health = run(main)
    assert [reason for _, _, reason, _ in answers] == ["length"] * 12
    assert health == [503, 503]


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if messages | length > 3 %}{{ raise_exception('too many') }}{% endif %}assistant:"
)


def test_chat(engine):
    other = served.engine(
        served.model(), chat_template=TEMPLATE, special_tokens={"eos_token": "<|endoftext|>"}
    )
    with served.serving(other) as live:

        def post(**body):
            return httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=30)

        messages = [{"role": "user", "content": "the block"}]
        options = dict(max_tokens=9, seed=3, temperature=0.7)
        ids = other.tokenizer.encode("user: the block<|endoftext|>assistant:", special_tokens=True)
        assert other.tokenizer.end_id in ids
        wanted = other.generate([ids], max_new_tokens=9, seed=3, temperature=0.7)[0]
        answer = post(messages=messages, logprobs=True, top_logprobs=2, **options).json()
        assert answer["object"] == "chat.completion"
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": wanted}
        assert len(choice["logprobs"]["content"]) == 9
        assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
        parts = [{"role": "user", "content": [{"type": "text", "text": "the block"}]}]
        assert post(messages=parts, **options).json()["choices"][0]["message"]["content"] == wanted
        lines = post(messages=messages, stream=True, **options).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-2]]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta["content"] for delta in deltas) == wanted
        whole = post(messages=messages, seed=1, temperature=0)  # as many tokens as fit
        assert whole.json()["choices"][0]["finish_reason"] in ("length", "stop")
        for bad in ([], "a", [{"content": "a"}], messages * 4, [{"role": "user", "content": 3}]):
            assert post(messages=bad).status_code == 400


@pytest.mark.parametrize("placement", ["pad", "force"])
def test_prompts_are_scored_as_the_harness_does(engine, placement):
    other = served.engine(served.model(), random_padding=placement == "pad")
    scorer = PromptScorer(other, 3)
    rng = np.random.default_rng(0)
    for length in (2, 3, 4, 5, 30, 63, 64, 65, scorer.longest):
        tokens = rng.integers(0, 256, length).tolist()
        found = scorer.score(tokens)
        assert len(found.logprobs) == len(found.top) == length - 1
        known = 1 if placement == "pad" else 4
        if length <= known:
            continue
        (wanted,) = score(
            other.model,
            other.params,
            [(tokens[:known], tokens[known:])],
            placement=placement,
            pad_id=other.tokenizer.pad_id,
            batch_size=2,
        )
        new = slice(known - 1, None)
        np.testing.assert_allclose(found.logprobs[new], wanted.logprobs_J, atol=1e-5)
        likeliest = [x == top[0][1] for x, top in zip(found.logprobs, found.top, strict=True)]
        assert likeliest[new] == wanted.likeliest_J.tolist()


def test_echo(live, engine):
    def post(**body):
        answer = httpx.post(f"{live.url}/v1/completions", json=body, timeout=30).json()
        return answer["choices"][0], answer["usage"]

    text = "the block token"
    ids = engine.tokenizer.encode(text)
    choice, usage = post(prompt=text, max_tokens=0, echo=True, logprobs=1)
    assert (choice["text"], usage["completion_tokens"]) == (text, 0)
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert len(logprobs["tokens"]) == len(ids)
    assert logprobs["text_offset"] == [0, *np.cumsum([len(t) for t in logprobs["tokens"]])[:-1]]
    greedy = dict(max_tokens=5, temperature=0)
    choice, _ = post(prompt=text, echo=True, **greedy)
    assert choice["text"] == text + engine.generate(text, max_new_tokens=5, temperature=0)
    ids = ids[:1] * 5  # padded as for scoring: by three tokens
    choice, _ = post(prompt=ids, echo=True, logprobs=1, **greedy)
    # The tokens that were written are the likeliest, and those of a second pass say the same.
    top = choice["logprobs"]["top_logprobs"]
    chosen = choice["logprobs"]["token_logprobs"]
    assert [max(t.values()) for t in top[len(ids) :]] == chosen[len(ids) :]
    written = engine.generate([ids], max_new_tokens=5, temperature=0, return_logprobs=True)[0]
    again, _ = post(prompt=[*ids, *written.tokens], max_tokens=0, echo=True, logprobs=1)
    np.testing.assert_allclose(again["logprobs"]["token_logprobs"][1:], chosen[1:], atol=1e-5)
    choice, _ = post(prompt="a", max_tokens=0, echo=True)
    assert choice["text"] == "a"
