"""Checks of one accelerator: peaks, formulations, a training step, decoding, throughput.

Each section is run on its own: an error in one is recorded, and the others still run.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blocktx.benchmark.accelerator_formulations import compare_formulations, random_batch
from blocktx.benchmark.candidates import Candidate, equal_vanilla, random_model, with_room
from blocktx.benchmark.machine import MeasuredPeaks, measure_machine
from blocktx.benchmark.measure import measure
from blocktx.chips import find_chip
from blocktx.config import BlockConfig, RunConfig
from blocktx.cost import train_step as train_step_cost
from blocktx.decode import generate
from blocktx.model import Model, build, init_params, next_logits
from blocktx.parallel import create_mesh

_PACKAGES = ("jax", "jaxlib", "flax", "blocktx", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
_LIBRARIES = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cublas", "nvidia-nccl-cu13")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the checks."""

    formulations: tuple[str, ...] = ()  # fields to compare; none: all
    matrix: int = 8192  # rows and columns
    read_bytes: int = 2**30
    batch_size: int = 8  # of the training step
    steps: int = 10
    rows: int = 4  # of prompts, to compare decoding with teacher forcing
    prompt_tokens: int = 512
    new_tokens: int = 128
    batch_sizes: tuple[int, ...] = (1, 32, 256)  # of the benchmark
    repeats: int = 3


def check_accelerator(
    config: RunConfig, small: BlockConfig, sizes: Sizes, said: Callable[[str], None]
) -> dict[str, Any]:
    """Return all findings about the default device, as JSON can hold them.

    Args:
      config: of a block model; its training step, decoding and throughput are measured.
      small: the model whose formulations are compared.
      sizes: of the checks.
      said: is called with the name of each section before it runs.

    Returns:
      `versions`, `seconds` by section, `errors` by section (tracebacks), and the results of the
      sections by name.
    """

    @functools.cache
    def peaks() -> MeasuredPeaks:
        return measure_machine(config.model.compute_dtype, sizes.matrix, sizes.read_bytes)

    sections: dict[str, Callable[[], Any]] = {
        "peaks": lambda: _peaks(peaks(), config.model.compute_dtype),
        "formulations": lambda: list(compare_formulations(small, sizes.formulations)),
        "training": lambda: _training(config, sizes),
        "decoding": lambda: _decoding(config.model, sizes),
        "benchmark": lambda: _benchmark(config.model, sizes, peaks()),
    }
    found: dict[str, Any] = {"versions": versions(), "seconds": {}, "errors": {}}
    for name, section in sections.items():
        said(name)
        begin = time.perf_counter()
        try:
            found[name] = section()
        except Exception:  # new devices fail in any way; the page has the traceback
            found[name], found["errors"][name] = None, traceback.format_exc()
        found["seconds"][name] = time.perf_counter() - begin
    return found


def passed(found: dict[str, Any]) -> bool:
    """Return whether no section failed and every comparison is within its tolerance."""
    if found["errors"]:
        return False
    compared = [*found["formulations"], found["training"], found["decoding"]]
    return all(each["ok"] for each in compared)


def versions() -> dict[str, Any]:
    """Return what a bug report needs: packages, Python, device and date."""
    device = jax.devices()[0]
    packages = {}
    for name in (*_PACKAGES, *_LIBRARIES):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": device.platform,
        "runtime": device.client.platform_version.splitlines()[0],
        "python": platform.python_version(),
        "packages": packages,
    }


def _peaks(peaks: MeasuredPeaks, dtype: str) -> dict[str, Any]:
    chip = find_chip(peaks.device)
    return {
        "dtype": dtype,
        "flops_per_second": peaks.flops_per_second,
        "bytes_per_second": peaks.bytes_per_second,
        "published_flops_per_second": chip and chip.flops,
        "published_bytes_per_second": chip and chip.hbm_bandwidth,
    }


def _training(config: RunConfig, sizes: Sizes) -> dict[str, Any]:
    """Train on one batch; its loss must fall."""
    from blocktx.train import create_state, train_step

    training = dataclasses.replace(config.training, batch_size=sizes.batch_size)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
    config = dataclasses.replace(config, training=training, optimizer=optimizer)
    batch, losses, seconds = random_batch(config.model, sizes.batch_size), [], []
    with jax.set_mesh(create_mesh(config.mesh, jax.devices()[:1])):
        model = build(config.model)
        state = create_state(config, model)
        for _ in range(sizes.steps + 1):  # the first compiles
            begin = time.perf_counter()
            state, metrics = train_step(state, batch, config, model)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - begin)
    best = float(np.median(seconds[1:]))
    chip = find_chip(jax.devices()[0].device_kind)
    flops = train_step_cost(config).flops / best
    return {
        "batch_size": sizes.batch_size,
        "losses": losses,
        "seconds": best,
        "compile_seconds": seconds[0],
        "tokens_per_second": sizes.batch_size * config.model.context_length / best,
        "flops_per_second": flops,
        "of_published_peak": chip and flops / chip.flops,
        "ok": bool(np.isfinite(losses).all() and losses[-1] < losses[0]),
    }


def _decoding(config: BlockConfig, sizes: Sizes) -> dict[str, Any]:
    """Compare greedy decoding with teacher forcing of the same tokens.

    The log-probabilities agree up to rounding. Where they do, so do the tokens, except for ties.
    """
    config = with_room(config, sizes.prompt_tokens + sizes.new_tokens)
    model = build(config)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    rows, length = sizes.rows, config.block_length
    prompts = random_batch(config, rows)["tokens"].reshape(rows, -1)[:, : sizes.prompt_tokens]
    options = dict(max_new_tokens=sizes.new_tokens, temperature=0, return_logprobs=True)
    tokens, logprobs = generate(model, params, prompts, np.ones_like(prompts), **options)
    tokens_BxNxK = np.concatenate([prompts, tokens], axis=1).reshape(rows, -1, length)
    forced = jax.jit(functools.partial(_teacher_forced, model))(params, tokens_BxNxK)
    chosen, most = (np.asarray(x).reshape(rows, -1)[:, -sizes.new_tokens :] for x in forced)
    difference = float(np.abs(chosen - logprobs).max())
    below = float((most - chosen).max())  # of the likeliest token, teacher-forced
    allowed = 1e-3 if config.compute_dtype == "float32" else 0.1
    return {
        "tokens": int(tokens.size),
        "same_tokens": float((chosen >= most).mean()),
        "largest_difference_of_logprobs": difference,
        "largest_distance_from_the_likeliest": below,
        "ok": difference < allowed and below < allowed,
    }


def _teacher_forced(
    model: Model, params: dict[str, Any], tokens_BxNxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return log-probabilities of the tokens of blocks 1 to N-1, and of the likeliest tokens."""
    mask = jnp.ones(tokens_BxNxK.shape, bool)
    logits_BxMxKxV = jax.nn.log_softmax(next_logits(model, params, tokens_BxNxK, mask))
    chosen = jnp.take_along_axis(logits_BxMxKxV, tokens_BxNxK[:, 1:, :, None], axis=-1)[..., 0]
    return chosen, logits_BxMxKxV.max(-1)


def _benchmark(config: BlockConfig, sizes: Sizes, peaks: MeasuredPeaks) -> list[dict[str, Any]]:
    """Measure the block model beside the vanilla model of as many parameters."""
    tokens = sizes.prompt_tokens + sizes.new_tokens
    models = {"block": config, "vanilla": equal_vanilla(config)}
    candidates = [Candidate(n, *random_model(with_room(m, tokens))) for n, m in models.items()]
    results = []
    for batch_size in sizes.batch_sizes:
        results += measure(
            candidates,
            peaks,
            batch_sizes=[batch_size] * len(candidates),
            prompt_tokens=sizes.prompt_tokens,
            new_tokens=sizes.new_tokens,
            repeats=sizes.repeats,
        )
    return [dataclasses.asdict(result) for result in results]
