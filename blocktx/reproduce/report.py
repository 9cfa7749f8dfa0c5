"""The report of studies: one page of Markdown, made from results alone."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence

from etils import epath

from blocktx.files import write_atomic, write_picture
from blocktx.reproduce.charts import draw
from blocktx.reproduce.study import VERDICTS, Found, Results, Study

RESULTS, PAGE = "results.json", "README.md"


def write_results(folder: epath.PathLike, results: Results, flags: str) -> None:
    """Write everything that a report is made from; `flags` are those that give the scale."""
    content = {"flags": flags, "runs": results.runs, "speeds": results.speeds}
    write_atomic(epath.Path(folder) / RESULTS, json.dumps(content, indent=1) + "\n")


def read_results(folder: epath.PathLike) -> tuple[Results, str]:
    """Return the results and flags that `write_results` has written.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged.
    """
    path = epath.Path(folder) / RESULTS
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run the studies first")
    try:
        content = json.loads(path.read_text())
        results = Results(content["runs"], content["speeds"])
        return results, content["flags"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is not what studies leave: {error!r}") from None


def write_report(
    folder: epath.PathLike,
    studies: Iterable[Study],
    results: Results,
    flags: str,
    seeds: Sequence[int],
) -> epath.Path:
    """Write the page and its pictures, and return the page's path.

    A study is reported over the seeds with which all of its runs are finished. A study with none is
    listed with the number of its finished runs.

    Args:
      folder: of the page.
      studies: in the order of the page.
      results: of all studies.
      flags: those of `launch/reproduce.py` that give the scale.
      seeds: those that are wanted, for counting what is missing.
    """
    folder, studies, sections, summary = epath.Path(folder), list(studies), [], []
    for study in studies:
        done, wanted = _finished(study, results, seeds)
        finished = f"{done} of {wanted}"
        complete = _complete_seeds(study, results)
        if (study.runs and not complete) or (not study.runs and done < wanted):
            summary.append([study.name, study.finding, "not finished", "", "", finished])
            continue
        of_seeds = dataclasses.replace(results, seeds=complete)
        found = study.find(of_seeds)
        for chart in found.charts:
            write_picture(folder / f"{chart.name}.png", draw(chart))
        name = f"[{study.name}](#{study.name})"
        summary.append([name, study.finding, *_counts(found), finished])
        sections.append(_section(study, found, of_seeds))
    page = "\n".join(
        [
            "# The paper's findings at this scale",
            "",
            "Each study trains models that differ in one respect, and compares them by their loss "
            "on held-out text, in nats per token: lower is better. Throughput is measured with "
            "random weights.",
            "",
            f"Made from [{RESULTS}]({RESULTS}) by `python launch/reproduce.py --study=all {flags} "
            "--report_only --output=FOLDER`.",
            "",
            _verdicts(results),
            "",
            _table(["study", "finding", *VERDICTS, "results finished"], summary),
            *sections,
            *_all_runs(studies, results),
        ]
    )
    write_atomic(folder / PAGE, page + "\n")
    return folder / PAGE


def _verdicts(results: Results) -> str:
    """Return how statements about losses are decided."""
    decided = "A statement *agrees*, *disagrees* or is *undecided*"
    noise = results.noise()
    if noise is None:
        return (
            f"{decided}. Comparisons of losses are all undecided: the noise is estimated from two "
            "or more seeds, and they are not finished."
        )
    return (
        f"{decided}. A comparison of losses is undecided if the seeds contradict each other, or if "
        f"the mean difference is within two standard errors: {2 * noise * math.sqrt(2):.4f} for "
        f"one seed, {2 * noise:.4f} for two. (The standard deviation of a loss over seeds is "
        f"{noise:.4f}.) ± is the largest deviation of a seed from the mean, unless it says "
        "standard error. Bars in pictures span the seeds, or the repeats of a measurement."
    )


def _complete_seeds(study: Study, results: Results) -> list[int]:
    """Return the seeds with which all runs of the study are finished."""
    found = [set(results.runs.get(run.name, {})) for run in study.runs]
    return sorted(int(seed) for seed in set.intersection(*found)) if found else []


def _finished(study: Study, results: Results, seeds: Sequence[int]) -> tuple[int, int]:
    """Return how many results of the study are finished, and how many are wanted."""
    runs = [str(seed) in results.runs.get(run.name, {}) for run in study.runs for seed in seeds]
    speeds = [speed.name in results.speeds for speed in study.speeds]
    return sum(runs + speeds), len(runs + speeds)


def _counts(found: Found) -> list[str]:
    verdicts = [check.verdict for check in found.checks]
    return [str(verdicts.count(verdict) or "") for verdict in VERDICTS]


def _section(study: Study, found: Found, results: Results) -> str:
    checks = [[check.statement, check.seen, f"**{check.verdict}**"] for check in found.checks]
    lines = ["", f"## {study.name}", "", study.finding, ""]
    lines += [
        _table(["statement", "seen", "verdict"], checks),
        "",
        _table(found.header, found.rows),
    ]
    for chart in found.charts:
        lines += ["", f"![{chart.title}]({chart.name}.png)"]
    notes = []
    if study.runs:
        notes.append(f"Seeds: {', '.join(map(str, results.seeds or []))}.")
    for speed in study.speeds:
        if measured := results.speeds.get(speed.name):
            notes.append(
                f"Decoding: batch {speed.batch_size}, {speed.new_tokens} new tokens; "
                f"{measured['made']}; load beside it {measured['load']:.1f}."
            )
        else:
            notes.append(f"The speed {speed.name} is not measured yet.")
    return "\n".join([*lines, "", " ".join(notes)])


def _all_runs(studies: Iterable[Study], results: Results) -> list[str]:
    rows = [
        [
            name,
            seed,
            f"{result['non_embedding']:,}",
            f"{result['steps']:,}",
            f"{result['tokens'] / 1e6:.2f}M",
            f"{result['flops']:.1e}",
            f"{result['loss']:.4f}",
            f"{result['bits_per_byte']:.4f}",
            "" if result["cpu_seconds"] is None else f"{result['cpu_seconds'] / 60:.1f}",
            result["made"],
        ]
        for name in dict.fromkeys(run.name for study in studies for run in study.runs)
        for seed, result in results.runs.get(name, {}).items()
    ]
    header = ["run", "seed", "non-embedding", "steps", "tokens", "FLOPs", "loss", "bits/byte"]
    header += ["CPU minutes", "made"]
    note = "CPU minutes are those of the process during training; a run that was resumed has none."
    return ["", "## All finished runs", "", note, "", _table(header, rows)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
