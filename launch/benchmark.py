r"""Measure decoding: throughput, latency and memory, of a model and of one to compare it with.

python launch/benchmark.py --config=configs/paper.py:block_170m --against=vanilla_160m \
    --setting=prefill_heavy --batch_sizes=1,8,32 --json=benchmark.json

"of roofline" is the share of the speed that the measured peaks allow if every weight and the KV
cache are read from memory at every step. A model so small that these stay in the processor's cache
can exceed it.
"""

import os
from typing import Any

import jax
from absl import flags

from blocktx import command_line
from blocktx.benchmark import (
    SETTINGS,
    Candidate,
    equal_vanilla,
    largest_batch,
    measure_machine,
    plot,
    random_model,
    running_measure,
    runs_per_round,
    table,
    with_room,
    write_json,
)
from blocktx.checkpoint import load_params
from blocktx.config import ModelConfig, with_cache_dtype
from blocktx.model import QUANTIZATIONS, Model, build, for_decoding, quantize
from blocktx.parallel import prepare_gpu
from blocktx.progress_bar import ProgressBar, until_interrupted
from blocktx.train import read

_CONFIG = flags.DEFINE_string("config", None, "FILE.py or FILE.py:NAME; its model is measured.")
_AGAINST = flags.DEFINE_string(
    "against",
    None,
    "Also measure this: a name in the same file, FILE.py:NAME, or `vanilla` for the vanilla model "
    "of as many non-embedding parameters.",
)
_CHECKPOINT = flags.DEFINE_multi_string(
    "checkpoint",
    None,
    "Instead of --config: a run's folder, whose model is measured; may be repeated.",
)
_SETTING = flags.DEFINE_enum(
    "setting",
    "custom",
    [*SETTINGS, "custom"],
    "prefill_heavy: 2048 tokens in, 128 out. decode_heavy: 128 in, 2048 out. custom: any.",
)
_PROMPT = flags.DEFINE_integer("prompt", None, "Tokens in.", lower_bound=1)
_NEW = flags.DEFINE_integer("new", None, "Tokens out.", lower_bound=1)
_BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", None, "As in 1,8,32. None: the largest power of two that fits into the memory."
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Of which the median counts.", lower_bound=1)
_MEMORY_LIMIT = flags.DEFINE_float(
    "memory_limit", None, "GiB for parameters, cache and all else; None: what the device has."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of parameters, cache and computation; None: as in it."
)
_QUANTIZE = flags.DEFINE_enum(
    "quantize",
    None,
    QUANTIZATIONS,
    "Keep the kernels as integers. The roofline stays that of --dtype.",
)
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    None,
    ["int8"],
    "Keep keys and values of the cache as integers. The roofline follows. The loss of a run is "
    "without it; see launch/evaluate.py.",
)
_JSON = flags.DEFINE_string("json", None, "A file to write the results to.")
_PLOT = flags.DEFINE_string(
    "plot",
    None,
    "A PNG, SVG or PDF file: throughput by batch size, and by loss for several --checkpoint.",
)


def _tokens() -> tuple[int, int]:
    if _SETTING.value == "custom":
        if _PROMPT.value is None or _NEW.value is None:
            raise ValueError("--setting=custom needs --prompt and --new")
        return _PROMPT.value, _NEW.value
    prompt, new = SETTINGS[_SETTING.value]
    for name, given, fixed in [("prompt", _PROMPT.value, prompt), ("new", _NEW.value, new)]:
        if given not in (None, fixed):
            raise ValueError(
                f"--{name}: got {given}, but {_SETTING.value} is {fixed}; use --setting=custom"
            )
    return prompt, new


def _batch_sizes() -> list[int] | None:
    sizes = _BATCH_SIZES.value
    if sizes is not None and not (sizes and all(s.isdecimal() and int(s) > 0 for s in sizes)):
        raise ValueError(f"--batch_sizes: got {','.join(sizes)!r}, expected numbers, as in 1,8,32")
    return sizes and [int(size) for size in sizes]


def _memory_limit() -> float:
    if _MEMORY_LIMIT.value is not None:
        return _MEMORY_LIMIT.value * 2**30
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")  # a CPU


def _candidates(tokens: int) -> list[Candidate]:
    if _CHECKPOINT.value:
        if _AGAINST.value:
            raise ValueError("--against goes with --config; give a second --checkpoint instead")
        return [_saved(path, tokens) for path in _CHECKPOINT.value]
    path, _, name = _CONFIG.value.partition(":")
    specs = {name or path: command_line.read_config(_CONFIG.value).model}
    against = _AGAINST.value
    if against == "vanilla":
        if specs[name or path].kind == "vanilla":
            raise ValueError("--against=vanilla: the model of --config is a vanilla model itself")
        specs[against] = equal_vanilla(specs[name or path])
    elif against:
        other = against if ".py" in against else f"{path}:{against}"
        specs[against] = command_line.read_config(other, "--against").model
    return [
        Candidate(
            name,
            *_quantized(*random_model(_prepared(config, tokens))),
        )
        for name, config in specs.items()
    ]


def _saved(path: str, tokens: int) -> Candidate:
    model = load_params(path).config.model
    model = _prepared(model, tokens)
    loaded = load_params(path, model=model)
    run = loaded.path.parent.parent
    lines = read(run) if (run / "metrics.jsonl").exists() else []
    losses = [line["heldout/loss"] for line in lines if line.get("heldout/loss") is not None]
    separate = for_decoding(build(model), loaded.params)
    return Candidate(run.name, *_quantized(*separate), losses[-1] if losses else None)


def _prepared(config: ModelConfig, tokens: int) -> ModelConfig:
    return with_cache_dtype(with_room(config, tokens, _DTYPE.value), _CACHE_DTYPE.value)


def _quantized(model: Model, params: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    return model, quantize(model.config, params, _QUANTIZE.value)


def _rounds(candidates: list[Candidate], **shape: int) -> list[list[int]]:
    """Return the batch sizes to measure, one for each candidate in each round."""
    sizes = _batch_sizes()
    if sizes is not None:
        return [[size] * len(candidates) for size in sizes]
    limit = _memory_limit()
    with ProgressBar(total=len(candidates), desc="largest batch", unit=" models") as bar:
        largest = []
        for candidate in candidates:
            largest.append(largest_batch(candidate, limit, **shape))
            bar.update()
    return [largest]


def main() -> None:
    if bool(_CONFIG.value) == bool(_CHECKPOINT.value):
        command_line.fail("give either --config or --checkpoint; see --help")
    prompt, new = _tokens()
    _batch_sizes()
    prepare_gpu(training=False)
    candidates = _candidates(prompt + new)
    shape = dict(prompt_tokens=prompt, new_tokens=new)
    rounds = _rounds(candidates, **shape)
    peaks = measure_machine(candidates[0].model.config.compute_dtype)
    results, finished = [], True
    total = len(rounds) * (_REPEATS.value + 1) * runs_per_round(candidates)
    with ProgressBar(total=total, unit=" runs") as bar:
        for batch_sizes in rounds:
            running = running_measure(
                candidates, peaks, batch_sizes=batch_sizes, repeats=_REPEATS.value, bar=bar, **shape
            )
            found, finished = until_interrupted(running, lambda _: None, none=bool(results))
            results += found or []
            if not finished:
                break
    if not finished:
        print("interrupted: of the repeats until then")
    print(table(results, peaks))
    if _JSON.value:
        print(write_json(_JSON.value, results, peaks))
    if _PLOT.value:
        print(plot(_PLOT.value, results))
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    command_line.run(main, required=(), picture="plot")
