"""What a study is: runs to train, speeds to measure, and what is found in their results."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from blocktx.config import RunConfig
from blocktx.model_config import ModelConfig

Verdict = Literal["agrees", "disagrees", "undecided"]


class Run(NamedTuple):
    """A model to train. Studies that have a run in common train it once."""

    name: str  # without the seed
    config: RunConfig  # of whichever seed: the run's is put in its place
    uptrained_from: str | None = None  # the name of the vanilla run that it begins with
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

    runs: dict[str, dict[str, dict[str, Any]]]  # by name and seed: what `runner.run_result` gives
    speeds: dict[str, dict[str, float]]  # generated tokens a second, by Speed and model

    def losses(self, run: str, key: str = "loss") -> list[float]:
        """The held-out losses of a run, one a seed, in nats a token; or another of its values."""
        return [result[key] for _, result in sorted(self.runs[run].items())]

    def loss(self, run: str) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.losses(run))

    def at(self, run: str, key: str, index: int) -> list[float]:
        """Entry `index` of a value that is a list, one a seed."""
        return [values[index] for values in self.losses(run, key)]


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


def lower(a: Sequence[float], b: Sequence[float], statement: str) -> Check:
    """Whether `a` is lower than `b`, each a value a seed, seeds in the same order.

    Seeds are compared in pairs: where they contradict each other the check is undecided, and so it
    is where there is one alone and the difference is below a thousandth, which seeds can make.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    mean = statistics.mean(differences)
    seen = f"lower by {mean:.4f}" if mean > 0 else f"higher by {-mean:.4f}"
    if len(differences) > 1:
        seen += " (by seed: " + ", ".join(f"{difference:+.4f}" for difference in differences) + ")"
    one_way = min(differences) > 0 or max(differences) < 0
    if not one_way or (len(differences) == 1 and abs(mean) < 1e-3):
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
