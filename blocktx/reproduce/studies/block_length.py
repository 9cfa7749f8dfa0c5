"""Finding 3: loss and throughput by block length."""

import dataclasses
import itertools
import statistics

import numpy as np

from blocktx.config import BlockConfig
from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import (
    Chart,
    Check,
    Found,
    Results,
    Series,
    Study,
    holds,
    lower,
    spread,
)

_TICKS = {length: str(length) for length in common.LENGTHS}


def study(base: Base) -> Study:
    runs = {length: common.of_length(base, length) for length in common.LENGTHS}

    def fast(length: int) -> BlockConfig:
        prefix = min(length, base.fast_block.prefix_length)
        return dataclasses.replace(base.fast_block, block_length=length, prefix_length=prefix)

    models = {f"length_{length}": fast(length) for length in common.LENGTHS}
    models["vanilla"] = base.fast_vanilla
    speed = common.speed_of("block_length", base, models)

    def find(results: Results) -> Found:
        losses = {length: results.values(runs[length].name) for length in common.LENGTHS}
        vanilla, noise = results.values("vanilla"), results.noise()
        checks = [
            lower(losses[a], losses[b], f"blocks of {a} have a lower loss than of {b}", noise)
            for a, b in itertools.pairwise(common.LENGTHS)
        ]
        mean = [statistics.mean(losses[length]) for length in common.LENGTHS]
        correlation = float(np.corrcoef(np.log2(common.LENGTHS), mean)[0, 1])
        straight = holds(
            correlation > 0.95,
            "loss rises linearly with the logarithm of the length",
            f"correlation {correlation:.3f}",
        )
        checks.append(straight if noise is not None else straight._replace(verdict="undecided"))
        charts = [
            Chart(
                "block_length_loss",
                "Loss by block length",
                "tokens in a block",
                common.LOSS,
                [
                    Series("block", common.LENGTHS, list(losses.values())),
                    Series("vanilla", [common.LENGTHS[0], common.LENGTHS[-1]], [vanilla] * 2),
                ],
                log="x",
                ticks=_TICKS,
            )
        ]
        rows = [[f"blocks of {length}", spread(losses[length]), ""] for length in common.LENGTHS]
        rows.append(["vanilla", spread(vanilla), ""])
        if rates := results.rates(speed.name):
            of_length = [rates[f"length_{length}"] for length in common.LENGTHS]
            checks += _speed_checks(of_length, rates["vanilla"])
            charts.append(_speed_chart(common.setting(speed), of_length, rates["vanilla"]))
            for row, rate in zip(rows, [*of_length, rates["vanilla"]], strict=True):
                row[-1] = f"{rate:.0f}"
        return Found(checks, ["", "loss", "tokens/s"], rows, charts)

    return Study(
        "block_length",
        "3. As blocks grow, loss rises log-linearly and throughput grows exponentially.",
        [*runs.values(), common.vanilla(base)],
        [speed],
        find,
    )


def _speed_checks(rates: list[float], vanilla: float) -> list[Check]:
    of_4 = rates[common.LENGTHS.index(4)]
    return [
        holds(
            all(a < b for a, b in itertools.pairwise(rates)),
            "throughput grows with each doubling",
            ", ".join(f"{b / a:.2f}x" for a, b in itertools.pairwise(rates)),
        ),
        holds(of_4 > vanilla, "blocks of 4 decode faster than vanilla", f"{of_4 / vanilla:.1f}x"),
    ]


def _speed_chart(setting: str, rates: list[float], vanilla: float) -> Chart:
    return Chart(
        "block_length_speed",
        setting,
        "tokens in a block",
        "generated tokens per second",
        [
            Series("block", common.LENGTHS, [[rate] for rate in rates]),
            Series("vanilla", [common.LENGTHS[0], common.LENGTHS[-1]], [[vanilla]] * 2),
        ],
        log="xy",
        ticks=_TICKS,
    )
