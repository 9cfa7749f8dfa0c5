"""Finding 9: a block model from a vanilla one, in a tenth of the steps."""

import statistics

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Check, Found, Results, Run, Study, lower, spread


def study(base: Base) -> Study:
    whole = common.projection(base)
    short = common.shortened(whole.config, 10)
    runs = {
        "vanilla, all steps": common.vanilla(base),
        "block, all steps": whole,
        "uptrained, a tenth": Run("uptrained_tenth", short, uptrained_from=common.vanilla(base)),
        "from scratch, a tenth": Run("scratch_tenth", short),
    }

    def find(results: Results) -> Found:
        losses = {label: results.values(run.name) for label, run in runs.items()}
        whole, uptrained, scratch = (statistics.mean(losses[label]) for label in list(losses)[1:])
        closed, verdict = "there is no gap", "undecided"
        if scratch > whole:
            share = (scratch - uptrained) / (scratch - whole)
            closed, verdict = f"{share:.2f} of it", "agrees" if share > 0.9 else "disagrees"
        return Found(
            [
                lower(
                    losses["uptrained, a tenth"],
                    losses["from scratch, a tenth"],
                    "uptraining in a tenth of the steps beats training from scratch in as many",
                    results.noise(),
                ),
                Check(
                    "it closes nearly all (0.9) of the gap to training in all steps",
                    closed,
                    verdict,
                ),
            ],
            ["model", "steps", "loss"],
            [
                [label, str(results.values(run.name, "steps")[0]), spread(losses[label])]
                for label, run in runs.items()
            ],
            [common.compared("uptraining", "Uptraining", losses)],
        )

    return Study(
        "uptraining",
        "9. Uptraining with 10% of the steps nearly reaches pretraining from scratch.",
        list(runs.values()),
        [],
        find,
    )
