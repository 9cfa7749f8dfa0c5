"""Finding 1: how the layers are best divided between block decoder and token decoder."""

import math

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Chart, Found, Results, Series, Study, lower, spread

_EXTREMES = (common.RATIOS[0], (1, 1), common.RATIOS[-1])
_SHORT, _LONG = 2, 8  # block lengths at which the allocation is looked at again


def study(base: Base) -> Study:
    """Return the study of all ratios at the block length of the scale."""
    length = base.block.model.block_length
    runs = {ratio: common.allocated(base, ratio, length) for ratio in common.RATIOS}

    def find(results: Results) -> Found:
        losses = {ratio: results.values(run.name) for ratio, run in runs.items()}
        noise = results.noise()
        pairs = [((1, 1), ratio) for ratio in common.RATIOS if ratio != (1, 1)]
        pairs += [(common.RATIOS[1], common.RATIOS[0]), (common.RATIOS[-2], common.RATIOS[-1])]
        return Found(
            [
                lower(
                    losses[better],
                    losses[worse],
                    f"{_says(better)} has a lower loss than {_says(worse)}",
                    noise,
                )
                for better, worse in pairs
            ],
            ["layers, block : token", "loss"],
            [[_says(ratio), spread(losses[ratio])] for ratio in common.RATIOS],
            [_chart("allocation", {length: losses})],
        )

    return Study(
        "allocation",
        "1. Loss against the share of layers in block and token decoder is U-shaped, best at 1:1.",
        list(runs.values()),
        [],
        find,
    )


def by_length(base: Base) -> Study:
    """Return the study of extreme ratios at shorter and longer blocks."""
    at = {
        length: {ratio: common.allocated(base, ratio, length) for ratio in _EXTREMES}
        for length in (_SHORT, base.block.model.block_length, _LONG)
    }

    def find(results: Results) -> Found:
        losses = {
            length: {ratio: results.values(run.name) for ratio, run in runs.items()}
            for length, runs in at.items()
        }
        noise = results.noise()

        def lead(length: int) -> list[float]:
            pairs = zip(losses[length][_EXTREMES[0]], losses[length][_EXTREMES[-1]], strict=True)
            return [block - token for block, token in pairs]

        check = lower(
            lead(_SHORT),
            lead(_LONG),
            f"loss at 5:1 less loss at 1:5 is lower with blocks of {_SHORT} than of {_LONG}",
            None if noise is None else noise * 2**0.5,  # differences of differences
        )
        return Found(
            [check],
            ["layers, block : token", *(f"loss, blocks of {length}" for length in losses)],
            [[_says(ratio), *(spread(of[ratio]) for of in losses.values())] for ratio in _EXTREMES],
            [_chart("allocation_by_length", losses)],
        )

    return Study(
        "allocation_by_length",
        "1. Shorter blocks favour the block decoder, longer ones the token decoder.",
        [run for runs in at.values() for run in runs.values()],
        [],
        find,
    )


def _says(ratio: tuple[int, int]) -> str:
    return f"{ratio[0]}:{ratio[1]}"


def _place(ratio: tuple[int, int]) -> float:
    """Return the place on the axis: block decoders grow to the left, by the logarithm."""
    return math.log2(ratio[1] / ratio[0])


def _chart(name: str, losses: dict[int, dict[tuple[int, int], list[float]]]) -> Chart:
    series = [
        Series(f"blocks of {length}", list(map(_place, of)), list(of.values()))
        for length, of in losses.items()
    ]
    ratios = next(iter(losses.values()))
    return Chart(
        name,
        "Layers of block decoder and token decoder",
        "layers, block : token",
        common.LOSS,
        series,
        ticks={_place(ratio): _says(ratio) for ratio in ratios},
    )
