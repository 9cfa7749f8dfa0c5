"""Studies: runs to train, speeds to measure, and the statements checked in their results."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from blocktx.config import ModelConfig, RunConfig

Verdict = Literal["agrees", "disagrees", "undecided"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class Run(NamedTuple):
    """A model to train. A run that several studies share is trained once."""

    name: str  # without the seed
    config: RunConfig  # its seed is replaced by that of the run
    uptrained_from: "Run | None" = None  # the vanilla run, of the same seed, that it starts from


class Speed(NamedTuple):
    """A measurement of decoding throughput. Models take turns; their weights are random."""

    name: str
    models: dict[str, ModelConfig]
    prompt_tokens: dict[str, int]  # by model
    new_tokens: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Results:
    """All finished results; plain JSON values."""

    runs: dict[str, dict[str, dict[str, Any]]]  # by name and seed: see `runner.read_run`
    speeds: dict[str, dict[str, Any]]  # by name: see `runner.read_speed`
    seeds: Sequence[int] | None = None  # the seeds that `values` returns; None: all

    def values(self, run: str, key: str = "loss") -> list[Any]:
        """Return one value per seed of a run; by default its held-out loss in nats per token."""
        found = sorted((int(seed), result) for seed, result in self.runs[run].items())
        return [result[key] for seed, result in found if self.seeds is None or seed in self.seeds]

    def rates(self, speed: str) -> dict[str, float]:
        """Return generated tokens per second, by model; empty if they are not measured."""
        return self.speeds.get(speed, {}).get("tokens_per_second", {})

    def noise(self) -> float | None:
        """Return the standard deviation of a run's loss over seeds; None if there is one seed.

        It is estimated from the residuals of all runs after the mean of each run and the effect of
        each seed, since compared runs share their seeds and so see the same data. Medians keep one
        badly trained model from blurring all comparisons. It does not depend on `seeds`.
        """
        seeds = max((len(found) for found in self.runs.values()), default=0)
        everything = dataclasses.replace(self, seeds=None)
        grid = np.array(
            [everything.values(run) for run, found in self.runs.items() if len(found) == seeds]
        )
        if seeds < 2 or len(grid) < 2:
            return None
        rest = grid - grid.mean(1, keepdims=True)
        rest -= np.median(rest, axis=0)
        normal = 1.4826  # ratio of the standard deviation to the median absolute value
        return float(normal * np.median(np.abs(rest)) * math.sqrt(seeds / (seeds - 1)))


class Check(NamedTuple):
    """One statement of a finding, and what was measured."""

    statement: str
    seen: str
    verdict: Verdict


class Series(NamedTuple):
    label: str  # empty: not in the legend
    x: Sequence[float]
    y: Sequence[Sequence[float]]  # for each x, one value per seed or repeat
    joined: bool = True  # points are joined by a line; False for categories
    point_labels: Sequence[str] = ()  # one per x, drawn beside the point
    x_range: Sequence[tuple[float, float]] = ()  # one per x, of repeated measurements of it


class Chart(NamedTuple):
    """One pair of axes."""

    name: str  # of the file
    title: str
    xlabel: str
    ylabel: str
    series: list[Series]
    log: Literal["", "x", "y", "xy"] = ""
    ticks: Mapping[float, str] | None = None  # tick labels by x; None: numbers


class Panels(NamedTuple):
    """Several charts in one picture, in rows of two."""

    name: str  # of the file
    title: str
    charts: list[Chart]


class Found(NamedTuple):
    """The statements, the table and the pictures of a study."""

    checks: list[Check]
    header: list[str]
    rows: list[list[str]]
    charts: "list[Chart | Panels]"


class Study(NamedTuple):
    name: str
    finding: str  # the paper's statement, with its number
    runs: list[Run]
    speeds: list[Speed]
    find: Callable[[Results], Found]


def lower(
    a: Sequence[float], b: Sequence[float], statement: str, noise: float | None = None
) -> Check:
    """Check whether `a` is lower than `b`; each has one value per seed, in the same order.

    The verdict is undecided if seeds contradict each other, if the mean difference is within two
    standard errors, by `Results.noise`, or if there is no estimate of the noise.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    mean = statistics.mean(differences)
    seen = f"lower by {mean:.4f}" if mean > 0 else f"higher by {-mean:.4f}"
    if len(differences) > 1:
        seen += " (by seed: " + ", ".join(f"{difference:+.4f}" for difference in differences) + ")"
    one_way = min(differences) > 0 or max(differences) < 0
    if noise is None or not one_way or abs(mean) < 2 * noise * math.sqrt(2 / len(differences)):
        return Check(statement, seen, "undecided")
    return Check(statement, seen, "agrees" if mean > 0 else "disagrees")


def above_zero(effects: Sequence[tuple[float, float]], statement: str) -> Check:
    """Check whether an effect, given as (mean, standard error) for each seed, is above zero.

    The verdict is undecided if the mean over seeds is within two standard errors of zero.
    """
    mean = statistics.mean(effect for effect, _ in effects)
    error = math.sqrt(sum(error**2 for _, error in effects)) / len(effects)
    seen = f"{mean:+.5f} ± {error:.5f} (standard error)"
    if abs(mean) <= 2 * error:
        return Check(statement, seen, "undecided")
    return Check(statement, seen, "agrees" if mean > 0 else "disagrees")


def holds(condition: bool, statement: str, seen: str) -> Check:
    return Check(statement, seen, "agrees" if condition else "disagrees")


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the largest deviation of a seed from it, as text."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {max(abs(value - mean) for value in values):.4f}"
