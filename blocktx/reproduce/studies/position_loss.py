"""Finding 2: loss by position in the block."""

import statistics

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Chart, Found, Results, Series, Study, lower, spread


def study(base: Base) -> Study:
    length = base.block.model.block_length
    runs = {ratio: common.allocated(base, ratio, length) for ratio in common.RATIOS}

    def find(results: Results) -> Found:
        def by_position(ratio: tuple[int, int]) -> list[list[float]]:
            return [
                [losses[k] for losses in results.values(runs[ratio].name, "loss_by_position")]
                for k in range(length)
            ]

        even, block, token = by_position((1, 1)), by_position((5, 1)), by_position((1, 5))
        means = [statistics.mean(losses) for losses in even]
        noise = results.noise()
        inner = min(range(1, length - 1), key=means.__getitem__)  # the bottom of the U
        checks = [
            lower(even[inner], even[0], f"position {inner + 1} is below the first at 1:1", noise),
            lower(even[inner], even[-1], f"position {inner + 1} is below the last at 1:1", noise),
            lower(block[0], token[0], "5:1 has a lower loss at the first position than 1:5", noise),
        ]
        checks += [
            lower(token[k], block[k], f"1:5 has a lower loss at position {k + 1} than 5:1", noise)
            for k in range(1, length)
        ]
        return Found(
            checks,
            ["layers, block : token", *(f"position {k + 1}" for k in range(length))],
            [[f"{b}:{t}", *map(spread, by_position((b, t)))] for b, t in common.RATIOS],
            [
                Chart(
                    "position_loss",
                    "Loss by position in the block",
                    "position in the block",
                    common.LOSS,
                    [
                        Series(f"{b}:{t}", range(1, length + 1), by_position((b, t)))
                        for b, t in common.RATIOS
                    ],
                    ticks={k: str(k) for k in range(1, length + 1)},
                )
            ],
        )

    return Study(
        "position_loss",
        "2. Loss by position in the block is U-shaped; a larger block decoder lowers the first "
        "position, a larger token decoder the later ones.",
        list(runs.values()),
        [],
        find,
    )
