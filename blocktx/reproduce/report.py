"""The report of studies: one page of Markdown with charts, made from results alone."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from blocktx.files import write_atomic, write_png
from blocktx.reproduce.study import Chart, Found, Results, Study

RESULTS, PAGE = "results.json", "README.md"


_COLORS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2")


def write_results(
    folder: epath.PathLike, results: Results, flags: str, seeds: Sequence[int]
) -> None:
    """Writes all that a report is made from; `flags` are those that say at what scale."""
    content = {"flags": flags, "seeds": list(seeds)} | dataclasses.asdict(results)
    write_atomic(epath.Path(folder) / RESULTS, json.dumps(content, indent=1) + "\n")


def read_results(folder: epath.PathLike) -> tuple[Results, str, list[int]]:
    """What `write_results` has written: results, flags, seeds.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    path = epath.Path(folder) / RESULTS
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run the studies first")
    try:
        content = json.loads(path.read_text())
        results = Results(content["runs"], content["speeds"])
        return results, content["flags"], content["seeds"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is not what studies leave: {error!r}") from None


def write_report(
    folder: epath.PathLike,
    studies: Iterable[Study],
    results: Results,
    flags: str,
    seeds: Sequence[int],
) -> epath.Path:
    """Writes the page and its charts, and returns the page's path.

    Studies without all of their results are named as such.
    """
    folder, sections, summary = epath.Path(folder), [], []
    for study in studies:
        missing = _missing(study, results, seeds)
        if missing:
            summary.append([study.name, study.finding, f"not run: {len(missing)} missing", ""])
            continue
        found = study.find(results)
        for chart in found.charts:
            write_png(folder / f"{chart.name}.png", _draw(chart))
        name = f"[{study.name}](#{study.name})"
        summary.append([name, study.finding, _verdict(found), _minutes(study, results)])
        sections.append(_section(study, found, results))
    made = {result["made"] for runs in results.runs.values() for result in runs.values()}
    made |= {speed["made"] for speed in results.speeds.values()}
    noise = results.noise()
    how = "seeds contradict each other"
    if noise is not None:
        how += (
            ", or the mean difference of two losses is below "
            f"{2 * noise * math.sqrt(2 / len(seeds)):.4f} (two standard errors: a seed gives the "
            f"loss of a run a standard deviation of {noise:.4f})"
        )
    page = "\n".join(
        [
            "# The paper's findings, tried",
            "",
            f"Made by `python launch/reproduce.py --study=all {flags} "
            f"--seeds={','.join(map(str, seeds))}`, where a run that studies share is made once. "
            "Losses are in nats a token.",
            "",
            *(f"- {line}" for line in sorted(made)),
            "",
            "Verdicts are of each statement as it is seen at this scale: *agrees*, *disagrees*, or "
            f"*undecided*, where {how}. ± is the farthest seed from the mean. Minutes are of all "
            "that a study needs, what it shares with others too.",
            "",
            _table(["study", "finding", "statements", "minutes"], summary),
            *sections,
        ]
    )
    write_atomic(folder / PAGE, page + "\n")
    return folder / PAGE


def _missing(study: Study, results: Results, seeds: Sequence[int]) -> list[str]:
    runs = [
        f"{run.name}-seed{seed}"
        for run in study.runs
        for seed in seeds
        if str(seed) not in results.runs.get(run.name, {})
    ]
    return runs + [speed.name for speed in study.speeds if speed.name not in results.speeds]


def _verdict(found: Found) -> str:
    verdicts = [check.verdict for check in found.checks]
    counts = {verdict: verdicts.count(verdict) for verdict in ("agrees", "disagrees", "undecided")}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _minutes(study: Study, results: Results) -> str:
    seconds = [
        result["seconds"] for run in study.runs for result in results.runs[run.name].values()
    ]
    seconds += [results.speeds[speed.name]["seconds"] for speed in study.speeds]
    known = [each for each in seconds if each is not None]  # others were resumed
    return ("over " if len(known) < len(seconds) else "") + f"{sum(known) / 60:.0f}"


def _section(study: Study, found: Found, results: Results) -> str:
    checks = [[check.statement, check.seen, f"**{check.verdict}**"] for check in found.checks]
    lines = ["", f"## {study.name}", "", study.finding, ""]
    lines += [_table(["statement", "seen", ""], checks), "", _table(found.header, found.rows)]
    for chart in found.charts:
        lines += ["", f"![{chart.title}]({chart.name}.png)"]
    if study.runs:
        sizes, steps = (
            sorted({results.values(run.name, key)[0] for run in study.runs})
            for key in ("non_embedding", "steps")
        )
        span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        lines += ["", f"Models of {span} non-embedding parameters, {_list(steps)} steps."]
    return "\n".join(lines)


def _list(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _draw(chart: Chart) -> Figure:
    """Means over seeds, joined, and each seed as a small dot."""
    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes: Any = figure.add_subplot()
    named = any(isinstance(x, str) for series in chart.series for x in series.x)
    labels = list(chart.ticks) or list(chart.series[0].x)
    for series, color in zip(chart.series, _COLORS, strict=False):
        x = [labels.index(name) for name in series.x] if named else list(series.x)
        means = [statistics.mean(values) for values in series.y]
        axes.plot(x, means, color=color, marker="o", label=series.label)
        for place, values in zip(x, series.y, strict=True):
            if len(values) > 1:
                axes.plot([place] * len(values), values, ".", color=color, alpha=0.5)
    if named:
        axes.set_xticks(range(len(labels)), labels)
    if "x" in chart.log:
        axes.set_xscale("log", base=2)
    if "y" in chart.log:
        axes.set_yscale("log")
    if any(series.label for series in chart.series):
        axes.legend(frameon=False)
    axes.set(title=chart.title, xlabel=chart.xlabel, ylabel=chart.ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
