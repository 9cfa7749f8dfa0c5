"""Measured decoding: throughput and latency of models in turns, and the memory they need."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from blocktx import cost
from blocktx.benchmark.candidates import Candidate
from blocktx.benchmark.machine import MeasuredPeaks
from blocktx.config import ModelConfig
from blocktx.decode import (
    Prompts,
    Sampling,
    SamplingConfig,
    decode_blocks,
    generate,
    layout_prompts,
    prefill,
)
from blocktx.model import Model
from blocktx.progress_bar import ProgressBar

SETTINGS = {"prefill_heavy": (2048, 128), "decode_heavy": (128, 2048)}  # of the paper, section 3


@dataclasses.dataclass(frozen=True)
class Result:
    """One model at one batch size; times are medians of the repeats, in seconds."""

    model: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float  # generated ones, prefill included
    prefill_seconds: float
    seconds_to_first_token: float
    seconds: float  # for all of it
    # Of `seconds`, by the measured peaks of the machine. Above 1 if weights stay in the processor's
    # cache: the roofline counts them as read from memory.
    roofline_share: float
    bytes_per_sample: float  # of the compiled programs, beside the parameters
    counted_bytes_per_sample: int  # cache and logits
    loss: float | None


def decode_throughput(
    models: list[tuple[Model, dict]],
    *,
    batch_size: int,
    prompt_tokens: int | Sequence[int],
    new_tokens: int,
    repeats: int = 3,
) -> list[float]:
    """Return the generated tokens per second of each model, prefill included.

    All rows are generated to their last token. Models take turns, so a change in the machine's
    speed affects all of them. The first round compiles and is not counted; the result is the median
    of the others.

    Args:
      models: modules and parameters.
      batch_size: rows.
      prompt_tokens: length of the prompts, of all models or of each.
      new_tokens: tokens to generate in each row.
      repeats: counted rounds.
    """
    if isinstance(prompt_tokens, int):
        prompt_tokens = [prompt_tokens] * len(models)
    runs = [
        functools.partial(_generate, model, params, batch_size, prompt, new_tokens)
        for (model, params), prompt in zip(models, prompt_tokens, strict=True)
    ]
    *_, seconds = _in_turns(runs, repeats)
    return [batch_size * new_tokens / each for each in seconds]


def measure(candidates: Sequence[Candidate], peaks: MeasuredPeaks, **options: Any) -> list[Result]:
    """Return the last results of `running_measure`, which takes the same arguments."""
    *_, results = running_measure(candidates, peaks, **options)
    return results


def running_measure(
    candidates: Sequence[Candidate],
    peaks: MeasuredPeaks,
    *,
    batch_sizes: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int = 3,
    bar: ProgressBar | None = None,
) -> Iterator[list[Result]]:
    """Yield a result for each candidate after every counted round of `decode_throughput`.

    All models decode greedily through one engine to their last token. Time to the first token is
    that of a call for one token.

    Args:
      candidates: the models.
      peaks: of the machine, for the roofline.
      batch_sizes: one for each candidate.
      prompt_tokens: length of the prompts.
      new_tokens: tokens to generate in each row.
      repeats: counted rounds.
      bar: is moved by `(repeats + 1) * runs_per_round(candidates)`.
    """
    runs = []
    for candidate, batch_size in zip(candidates, batch_sizes, strict=True):
        model, params = candidate.model, candidate.params
        shape = (model, params, batch_size, prompt_tokens)
        runs += [
            functools.partial(_prefill_alone, *shape, new_tokens),
            functools.partial(_generate, *shape, 1),
            functools.partial(_generate, *shape, new_tokens),
        ]
    memory: list[float] = []
    for seconds in _in_turns(runs, repeats, bar):
        memory = memory or [
            program_bytes(candidate, size, prompt_tokens, new_tokens)
            for candidate, size in zip(candidates, batch_sizes, strict=True)
        ]
        results = []
        for i, (candidate, batch_size) in enumerate(zip(candidates, batch_sizes, strict=True)):
            config = candidate.model.config
            prefill_seconds, to_first, whole = seconds[3 * i : 3 * i + 3]
            shape = (batch_size, prompt_tokens, new_tokens)
            results.append(
                Result(
                    model=candidate.name,
                    batch_size=batch_size,
                    prompt_tokens=prompt_tokens,
                    new_tokens=new_tokens,
                    tokens_per_second=batch_size * new_tokens / whole,
                    prefill_seconds=prefill_seconds,
                    seconds_to_first_token=to_first,
                    seconds=whole,
                    roofline_share=_roofline_seconds(config, peaks, *shape) / whole,
                    bytes_per_sample=memory[i] / batch_size,
                    counted_bytes_per_sample=counted_bytes(config, prompt_tokens, new_tokens),
                    loss=candidate.loss,
                )
            )
        yield results


def runs_per_round(candidates: Sequence[Candidate]) -> int:
    """Return the number of timed calls in a round of `running_measure`."""
    return 3 * len(candidates)


def largest_batch(
    candidate: Candidate, limit_bytes: float, *, prompt_tokens: int, new_tokens: int
) -> int:
    """Return the largest batch, a power of two, that fits into `limit_bytes`.

    Counted are the parameters and what the compiled programs need. Nothing is run.

    Raises:
      ValueError: not even one row fits.
    """
    held = _bytes(candidate.params)

    def needed(batch_size: int) -> float:
        return held + program_bytes(candidate, batch_size, prompt_tokens, new_tokens)

    small = needed(1)
    if small > limit_bytes:
        raise ValueError(
            f"memory_limit: {candidate.name} needs {small / 2**30:.2f} GiB for a batch of 1, and "
            f"{limit_bytes / 2**30:.2f} GiB is given; use more, or a shorter prompt or answer"
        )
    # Every row needs at least its counted bytes: an upper bound to start from.
    a_row = counted_bytes(candidate.model.config, prompt_tokens, new_tokens)
    most = int(limit_bytes - held) // a_row
    batch_size = 1 << (most.bit_length() - 1)
    while batch_size > 1 and needed(batch_size) > limit_bytes:
        batch_size //= 2
    return batch_size


def program_bytes(
    candidate: Candidate, batch_size: int, prompt_tokens: int, new_tokens: int
) -> int:
    """Return the bytes that decoding a batch needs beside the parameters, of its larger program."""
    net, params = candidate.model, candidate.params
    prompts = _place(net.config, batch_size, prompt_tokens, new_tokens)
    state = jax.eval_shape(functools.partial(prefill, net), params, prompts)
    sampling, number = (
        Sampling.create(SamplingConfig(temperature=0), rows=len(prompts.end_B)),
        np.int32(0),
    )

    def needed(program: jax.stages.Lowered, *inputs: Any) -> int:
        memory = program.compile().memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return _bytes(inputs) + outputs + memory.temp_size_in_bytes

    return max(
        needed(prefill.lower(net, params, prompts), prompts),
        needed(decode_blocks.lower(net, params, state, sampling, number, number), state, sampling),
    )


def counted_bytes(config: ModelConfig, prompt_tokens: int, new_tokens: int) -> int:
    """Return the bytes of a row's cache and of one token's logits."""
    slots = _place(config, 1, prompt_tokens, new_tokens).cache_blocks
    return cost.cache_bytes(config, slots) + cost.logits_bytes(config, 1)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _roofline_seconds(
    config: ModelConfig, peaks: MeasuredPeaks, batch_size: int, prompt_tokens: int, new_tokens: int
) -> float:
    prompt, new = (-(-tokens // config.block_length) for tokens in (prompt_tokens, new_tokens))
    first = peaks.seconds(cost.extend(config, batch_size, prompt, prompt))
    return first + new * peaks.seconds(cost.decode_block(config, batch_size, prompt + new))


def _prompts(config: ModelConfig, batch_size: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, tokens))


def _generate(
    model: Model, params: dict, batch_size: int, prompt_tokens: int, new_tokens: int
) -> None:
    tokens_BxT = _prompts(model.config, batch_size, prompt_tokens)
    generate(
        model,
        params,
        tokens_BxT,
        np.ones_like(tokens_BxT),
        max_new_tokens=new_tokens,
        temperature=0,
    )


def _prefill_alone(
    model: Model, params: dict, batch_size: int, prompt_tokens: int, new_tokens: int
) -> None:
    prompts = _place(model.config, batch_size, prompt_tokens, new_tokens)
    jax.block_until_ready(prefill(model, params, prompts))


def _place(config: ModelConfig, batch_size: int, prompt_tokens: int, new_tokens: int) -> Prompts:
    tokens_BxT = _prompts(config, batch_size, prompt_tokens)
    return layout_prompts(
        tokens_BxT,
        np.ones_like(tokens_BxT),
        config,
        max_new_tokens=new_tokens,
        placement="pad",
        pad_id=config.pad_id,
    )


def _in_turns(
    runs: Sequence[Callable[[], None]], repeats: int, bar: ProgressBar | None = None
) -> Iterator[list[float]]:
    """Yield the median seconds of each run so far, after each round but the first (it compiles)."""
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 1):
        for run, measured in zip(runs, seconds, strict=True):
            begin = time.perf_counter()
            run()
            measured.append(time.perf_counter() - begin)
            if bar is not None:
                bar.update()
        if number:
            yield [statistics.median(measured[1:]) for measured in seconds]
