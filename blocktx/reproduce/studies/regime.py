"""Is the scale one at which the findings can be seen at all?

The findings are about global context. They can be seen if the models use it, and if training has
gone on long enough for the order of models to be settled.
"""

import statistics

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import (
    Chart,
    Found,
    Results,
    Run,
    Series,
    Study,
    above_zero,
    holds,
    spread,
)

_MOST_GAIN = 0.03  # of the loss, in the last doubling of the steps


def study(base: Base) -> Study:
    """Return the test that a far context lowers the loss."""
    runs = _runs(base)

    def find(results: Results) -> Found:
        checks, rows, curves = [], [], []
        for name, run in runs.items():
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
            ]
            model = results.values(run.name, "asked")[0]["config"]["model"]
            rows.append(
                [
                    name,
                    f"{results.values(run.name, 'non_embedding')[0]:,}",
                    f"{model['vocab_size']:,}",
                    f"{model['context_length']:,}",
                    f"{results.values(run.name, 'tokens')[0] / 1e6:.2f}M",
                    spread(results.values(run.name)),
                ]
            )
            curve = results.values(run.name, "loss_by_place")
            places = [begin for begin, _ in curve[0]]
            middle = (places[1] - places[0]) / 2
            bins = [[loss for _, loss in at] for at in zip(*curve, strict=True)]
            curves.append(Series(name, [begin + middle for begin in places], bins))
        title, xlabel = "Loss by place in the context", "place in the context (tokens)"
        return Found(
            checks,
            ["model", "non-embedding", "vocabulary", "context", "tokens", "loss"],
            rows,
            [Chart("regime", title, xlabel, common.LOSS, curves)],
        )

    return Study("regime", "0a. The models use their context.", list(runs.values()), [], find)


def learning_curve(base: Base) -> Study:
    """Return the test that twice the steps would change little."""
    whole = _runs(base)
    half = {name: common.halved(run) for name, run in whole.items()}

    def find(results: Results) -> Found:
        checks, rows = [], []
        for name, run in whole.items():
            loss, before = results.values(run.name), results.values(half[name].name)
            gain = 1 - statistics.mean(loss) / statistics.mean(before)
            statement = f"{name}: the last doubling of the steps gains less than {_MOST_GAIN:.0%}"
            checks.append(holds(gain < _MOST_GAIN, statement, f"{gain:.1%}"))
            rows.append([name, spread(before), spread(loss), f"{gain:.1%}"])
        return Found(checks, ["model", "loss in half the steps", "loss", "gain"], rows, [])

    return Study(
        "learning_curve",
        "0b. Learning curves are no longer steep.",
        [*whole.values(), *half.values()],
        [],
        find,
    )


def _runs(base: Base) -> dict[str, Run]:
    return {"vanilla": common.vanilla(base), "block": common.ordinary(base)}
