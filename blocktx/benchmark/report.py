"""What `blocktx.benchmark` measures, shown: a table, a JSON file, a plot."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from blocktx.benchmark.machine import Machine
from blocktx.benchmark.measure import Result
from blocktx.files import write_atomic, write_png


def table(results: Sequence[Result], machine: Machine) -> str:
    """One line a model and batch size; models at one batch size are compared with the first."""
    width = max(len(result.model) for result in results)
    lines = [
        f"{machine.device}: {machine.flops_per_second / 1e9:.0f} GFLOP/s in a product of 2048^3, "
        f"{machine.bytes_per_second / 1e9:.1f} GB/s in a sum of 256 MB",
        f"prompt of {results[0].prompt_tokens} tokens, {results[0].new_tokens} new ones",
        f"{'model':{width}}  batch  prefill s  first token s  tokens/s  MB/sample  of roofline",
    ]
    for result in results:
        lines.append(
            f"{result.model:{width}}  {result.batch_size:>5}  {result.prefill_seconds:>9.3f}  "
            f"{result.seconds_to_first_token:>13.3f}  {result.tokens_per_second:>8.1f}  "
            f"{result.bytes_per_sample / 1e6:>9.1f}  {result.roofline_share:>11.0%}"
        )
    first = {r.batch_size: r for r in reversed(results) if r.model == results[0].model}
    for result in results:
        ours = first.get(result.batch_size)
        if ours is not None and ours.model != result.model:
            ratio = ours.tokens_per_second / result.tokens_per_second
            lines.append(f"batch {result.batch_size}: {ours.model} is {ratio:.1f}x {result.model}")
    return "\n".join(lines)


def write_json(
    path: str | os.PathLike[str], results: Sequence[Result], machine: Machine
) -> pathlib.Path:
    """Writes `{"machine": {...}, "results": [{...}, ...]}`, and returns where."""
    out = {
        "machine": machine._asdict(),
        "results": [dataclasses.asdict(result) for result in results],
    }
    write_atomic(path, json.dumps(out, indent=2) + "\n")
    return pathlib.Path(path)


def plot(path: str | os.PathLike[str], results: Sequence[Result]) -> pathlib.Path:
    """Draws throughput against held-out loss, each model at its fastest, and returns where.

    The line joins the models that no other beats in both.

    Raises:
      ValueError: a result has no loss.
    """
    unknown = sorted({result.model for result in results if result.loss is None})
    if unknown:
        raise ValueError(f"plot: no held-out loss is known of {', '.join(unknown)}")
    fastest: dict[str, Result] = {}
    for result in sorted(results, key=lambda r: r.tokens_per_second):
        fastest[result.model] = result
    front = [
        a
        for a in fastest.values()
        if not any(
            b.loss <= a.loss and b.tokens_per_second >= a.tokens_per_second and b is not a
            for b in fastest.values()
        )
    ]
    front.sort(key=lambda r: r.loss)
    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set(
        yscale="log",
        xlabel="held-out loss (nats per token)",
        ylabel="generated tokens per second",
        title=f"{results[0].prompt_tokens} tokens in, {results[0].new_tokens} out",
    )
    axes.plot([r.loss for r in front], [r.tokens_per_second for r in front], color="#4c78a8")
    for result in fastest.values():
        axes.plot(result.loss, result.tokens_per_second, "o", color="#4c78a8")
        axes.annotate(
            f"{result.model}, batch {result.batch_size}",
            (result.loss, result.tokens_per_second),
            xytext=(6, 4),
            textcoords="offset points",
        )
    axes.grid(which="both", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return pathlib.Path(write_png(path, figure))
