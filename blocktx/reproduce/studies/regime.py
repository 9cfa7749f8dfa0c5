"""Is the scale one at which the findings can be seen at all?

The findings are about global context. They can be seen if the models use it, and if training has
gone on long enough for the order of models to be settled.
"""

import statistics

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import (
    Chart,
    Check,
    Found,
    Results,
    Series,
    Study,
    above_zero,
    holds,
    spread,
)

_MOST_GAIN = 0.03  # of the loss, in the last doubling of the steps


def study(base: Base) -> Study:
    whole = {"vanilla": common.vanilla(base), "block": common.ordinary(base)}
    half = {name: common.halved(run) for name, run in whole.items()}

    def find(results: Results) -> Found:
        checks: list[Check] = []
        rows, curves = [], []
        for name, run in whole.items():
            loss, before = results.values(run.name), results.values(half[name].name)
            gain = 1 - statistics.mean(loss) / statistics.mean(before)
            checks += [
                above_zero(
                    results.values(run.name, "fall"),
                    f"{name}: the same tokens cost less in the last quarter of a context than in "
                    "the second",
                ),
                above_zero(
                    results.values(run.name, "exchange"),
                    f"{name}: they cost more if the first half of the context is exchanged",
                ),
                holds(
                    gain < _MOST_GAIN,
                    f"{name}: the last doubling of the steps gains less than {_MOST_GAIN:.0%}",
                    f"{gain:.1%}",
                ),
            ]
            model = run.config.model
            rows.append(
                [
                    common.describe(model),
                    f"{results.values(run.name, 'non_embedding')[0]:,}",
                    f"{model.vocab_size:,}",
                    f"{model.context_length:,}",
                    f"{results.values(run.name, 'tokens')[0] / 1e6:.2f}M",
                    spread(loss),
                    spread(before),
                    f"{gain:.1%}",
                ]
            )
            curve = results.values(run.name, "loss_by_place")
            places = [begin for begin, _ in curve[0]]
            middle = (places[1] - places[0]) / 2
            bins = [[loss for _, loss in at] for at in zip(*curve, strict=True)]
            curves.append(Series(name, [begin + middle for begin in places], bins))
        return Found(
            checks,
            [
                "layers x width",
                "non-embedding",
                "vocabulary",
                "context",
                "tokens",
                "loss",
                "loss in half the steps",
                "gain",
            ],
            rows,
            [
                Chart(
                    "regime",
                    "Loss by place in the context",
                    "place in the context (tokens)",
                    common.LOSS,
                    curves,
                )
            ],
        )

    return Study(
        "regime",
        "0. The models use their context, and their learning curves are no longer steep.",
        [*whole.values(), *half.values()],
        [],
        find,
    )
