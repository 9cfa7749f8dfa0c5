"""Compare continuous decoding with static batches, for requests of mixed lengths, in one run.

python launch/benchmark_serving.py --config=configs/paper.py:block_170m --rows=32 --requests=128

Prints tokens per second of
    equal       a batch whose answers all have the mean length, and prompts the power of two nearest
                to theirs, which `generate` does not pad
    continuous  the requests through `ContinuousDecoder`, as `launch/serve.py` decodes them
    saturated   the same from the first tokens until no request waits for a row
    static      the same requests in batches of --rows, each as long as its longest row
and the ratios, on a CPU also by CPU seconds, which other processes do not take. Answers have
geometric lengths, prompts are spread evenly. Weights are random: speed does not depend on them.
Programs are compiled before anything is measured.
"""

import collections
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from blocktx import command_line
from blocktx.benchmark import equal_vanilla, random_model
from blocktx.config import ModelConfig
from blocktx.decode import (
    ContinuousDecoder,
    Sampling,
    SamplingConfig,
    bucket,
    decode_blocks,
    generate,
    layout_prompts,
    prefill,
    seed_words,
)

_CONFIG = flags.DEFINE_string("config", "configs/paper.py:block_170m", "FILE.py or FILE.py:NAME.")
_VANILLA = flags.DEFINE_boolean("vanilla", False, "Measure the vanilla model of equal size.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and cache.")
_ROWS = flags.DEFINE_integer("rows", 32, "Requests decoded at a time.", lower_bound=1)
_REQUESTS = flags.DEFINE_integer("requests", 128, "Requests, all waiting at the start.")
_PROMPT_LOW = flags.DEFINE_integer("prompt_low", 16, "Fewest tokens of a prompt.", lower_bound=1)
_PROMPT_HIGH = flags.DEFINE_integer("prompt_high", 1024, "Most tokens of a prompt.")
_ANSWER_MEAN = flags.DEFINE_integer("answer_mean", 64, "Mean of the geometric answer length.")
_ANSWER_MAX = flags.DEFINE_integer("answer_max", 256, "Most tokens of an answer.")
_BLOCKS_PER_CALL = flags.DEFINE_integer("blocks_per_call", None, "Default: 16 tokens of each row.")
_REPEATS = flags.DEFINE_integer("repeats", 1, "Rounds, in which the three take turns.")
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts and lengths.")


def main() -> None:
    config = command_line.read_config(_CONFIG.value).model
    if _VANILLA.value:
        config = equal_vanilla(config)
    config = dataclasses.replace(config, param_dtype=_DTYPE.value, compute_dtype=_DTYPE.value)
    rng = np.random.default_rng(_SEED.value)
    lengths = rng.integers(_PROMPT_LOW.value, _PROMPT_HIGH.value + 1, _REQUESTS.value)
    answers = np.minimum(rng.geometric(1 / _ANSWER_MEAN.value, _REQUESTS.value), _ANSWER_MAX.value)
    prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]
    runs = _runs(config, prompts, answers.tolist())
    speeds = collections.defaultdict(list)  # by name: tokens per second, and per CPU second
    for _ in range(_REPEATS.value):
        for run in runs:
            for name, (tokens, seconds) in run().items():
                speeds[name].append(tokens / np.array(seconds))
                print(name, *speeds[name][-1].round(1), file=sys.stderr, flush=True)
    found = {
        "model": _CONFIG.value if not _VANILLA.value else f"vanilla of {_CONFIG.value}",
        "device": jax.devices()[0].device_kind,
        "rows": _ROWS.value,
        "requests": _REQUESTS.value,
    }
    units = ["second", "cpu_second"] if jax.default_backend() == "cpu" else ["second"]
    for index, unit in enumerate(units):
        speed = {
            name: float(np.median([x[index] for x in values])) for name, values in speeds.items()
        }
        found[f"per_{unit}"] = {
            "tokens": {name: round(value, 1) for name, value in speed.items()},
            "saturated_over_equal": round(speed["saturated"] / speed["equal"], 3),
            "saturated_over_static": round(speed["saturated"] / speed["static"], 3),
            "continuous_over_static": round(speed["continuous"] / speed["static"], 3),
        }
    print(json.dumps(found, indent=2))


def _clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


# By name: tokens, and the seconds and CPU seconds that they took.
_Found = dict[str, tuple[int, np.ndarray]]


def _runs(
    config: ModelConfig, prompts: list[list[int]], answers: list[int]
) -> list[Callable[[], _Found]]:
    """Return functions that decode, with all programs compiled."""
    model, params = random_model(config)
    rows, greedy = _ROWS.value, SamplingConfig(temperature=0)

    def pad(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        longest = max(map(len, prompts))
        tokens_BxT = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        return tokens_BxT, np.arange(longest)[::-1] < np.array([[len(p)] for p in prompts])

    block, length = config.block_length, np.mean([len(p) for p in prompts])
    power = block * bucket(round(0.75 * length / block), block, config.blocks)
    equal_batch = pad([[1] * power] * rows), [round(np.mean(answers))] * rows
    static_batches = [
        (pad(prompts[start : start + rows]), answers[start : start + rows])
        for start in range(0, len(prompts), rows)
    ]

    def compile_batches() -> None:
        seen = set()
        for (tokens_BxT, mask_BxT), budgets in [equal_batch, *static_batches]:
            laid_out = layout_prompts(
                tokens_BxT,
                mask_BxT,
                config,
                max_new_tokens=budgets,
                placement="pad",
                pad_id=config.pad_id,
            )
            shape = laid_out.tokens_BxNxK.shape, laid_out.cache_blocks
            if shape not in seen:
                seen.add(shape)
                sampling = Sampling.create(greedy, rows=len(laid_out.end_B))
                state = prefill(model, params, laid_out)
                state = decode_blocks(
                    model, params, state, sampling, np.int32(0), np.int32(config.pad_id)
                )
                jax.block_until_ready(state)

    def run_batches(name: str, batches: list) -> _Found:
        begin = _clocks()
        for (tokens_BxT, mask_BxT), budgets in batches:
            options = dict(max_new_tokens=budgets, sampling=greedy)
            generate(model, params, tokens_BxT, mask_BxT, **options)
        return {name: (sum(sum(budgets) for _, budgets in batches), _clocks() - begin)}

    context = _PROMPT_HIGH.value + _ANSWER_MAX.value + config.block_length
    decoder = ContinuousDecoder(
        model,
        params,
        rows=rows,
        context=min(context, config.context_length),
        blocks_per_call=_BLOCKS_PER_CALL.value,
    )
    decoder.compile()
    compile_batches()

    def continuous() -> _Found:
        requests = [
            decoder.request(p, max_new_tokens=n, sampling=greedy, seed_2=seed_words(0, 1)[0])
            for p, n in zip(prompts, answers, strict=True)
        ]
        tokens, waiting, begin, found = 0, set(requests), _clocks(), {}
        first = None
        for updates in decoder.run(requests):
            tokens += sum(len(update.tokens) for update in updates)
            waiting -= {update.request for update in updates}
            found["continuous"] = tokens, _clocks() - begin
            if first is None:
                first = found["continuous"]
            elif waiting:
                found["saturated"] = tuple(
                    x - y for x, y in zip(found["continuous"], first, strict=True)
                )
        return found

    return [
        functools.partial(run_batches, "equal", [equal_batch]),
        continuous,
        functools.partial(run_batches, "static", static_batches),
    ]


if __name__ == "__main__":
    command_line.run(main, required=())
