"""Load a server that speaks the OpenAI API, and report throughput and latency.

python launch/load_test.py --url=http://127.0.0.1:8000/v1 --rate=1,2,4 --output=load
python launch/load_test.py --concurrency=32 --requests=200

Requests arrive at random (Poisson) at each --rate, or a fixed number is kept in flight
(--concurrency). Prompts are random token ids, of lengths spread evenly over --prompt_tokens, by
default as long as the server's context allows, up to 1,024. The answers have geometric lengths of
mean --answer_mean and do not end earlier. Or --workload has both:
a JSON object with "prompt" and "max_tokens" on each line.

Needs httpx, of the extra `serve`. Ctrl-C prints and writes what was measured so far.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from blocktx import command_line, plotting
from blocktx.files import write_atomic
from blocktx.progress_bar import ProgressBar, until_interrupted

_URL = flags.DEFINE_string("url", "http://127.0.0.1:8000/v1", "The API's base address.")
_MODEL = flags.DEFINE_string("model", None, "Model to ask for. Default: the server's first.")
_RATE = flags.DEFINE_list("rate", [], "Requests per second, one or more numbers, in turn.")
_CONCURRENCY = flags.DEFINE_list("concurrency", [], "Requests kept in flight, in place of a rate.")
_REQUESTS = flags.DEFINE_integer("requests", 100, "Requests at each rate.", lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_string(
    "prompt_tokens", None, "Range of prompt lengths, as in 16-1024."
)
_ANSWER_MEAN = flags.DEFINE_float("answer_mean", 64, "Mean tokens of an answer.", lower_bound=1)
_ANSWER_MAX = flags.DEFINE_integer("answer_max", 256, "Most tokens of an answer.", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 256, "Random ids are below this.", lower_bound=1)
_WORKLOAD = flags.DEFINE_string("workload", None, "JSON lines with prompt and max_tokens.")
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts, lengths and arrivals.")
_TIMEOUT = flags.DEFINE_float("timeout", 600, "Seconds until a request is given up.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for load_test.json and load_test.png.")
_LABEL = flags.DEFINE_string("label", "", "Name of the server in the plot.")
_AGAINST = flags.DEFINE_multi_string(
    "against", [], "load_test.json of another server, to plot beside this one; may be repeated."
)

_PERCENTILES = (50, 95, 99)
_LONGEST_PROMPT = 1024  # tokens, unless --prompt_tokens is given
_HEADER = (
    f"{'load':>12} {'done':>6} {'errors':>6} {'req/s':>8} {'tokens/s':>9}  "
    f"{'first token, ms':^23}  {'between tokens, ms':^23}\n"
    f"{'':>46}  {'p50':>7} {'p95':>7} {'p99':>7}  {'p50':>7} {'p95':>7} {'p99':>7}"
)


@dataclasses.dataclass
class Outcome:
    """One request: seconds from its start, or an error."""

    first: float = math.nan  # to the first token
    between: float = math.nan  # between tokens: from the first event to the last, per token
    last: float = math.nan
    tokens: int = 0
    error: str = ""
    said: str = ""  # by the server, of the error


def workload(count: int, longest: int) -> list[dict[str, Any]]:
    """Return the bodies of `count` requests, whose prompts have `longest` tokens at most.

    Raises:
      ValueError: a flag or a line of the workload is invalid.
    """
    if _WORKLOAD.value:
        lines = pathlib.Path(_WORKLOAD.value).read_text().splitlines()
        bodies = [json.loads(line) for line in lines if line.strip()]
        for number, body in enumerate(bodies, 1):
            if not isinstance(body, dict) or not {"prompt", "max_tokens"} <= body.keys():
                raise ValueError(f"--workload: line {number} lacks prompt or max_tokens")
        if not bodies:
            raise ValueError(f"--workload: {_WORKLOAD.value} is empty")
        return [bodies[i % len(bodies)] for i in range(count)]
    given = _PROMPT_TOKENS.value or f"{min(16, longest)}-{longest}"
    low, _, high = given.partition("-")
    try:
        low, high = int(low), int(high or low)
    except ValueError:
        low = high = 0
    if not 1 <= low <= high:
        raise ValueError(f"--prompt_tokens: got {given!r}, expected LOW-HIGH, as in 16-1024")
    rng = np.random.default_rng(_SEED.value)
    return [
        dict(
            prompt=rng.integers(0, _VOCAB_SIZE.value, rng.integers(low, high + 1)).tolist(),
            max_tokens=min(int(rng.geometric(1 / _ANSWER_MEAN.value)), _ANSWER_MAX.value),
            seed=number,
            ignore_eos=True,
        )
        for number in range(count)
    ]


async def request(client: Any, body: dict[str, Any]) -> Outcome:
    """Stream one completion."""
    options = dict(model=_MODEL.value, stream=True, stream_options={"include_usage": True})
    begin, outcome, before_first, done = time.perf_counter(), Outcome(), 0, False
    first = last = math.nan
    try:
        async with client.stream("POST", "/completions", json=body | options) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Outcome(error=f"HTTP {response.status_code}", said=_message(text))
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return Outcome(error=str(chunk["error"].get("type")))
                if chunk.get("choices"):
                    last = time.perf_counter() - begin
                    if math.isnan(first):
                        first = last
                    before_first += 1
                elif usage := chunk.get("usage"):
                    outcome.tokens = usage["completion_tokens"]
    except Exception as error:
        return Outcome(error=type(error).__name__)
    if not done or math.isnan(first):
        return Outcome(error="incomplete stream")
    outcome.first, outcome.last = first, last
    if before_first > 1:  # events bring several tokens: those of the first count as one event's
        outcome.between = (last - first) / (outcome.tokens * (before_first - 1) / before_first)
    return outcome


def _message(body: str) -> str:
    """Return the message of an error, of at most 300 characters."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        body = str(json.loads(body)["error"]["message"])
    return body if len(body) <= 300 else f"{body[:300]}..."


async def run(load: float, poisson: bool, longest: int) -> tuple[list[Outcome], float, bool]:
    """Return the outcomes at one rate or concurrency, and the seconds that they took.

    The last is False if Ctrl-C came; the outcomes are then those of the requests that had ended.
    """
    import httpx

    bodies = workload(_REQUESTS.value, longest)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    free = asyncio.Semaphore(len(bodies) if poisson else int(load))
    rng = np.random.default_rng(_SEED.value)
    delays = rng.exponential(1 / load, len(bodies)).cumsum() if poisson else np.zeros(len(bodies))
    outcomes, finished = [], True
    async with httpx.AsyncClient(
        base_url=_URL.value.rstrip("/"), timeout=_TIMEOUT.value, limits=limits
    ) as client:
        begin = time.perf_counter()
        with ProgressBar(total=len(bodies), desc="load", unit=" requests") as bar:

            async def one(body: dict[str, Any], delay: float) -> None:
                await asyncio.sleep(max(0, delay - (time.perf_counter() - begin)))
                async with free:
                    outcomes.append(await request(client, body))
                bar.update()

            try:
                await asyncio.gather(*map(one, bodies, delays))
            except asyncio.CancelledError:  # by asyncio.run, at Ctrl-C
                finished = False
        return outcomes, time.perf_counter() - begin, finished


def summary(load: str, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return the figures of one load; times are in milliseconds."""
    right = [outcome for outcome in outcomes if not outcome.error]

    def percentiles(name: str) -> dict[str, float | None]:
        values = [1000 * getattr(outcome, name) for outcome in right]
        values = [value for value in values if not math.isnan(value)]
        return {
            f"p{p}": round(float(np.percentile(values, p)), 2) if values else None
            for p in _PERCENTILES
        }

    return {
        "load": load,
        "requests": len(right),
        "errors": dict(collections.Counter(o.error for o in outcomes if o.error)),
        "said": {o.error: o.said for o in outcomes if o.said},
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(right) / seconds, 3),
        "tokens_per_second": round(sum(outcome.tokens for outcome in right) / seconds, 2),
        "first_token_ms": percentiles("first"),
        "between_tokens_ms": percentiles("between"),
        "last_token_ms": percentiles("last"),
    }


def table_row(found: dict[str, Any]) -> str:
    """Return a row below `_HEADER`."""

    def times(name: str) -> str:
        values = (found[name][f"p{p}"] for p in _PERCENTILES)
        return " ".join(f"{'-' if value is None else f'{value:.1f}':>7}" for value in values)

    return (
        f"{found['load']:>12} {found['requests']:>6} {sum(found['errors'].values()):>6} "
        f"{found['requests_per_second']:>8.2f} {found['tokens_per_second']:>9.1f}  "
        f"{times('first_token_ms')}  {times('between_tokens_ms')}"
    )


def plot(servers: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Plot the time to the first token against throughput, a line for each server."""
    figure, axes = plotting.new_figure(
        "Each point is one load", "tokens per second", "time to the first token, p95 (ms)"
    )
    named = []
    for i, (label, found) in enumerate(servers.items()):
        points = sorted(
            (one["tokens_per_second"], one["first_token_ms"]["p95"], one["load"])
            for one in found
            if one["first_token_ms"]["p95"] is not None
        )
        if points:
            x, y, _ = zip(*points, strict=True)
            style = plotting.line_style(i)
            plotting.draw_line(axes, x, y, label=label, **style)
            named += [(*point, style["color"]) for point in points]
    axes.margins(x=0.1)  # room for names
    axes.set_ylim(0, 1.2 * max((y for _, y, _, _ in named), default=1))
    plotting.plain_axis(axes.xaxis)
    plotting.plain_axis(axes.yaxis)
    plotting.legend(axes)
    plotting.label_points(axes, named)
    plotting.save(figure, path)


def _loads() -> list[tuple[float, bool]]:
    """Return each load of the flags, and whether it is a rate. Raise a ValueError if one is bad."""
    loads = []
    given = [(rate, True) for rate in _RATE.value] + [(n, False) for n in _CONCURRENCY.value]
    for text, poisson in given or [("8", False)]:
        try:
            load = float(text) if poisson else int(text)
        except ValueError:
            load = 0
        if not 0 < load < math.inf:
            flag = "rate" if poisson else "concurrency"
            raise ValueError(f"--{flag}: got {text!r}, must be greater than 0")
        loads.append((load, poisson))
    return loads


def _measured(loads: Sequence[tuple[float, bool]], longest: int) -> Iterator[list[dict[str, Any]]]:
    """Print the figures of each load, and yield those of all so far."""
    results = []
    for load, poisson in loads:
        outcomes, seconds, finished = asyncio.run(run(load, poisson, longest))
        if outcomes:
            name = f"{load:g}/s" if poisson else f"{load} at once"
            results.append(summary(name, outcomes, seconds))
            print(table_row(results[-1]), flush=True)
        yield results
        if not finished:
            raise KeyboardInterrupt


def main() -> None:
    import httpx

    loads = _loads()
    try:
        models = httpx.get(f"{_URL.value.rstrip('/')}/models", timeout=10).json()
        served = {model["id"]: model for model in models["data"]}
        name = _MODEL.value or next(iter(served))
    except (httpx.HTTPError, ValueError, LookupError, StopIteration) as error:
        raise ValueError(f"--url: {_URL.value} does not answer /models: {error}") from None
    flags.FLAGS.model = name
    context = served.get(name, {}).get("max_model_len") or math.inf
    longest = max(1, min(_LONGEST_PROMPT, context - _ANSWER_MAX.value))
    workload(1, longest)  # raises before the header
    print(_HEADER, flush=True)
    results, finished = until_interrupted(_measured(loads, longest), lambda _: None)
    if not finished:
        print("interrupted: of the requests until then")
    errors = collections.Counter()
    for found in results:
        errors.update(found["errors"])
    if errors:
        print("errors: " + ", ".join(f"{count} {name}" for name, count in errors.items()))
        said = collections.ChainMap(*(found["said"] for found in results))
        for name, text in said.items():
            print(f"{name}: {text}")
    if _OUTPUT.value and results:
        folder = pathlib.Path(_OUTPUT.value)
        label = _LABEL.value or _MODEL.value
        whole = {
            "label": label,
            "url": _URL.value,
            "seed": _SEED.value,
            "loads": results,
            "finished": finished,
        }
        write_atomic(folder / "load_test.json", json.dumps(whole, indent=2) + "\n")
        servers = {label: results}
        for path in _AGAINST.value:
            other = json.loads(pathlib.Path(path).read_text())
            servers[other["label"]] = other["loads"]
        plot(servers, folder / "load_test.png")
        print(folder / "load_test.json", folder / "load_test.png")
    if not finished:
        raise KeyboardInterrupt
    if not any(found["requests"] for found in results):
        command_line.fail("no request was answered", code=1)


if __name__ == "__main__":
    command_line.run(main, required=())
