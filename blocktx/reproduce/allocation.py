"""Finding 1: how the layers are best divided between block decoder and token decoder."""

from blocktx.reproduce import common
from blocktx.reproduce.scale import Base
from blocktx.reproduce.study import Chart, Found, Results, Series, Study, lower, spread

_SHORT, _LONG = 2, 8  # block lengths at which the allocation is looked at again


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
            length: {ratio: results.losses(run.name) for ratio, run in runs.items()}
            for length, runs in at.items()
        }
        here = losses[ordinary]
        others = [ratio for ratio in common.RATIOS if ratio != (1, 1)]
        checks = [
            lower(here[1, 1], here[ratio], f"1:1 has a lower loss than {ratio[0]}:{ratio[1]}")
            for ratio in others
        ]
        first, last = common.RATIOS[0], common.RATIOS[-1]

        def lead(length: int) -> list[float]:  # of token-heavy models over block-heavy ones
            pairs = zip(losses[length][first], losses[length][last], strict=True)
            return [block - token for block, token in pairs]

        checks.append(
            lower(
                lead(_SHORT),
                lead(_LONG),
                f"loss at 5:1 less loss at 1:5 is lower with blocks of {_SHORT} than of {_LONG}",
            )
        )
        return Found(
            checks,
            ["layers, block : token", *(f"loss, blocks of {length}" for length in losses)],
            [
                [f"{b}:{t}"] + [spread(of[b, t]) if (b, t) in of else "" for of in losses.values()]
                for b, t in common.RATIOS
            ],
            [
                Chart(
                    "allocation",
                    "Layers of block decoder and token decoder",
                    "layers, block : token",
                    common.LOSS,
                    [
                        Series(
                            f"blocks of {length}", [f"{b}:{t}" for b, t in of], list(of.values())
                        )
                        for length, of in losses.items()
                    ],
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
