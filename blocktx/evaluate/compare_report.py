"""The table and the plot of a model beside a reference."""

import dataclasses
import math
import os
from typing import Any

from etils import epath

from blocktx import plotting
from blocktx.evaluate.compare import Comparison
from blocktx.evaluate.continuations import Continuations
from blocktx.evaluate.position_curve import draw_losses

Speeds = dict[int, tuple[float, float]]  # batch size -> tokens/s of the model and the reference


@dataclasses.dataclass
class Report:
    """Measurements of a model and a reference. Parts that are not measured yet are None."""

    names: tuple[str, str]
    parameters: tuple[int, int]  # non-embedding
    comparison: Comparison | None = None
    continuations: Continuations | None = None
    speeds: Speeds = dataclasses.field(default_factory=dict)

    def table(self) -> str:
        """Return one aligned table of all that was measured."""
        rows = [("", *self.names)]
        rows.append(("non-embedding parameters", *(f"{n / 1e6:.1f}M" for n in self.parameters)))
        if self.comparison:
            rows += _likelihood(self.comparison)
        if self.continuations:
            rows += _generation(self.continuations)
        for batch_size, pair in self.speeds.items():
            rows.append((f"decoding, batch {batch_size}", *(f"{rate:,.0f} tok/s" for rate in pair)))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        widths[1:] = [max(width, 9) for width in widths[1:]]
        lines = [
            f"{name:{widths[0]}}  {model:>{widths[1]}}  {reference:>{widths[2]}}".rstrip()
            for name, model, reference in rows
        ]
        return "\n".join(lines)

    def numbers(self) -> dict[str, Any]:
        """Return all numbers for a JSON file; those that are not finite are None."""
        found: dict[str, Any] = {"names": self.names, "non_embedding_parameters": self.parameters}
        if self.comparison:
            found |= dataclasses.asdict(self.comparison)
            found["loss_by_position"] = [_by_position(sums) for sums in found.pop("sums")]
        if self.continuations:
            found["continuations"] = dataclasses.asdict(self.continuations)
        found["tokens_per_second"] = {str(size): pair for size, pair in self.speeds.items()}
        return _finite(found)


def plot_report(report: Report, bin_tokens: int, path: str | os.PathLike[str]) -> epath.Path:
    """Draw the losses, the KL and the decoding speed of a report, and return `path`.

    Raises:
      ValueError: the comparison or the speeds are missing.
    """
    if report.comparison is None or not report.speeds:
        raise ValueError("plot: the comparison was not finished")
    figure, ((position, place), (kl, speed)) = plotting.new_grid(2, 2, width=9, height=6.6)
    runs = list(zip(report.names, report.comparison.sums, strict=True))
    draw_losses(position, place, runs, bin_tokens)

    by_position = report.comparison.kl_by_position
    kl.bar(range(1, len(by_position) + 1), by_position, color=plotting.BLOCK, width=0.6)
    kl.set_xticks(range(1, len(by_position) + 1))
    kl.set(xlabel="position in the block", ylabel="KL divergence (nats per token)", ylim=(0, None))
    kl.grid(axis="x", visible=False)
    agreement = f"likeliest token agrees in {report.comparison.agreement:.1%}"
    kl.set_title(plotting.plain(f"KL from {report.names[1]}; {agreement}"), fontsize=10)

    sizes = list(report.speeds)
    for i, name in enumerate(report.names):
        rates = [pair[i] for pair in report.speeds.values()]
        plotting.draw_line(speed, sizes, rates, label=name, **plotting.line_style(i))
    speed.set(xlabel="batch size", ylabel="decoded tokens per second")
    speed.set_title("decoding, prefill included")
    plotting.log2_axis(speed.xaxis, sizes)
    plotting.log_axis(speed.yaxis)
    title = f"{report.names[0]} beside {report.names[1]} (error bars: 95% confidence)"
    figure.suptitle(plotting.plain(title))
    return plotting.save(figure, path)


def _likelihood(found: Comparison) -> list[tuple[str, str, str]]:
    rows = [
        ("tokens compared", f"{found.tokens:,}", ""),
        ("bits per byte", *(f"{bits:.4f}" for bits in found.bits_per_byte)),
        ("loss (nats per token)", *(f"{loss:.4f}" for loss in found.loss)),
    ]
    pairs = zip(*(_by_position(sums) for sums in found.sums), strict=True)
    rows += [
        (f"  at position {i} of the block", *(f"{loss:.4f}" for loss in pair))
        for i, pair in enumerate(pairs, 1)
    ]
    rows.append(("KL from the reference (nats per token)", f"{found.kl:.4f}", ""))
    rows.append(("likeliest token agrees", f"{found.agreement:.1%}", ""))
    return rows


def _generation(found: Continuations) -> list[tuple[str, str, str]]:
    own, other, text = found.repetition
    return [
        (f"{found.prompts} greedy continuations of {found.new_tokens} tokens", "", ""),
        ("  the same to the end", f"{found.exact:.1%}", ""),
        ("  tokens before the first difference", f"{found.matched:.1%}", ""),
        (f"  repeated 4-grams (the text itself: {text:.1%})", f"{own:.1%}", f"{other:.1%}"),
    ]


def _by_position(sums_3xMxK: Any) -> list[float]:
    nats_K, count_K = sums_3xMxK[:2].sum(1)
    return [float(n / c) if c else math.nan for n, c in zip(nats_K, count_K, strict=True)]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
