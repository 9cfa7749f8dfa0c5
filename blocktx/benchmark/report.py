"""Results of `blocktx.benchmark`: a table, a JSON file, a plot."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etils import epath

from blocktx import plotting
from blocktx.benchmark.machine import MeasuredPeaks
from blocktx.benchmark.measure import Result
from blocktx.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table(results: Sequence[Result], peaks: MeasuredPeaks) -> str:
    """Return a line for each model and batch size, and ratios to the first model."""
    width = max(len(result.model) for result in results)
    lines = [
        f"{peaks.device}: {peaks.flops_per_second / 1e9:.0f} GFLOP/s in a product of "
        f"{peaks.matrix}^3, {peaks.bytes_per_second / 1e9:.1f} GB/s in a sum of "
        f"{peaks.read_bytes >> 20} MB",
        f"prompt of {results[0].prompt_tokens} tokens, {results[0].new_tokens} new ones",
        f"{'model':{width}}  batch  prefill s  first token s  tokens/s  MB/sample  of roofline",
    ]
    for result in results:
        lines.append(
            f"{result.model:{width}}  {result.batch_size:>5}  {result.prefill_seconds:>9.3f}  "
            f"{result.seconds_to_first_token:>13.3f}  {result.tokens_per_second:>8.1f}  "
            f"{result.bytes_per_sample / 1e6:>9.1f}  {result.roofline_share:>11.0%}"
        )
    if _is_exceeded(results):
        lines.append(
            "more than 100%: the roofline counts every weight and all of the KV cache as read "
            "from memory; small ones stay in the processor's cache"
        )
    first = {r.batch_size: r for r in reversed(results) if r.model == results[0].model}
    for result in results:
        ours = first.get(result.batch_size)
        if ours is not None and ours.model != result.model:
            ratio = ours.tokens_per_second / result.tokens_per_second
            lines.append(f"batch {result.batch_size}: {ours.model} is {ratio:.1f}x {result.model}")
    return "\n".join(lines)


def write_json(
    path: str | os.PathLike[str], results: Sequence[Result], peaks: MeasuredPeaks
) -> pathlib.Path:
    """Write `{"machine": {...}, "results": [{...}, ...]}`, and return the path."""
    out = {
        "machine": peaks._asdict(),
        "results": [dataclasses.asdict(result) for result in results],
    }
    write_atomic(path, json.dumps(out, indent=2) + "\n")
    return pathlib.Path(path)


def plot(path: str | os.PathLike[str], results: Sequence[Result]) -> epath.Path:
    """Draw throughput by batch size and, if all losses are known, against loss; return the path."""
    models = list(dict.fromkeys(result.model for result in results))
    with_losses = all(result.loss is not None for result in results) and len(models) > 1
    panels = 2 if with_losses else 1
    figure, grid = plotting.new_grid(1, panels, width=4.6 * panels + 1, height=3.9)
    colors = dict(zip(models, itertools.cycle(plotting.PALETTE), strict=False))
    _draw_by_batch(grid[0, 0], results, colors)
    if with_losses:
        _draw_by_loss(grid[0, 1], results, colors)
    first = results[0]
    figure.suptitle(
        f"{first.prompt_tokens:,} tokens in, {first.new_tokens:,} out, prefill included",
        fontsize=11,
    )
    return plotting.save(figure, path)


def _is_exceeded(results: Sequence[Result]) -> bool:
    return any(result.roofline_share > 1 for result in results)


def _draw_by_batch(axes: Axes, results: Sequence[Result], colors: dict[str, str]) -> None:
    bound = dict(linestyle=":", linewidth=1.2, marker="_", markersize=9)  # also for one batch size
    for model, color in colors.items():
        own = sorted((r for r in results if r.model == model), key=lambda r: r.batch_size)
        sizes, rates = [r.batch_size for r in own], [r.tokens_per_second for r in own]
        plotting.draw_line(axes, sizes, rates, color=color, label=model)
        bounds = [r.tokens_per_second / r.roofline_share for r in own if r.roofline_share]
        if len(bounds) == len(own):
            axes.plot(sizes, bounds, color=color, **bound)
    label = "roofline (of reads from memory)" if _is_exceeded(results) else "roofline"
    axes.plot([], [], color=plotting.GREY, label=label, **bound)
    axes.set(xlabel="batch size", ylabel="generated tokens per second")
    plotting.log2_axis(axes.xaxis, sorted({r.batch_size for r in results}))
    plotting.log_axis(axes.yaxis)
    plotting.legend(axes)


def _draw_by_loss(axes: Axes, results: Sequence[Result], colors: dict[str, str]) -> None:
    """Draw each model at its fastest, and a step line under which no model lies."""
    fastest: dict[str, Result] = {}
    for result in sorted(results, key=lambda r: r.tokens_per_second):
        fastest[result.model] = result
    front = sorted(_front(list(fastest.values())), key=lambda r: r.loss)
    if len(front) > 1:
        axes.step(
            [r.loss for r in front],
            [r.tokens_per_second for r in front],
            where="post",
            color=plotting.GREY,
            linestyle="--",
            linewidth=1.2,
            label="no model here is both\nbetter and faster",
        )
        axes.legend(frameon=False, fontsize=9)
    ends = []
    for model, result in fastest.items():
        axes.plot(result.loss, result.tokens_per_second, "o", color=colors[model])
        text = f"{model}, batch {result.batch_size}"
        ends.append((result.loss, result.tokens_per_second, text, colors[model]))
    axes.set(xlabel="held-out loss (nats per token)", ylabel="generated tokens per second")
    axes.margins(x=0.15, y=0.25)
    plotting.log_axis(axes.yaxis)
    axes.locator_params(axis="x", nbins=5)
    plotting.label_points(axes, ends)


def _front(results: Sequence[Result]) -> list[Result]:
    """Return the results that no other beats in both loss and throughput."""
    return [
        a
        for a in results
        if not any(
            b.loss <= a.loss and b.tokens_per_second >= a.tokens_per_second and b is not a
            for b in results
        )
    ]
