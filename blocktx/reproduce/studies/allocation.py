"""Finding 1: how the layers are best divided between block decoder and token decoder."""

import math

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Chart, Found, Results, Series, Study, lower, spread

_SHORT, _LONG = 2, 8  # block lengths at which the allocation is looked at again


def _says(ratio: tuple[int, int]) -> str:
    return f"{ratio[0]}:{ratio[1]}"


def _place(ratio: tuple[int, int]) -> float:
    """The place on the axis: block decoders grow to the left, evenly in the logarithm."""
    return math.log2(ratio[1] / ratio[0])


def study(base: Base) -> Study:
    ordinary = base.block.model.block_length
    at = {
        length: {
            ratio: common.allocated(base, ratio, length)
            for ratio in (
                common.RATIOS
                if length == ordinary
                else [common.RATIOS[0], (1, 1), common.RATIOS[-1]]
            )
        }
        for length in (_SHORT, ordinary, _LONG)
    }

    def find(results: Results) -> Found:
        losses = {
            length: {ratio: results.values(run.name) for ratio, run in runs.items()}
            for length, runs in at.items()
        }
        here = losses[ordinary]
        others = [ratio for ratio in common.RATIOS if ratio != (1, 1)]
        noise = results.noise()
        pairs = [((1, 1), ratio) for ratio in others]
        pairs += [(common.RATIOS[1], common.RATIOS[0]), (common.RATIOS[-2], common.RATIOS[-1])]
        checks = [
            lower(
                here[better],
                here[worse],
                f"{_says(better)} has a lower loss than {_says(worse)}",
                noise,
            )
            for better, worse in pairs
        ]
        first, last = common.RATIOS[0], common.RATIOS[-1]

        def lead(length: int) -> list[float]:
            pairs = zip(losses[length][first], losses[length][last], strict=True)
            return [block - token for block, token in pairs]

        checks.append(
            lower(
                lead(_SHORT),
                lead(_LONG),
                f"loss at 5:1 less loss at 1:5 is lower with blocks of {_SHORT} than of {_LONG}",
                None if noise is None else noise * 2**0.5,  # differences of differences
            )
        )
        return Found(
            checks,
            ["layers, block : token", *(f"loss, blocks of {length}" for length in losses)],
            [
                [_says(ratio)]
                + [spread(of[ratio]) if ratio in of else "" for of in losses.values()]
                for ratio in common.RATIOS
            ],
            [
                Chart(
                    "allocation",
                    "Layers of block decoder and token decoder",
                    "layers, block : token",
                    common.LOSS,
                    [
                        Series(f"blocks of {length}", list(map(_place, of)), list(of.values()))
                        for length, of in losses.items()
                    ],
                    ticks={_place(ratio): _says(ratio) for ratio in common.RATIOS},
                )
            ],
        )

    return Study(
        "allocation",
        "1. Loss against the share of layers in block and token decoder is U-shaped, best at 1:1; "
        "shorter blocks favour the block decoder, longer ones the token decoder.",
        [run for runs in at.values() for run in runs.values()],
        [],
        find,
    )
