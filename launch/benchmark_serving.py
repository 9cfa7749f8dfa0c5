"""Compare continuous decoding with static batches, for requests of mixed lengths, in one run.

python launch/benchmark_serving.py --config=configs/paper.py:block_170m --rows=32 --requests=128

Prints tokens per second of
    equal       batches whose rows all have the mean prompt and answer length: an upper bound
    continuous  the requests through `ContinuousDecoder`, as `launch/serve.py` decodes them
    static      the same requests in batches of --rows, each as long as its longest row
and the ratios. Answers have geometric lengths, prompts are spread evenly. Weights are random: speed
does not depend on them. Programs are compiled before anything is measured.
"""

import dataclasses
import json
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from blocktx import command_line
from blocktx.benchmark import equal_vanilla, random_model
from blocktx.config import ModelConfig
from blocktx.decode import ContinuousDecoder, SamplingConfig, generate, seed_words

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
    runs = _runs(config, prompts, answers)
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for _ in range(_REPEATS.value):
        for name, run in runs.items():
            begin = time.perf_counter()
            tokens = run()
            seconds[name].append((time.perf_counter() - begin) / tokens)
    speed = {name: 1 / float(np.median(values)) for name, values in seconds.items()}
    found = {
        "model": _CONFIG.value if not _VANILLA.value else f"vanilla of {_CONFIG.value}",
        "device": jax.devices()[0].device_kind,
        "rows": _ROWS.value,
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "continuous_over_equal": round(speed["continuous"] / speed["equal"], 3),
        "continuous_over_static": round(speed["continuous"] / speed["static"], 3),
    }
    print(json.dumps(found, indent=2))


def _runs(
    config: ModelConfig, prompts: list[list[int]], answers: np.ndarray
) -> dict[str, Callable[[], int]]:
    """Return functions that decode all requests and return the number of tokens."""
    model, params = random_model(config)
    rows, greedy = _ROWS.value, SamplingConfig(temperature=0)

    def batch(prompts: list[list[int]], answers: list[int]) -> None:
        longest = max(map(len, prompts))
        tokens = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = np.arange(longest)[::-1] < np.array([[len(prompt)] for prompt in prompts])
        generate(model, params, tokens, mask, max_new_tokens=answers, sampling=greedy)

    def equal() -> int:
        length, answer = round(np.mean([len(p) for p in prompts])), round(answers.mean())
        batch([[1] * length] * rows, [answer] * rows)
        return rows * answer

    def static() -> int:
        for start in range(0, len(prompts), rows):
            batch(prompts[start : start + rows], answers[start : start + rows].tolist())
        return int(answers.sum())

    context = _PROMPT_HIGH.value + _ANSWER_MAX.value + config.block_length
    decoder = ContinuousDecoder(
        model,
        params,
        rows=rows,
        context=min(context, config.context_length),
        blocks_per_call=_BLOCKS_PER_CALL.value,
    )
    decoder.compile()
    seed_2 = seed_words(0, 1)[0]

    def continuous() -> int:
        requests = [
            decoder.request(prompt, max_new_tokens=int(answer), sampling=greedy, seed_2=seed_2)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return sum(len(update.tokens) for new in decoder.run(requests) for update in new)

    return {"equal": equal, "continuous": continuous, "static": static}


if __name__ == "__main__":
    command_line.run(main, required=())
