"""Which way do findings move with a larger model that is trained on more tokens?

A finding that disagrees at a small scale may be one of the scale. The same comparisons at two
scales show whether more of both brings it nearer to the paper's.
"""

import dataclasses
import math

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import (
    Chart,
    Found,
    Panels,
    Results,
    Run,
    Series,
    Study,
    above_zero,
    lower,
    spread,
)

_RATIOS = (common.RATIOS[0], (1, 1), common.RATIOS[-1])
_LENGTHS = (2, 4, 8)
_GAPS = {  # (the run that the paper finds to be better, the other one)
    "loss of 5:1 less loss of 1:1": ("1:1", "5:1"),
    "loss of 1:5 less loss of 1:1": ("1:1", "1:5"),
    "loss of blocks of 4 less that of 2": ("blocks of 2", "blocks of 4"),
    "loss of blocks of 8 less that of 4": ("blocks of 4", "blocks of 8"),
    "first position: loss of 1:5 less loss of 5:1": ("5:1", "1:5"),
}
_EFFECTS = {
    "fall": "fall of the loss along a context",
    "exchange": "rise of the loss if the first half of a context is exchanged",
}


def study(base: Base) -> Study:
    """Return the study of the block run and vanilla at two scales."""
    small = dataclasses.replace(base, block=base.smaller_block, vanilla=base.smaller_vanilla)
    at = {
        "smaller": {
            key: run._replace(name=f"smaller_{run.name}") for key, run in _runs(small).items()
        },
        "larger": _runs(base),
    }

    def find(results: Results) -> Found:
        noise, checks, rows = results.noise(), [], []
        for what, (better, worse) in _GAPS.items():
            gaps = [
                _gap(results, runs[better], runs[worse], "first" in what) for runs in at.values()
            ]
            of_four = None if noise is None else noise * math.sqrt(2)  # a gap is of two losses
            checks.append(lower(*gaps, f"{what} is lower in the smaller model", of_four))
            rows.append([what, *map(spread, gaps)])
        for model in ("vanilla", "1:1"):
            for key, what in _EFFECTS.items():
                what = f"{model}: {what}"
                small, larger = (results.values(runs[model].name, key) for runs in at.values())
                growth = [
                    (b - a, math.hypot(error_a, error_b))
                    for (a, error_a), (b, error_b) in zip(small, larger, strict=True)
                ]
                checks.append(above_zero(growth, f"{what}: more in the larger model"))
                rows.append([what, *(spread([mean for mean, _ in of]) for of in (small, larger))])
        for name in ("vanilla", *dict.fromkeys(name for pair in _GAPS.values() for name in pair)):
            losses = [results.values(runs[name].name) for runs in at.values()]
            rows.append([f"loss of {name}", *map(spread, losses)])
        header = ["", *(f"{scale}: {_size(results, runs)}" for scale, runs in at.items())]
        return Found(checks, header, rows, [_chart(results, at)])

    return Study(
        "growth",
        "0c. With a larger model and more tokens, findings come nearer to the paper's.",
        [run for runs in at.values() for run in runs.values()],
        [],
        find,
    )


def _runs(base: Base) -> dict[str, Run]:
    length = base.block.model.block_length
    runs = {f"{a}:{b}": common.allocated(base, (a, b), length) for a, b in _RATIOS}
    runs |= {f"blocks of {length}": common.of_length(base, length) for length in _LENGTHS}
    return runs | {"vanilla": common.vanilla(base)}


def _gap(results: Results, better: Run, worse: Run, first_position: bool) -> list[float]:
    """Return, for each seed, how much higher the loss of `worse` is."""
    key = "loss_by_position" if first_position else "loss"
    pairs = zip(results.values(better.name, key), results.values(worse.name, key), strict=True)
    return [b[0] - a[0] if first_position else b - a for a, b in pairs]


def _size(results: Results, runs: dict[str, Run]) -> str:
    def value(key: str) -> int:
        return results.values(runs["1:1"].name, key)[0]

    return f"{value('non_embedding'):,} parameters, {value('tokens') / 1e6:.2f}M tokens"


def _chart(results: Results, at: dict[str, dict[str, Run]]) -> Panels:
    """Losses less that of the block run, in both scales."""

    def chart(name: str, xlabel: str, keys: list[str]) -> Chart:
        series = [
            Series(
                scale,
                range(len(keys)),
                [_gap(results, runs["1:1"], runs[key], False) for key in keys],
            )
            for scale, runs in at.items()
        ]
        ylabel = "loss less that of 1:1, blocks of 4"
        return Chart(name, "", xlabel, ylabel, series, ticks=dict(enumerate(keys)))

    return Panels(
        "growth",
        "The same comparisons at two scales",
        [
            chart("ratio", "layers, block : token", [f"{a}:{b}" for a, b in _RATIOS]),
            chart("length", "", [f"blocks of {length}" for length in _LENGTHS]),
        ],
    )
