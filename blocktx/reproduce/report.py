"""The report of studies: one page of Markdown with charts, made from results alone."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from blocktx.reproduce.study import Chart, Found, Results, Study
from blocktx.run_folder import write_png, write_whole

RESULTS, PAGE = "results.json", "README.md"
_COLORS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2")


def write_results(folder: epath.PathLike, results: Results, facts: Mapping[str, str]) -> None:
    """Writes all that a report is made from; `facts` say how the results came to be."""
    content = {"facts": dict(facts), "runs": results.runs, "speeds": results.speeds}
    write_whole(epath.Path(folder) / RESULTS, json.dumps(content, indent=1) + "\n")


def read_results(folder: epath.PathLike) -> tuple[Results, dict[str, str]]:
    """What `write_results` has written.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    path = epath.Path(folder) / RESULTS
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run the studies first")
    try:
        content = json.loads(path.read_text())
        return Results(content["runs"], content["speeds"]), content["facts"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is not what studies leave: {error}") from None


def write_report(
    folder: epath.PathLike,
    studies: Iterable[Study],
    results: Results,
    facts: Mapping[str, str],
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
        summary.append([f"[{study.name}](#{study.name})", study.finding, _verdict(found)])
        summary[-1].append(_minutes(study, results))
        sections.append(_section(study, found, results))
    intro = [f"- {name}: {value}" for name, value in facts.items()]
    page = "\n".join(
        [
            "# The paper's findings, tried",
            "",
            *intro,
            "",
            "Verdicts are of each statement as it is seen at this scale: *agrees*, *disagrees*, or "
            "*undecided* where seeds contradict each other. ± is the farthest seed from the mean.",
            "",
            _table(["study", "finding", "statements", "minutes"], summary),
            *sections,
        ]
    )
    write_whole(folder / PAGE, page + "\n")
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
    if not seconds or None in seconds:  # it was resumed, or nothing was trained
        return ""
    return f"{sum(seconds) / 60:.0f}"


def _section(study: Study, found: Found, results: Results) -> str:
    checks = [[check.statement, check.seen, f"**{check.verdict}**"] for check in found.checks]
    lines = ["", f"## {study.name}", "", study.finding, ""]
    lines += [_table(["statement", "seen", ""], checks), "", _table(found.header, found.rows)]
    for chart in found.charts:
        lines += ["", f"![{chart.title}]({chart.name}.png)"]
    sizes = {
        results.losses(run.name, "non_embedding")[0]: results.losses(run.name, "steps")[0]
        for run in study.runs
    }
    if sizes:
        low, high = min(sizes), max(sizes)
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        steps = sorted(set(sizes.values()))
        lines += ["", f"Models of {span} non-embedding parameters; steps: {steps}."]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _draw(chart: Chart) -> Figure:
    """Means over seeds, joined, and each seed as a small dot."""
    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes: Any = figure.add_subplot()
    named = any(isinstance(x, str) for series in chart.series for x in series.x)
    labels = list(dict.fromkeys(x for series in chart.series for x in series.x)) if named else []
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
