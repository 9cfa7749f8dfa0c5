"""What a study is: runs to train, speeds to measure, and what is found in their results."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from blocktx.config import ModelConfig, RunConfig

Verdict = Literal["agrees", "disagrees", "undecided"]


class Run(NamedTuple):
    """A model to train. Studies that have a run in common train it once."""

    name: str  # without the seed
    config: RunConfig  # of whichever seed: the run's is put in its place
    uptrained_from: "Run | None" = None  # the vanilla run, of the same seed, that it begins with
    curve_bin: int | None = None  # tokens; also measure the loss by place in the context


class Speed(NamedTuple):
    """Decoding to measure, of models that take turns, with new weights."""

    name: str
    models: dict[str, ModelConfig]
    prompt_tokens: dict[str, int]  # by model
    new_tokens: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Results:
    """All that has been measured; JSON, whole."""

    runs: dict[str, dict[str, dict[str, Any]]]  # by name and seed: what `runner.read_run` gives
    speeds: dict[str, dict[str, Any]]  # by name: what `runner.read_speed` gives

    def values(self, run: str, key: str = "loss") -> list[Any]:
        """A value of a run, one a seed; by default its held-out loss in nats a token."""
        return [result[key] for _, result in sorted(self.runs[run].items())]

    def rates(self, speed: str) -> dict[str, float]:
        """Generated tokens a second, by model."""
        return self.speeds[speed]["tokens_per_second"]

    def noise(self) -> float | None:
        """The standard deviation that a seed gives a run's loss; None if there is one seed alone.

        Of what is left of the losses of all runs when what a run and what a seed does to them is
        taken away: comparisons are between runs of the same seeds, which see the same data. By
        medians, so that one model that hardly trains does not blur all others.
        """
        seeds = max((len(found) for found in self.runs.values()), default=0)
        grid = np.array(
            [self.values(run) for run, found in self.runs.items() if len(found) == seeds]
        )
        if seeds < 2 or len(grid) < 2:
            return None
        rest = grid - grid.mean(1, keepdims=True)
        rest -= np.median(rest, axis=0)
        normal = 1.4826  # standard deviation over median of the absolute values
        return float(normal * np.median(np.abs(rest)) * math.sqrt(seeds / (seeds - 1)))


class Check(NamedTuple):
    """One statement of a finding beside what was seen."""

    statement: str
    seen: str
    verdict: Verdict


class Series(NamedTuple):
    label: str
    x: Sequence[float | str]
    y: Sequence[Sequence[float]]  # for each x, a value for each seed


class Chart(NamedTuple):
    name: str  # of its file
    title: str
    xlabel: str
    ylabel: str
    series: list[Series]
    log: Literal["", "x", "y", "xy"] = ""
    ticks: Sequence[str] = ()  # the order of names along x


class Found(NamedTuple):
    """What a study makes of its results."""

    checks: list[Check]
    header: list[str]
    rows: list[list[str]]
    charts: list[Chart]


class Study(NamedTuple):
    name: str
    finding: str  # the paper's statement, with its number in our list
    runs: list[Run]
    speeds: list[Speed]
    find: Callable[[Results], Found]


def lower(
    a: Sequence[float], b: Sequence[float], statement: str, noise: float | None = None
) -> Check:
    """Whether `a` is lower than `b`, each a value a seed, seeds in the same order.

    It is undecided where the mean difference is within two standard errors, by `Results.noise`, or
    where seeds contradict each other; without a noise, where it is below a thousandth.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    mean = statistics.mean(differences)
    seen = f"lower by {mean:.4f}" if mean > 0 else f"higher by {-mean:.4f}"
    if len(differences) > 1:
        seen += " (by seed: " + ", ".join(f"{difference:+.4f}" for difference in differences) + ")"
    least = 1e-3 if noise is None else 2 * noise * math.sqrt(2 / len(differences))
    one_way = min(differences) > 0 or max(differences) < 0
    if not one_way or abs(mean) < least:
        return Check(statement, seen, "undecided")
    return Check(statement, seen, "agrees" if mean > 0 else "disagrees")


def holds(condition: bool, statement: str, seen: str) -> Check:
    return Check(statement, seen, "agrees" if condition else "disagrees")


def spread(values: Sequence[float]) -> str:
    """The mean, and how far the seeds are from it."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {max(abs(value - mean) for value in values):.4f}"
