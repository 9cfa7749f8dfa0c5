"""Finding 5: loss by position in a long context."""

import dataclasses

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
    spread,
)


def study(base: Base) -> Study:
    context = base.scale.long_context
    config = base.vary(context_length=context)
    times = context // base.block.model.context_length
    rows = max(1, config.training.batch_size // times)  # as many tokens a step
    training = dataclasses.replace(config.training, batch_size=rows, microbatches=1)
    run = Run("long_context", dataclasses.replace(config, training=training))

    def find(results: Results) -> Found:
        curves = results.values(run.name, "loss_by_place")
        places = [begin for begin, _ in curves[0]]
        bins = [[loss for _, loss in at] for at in zip(*curves, strict=True)]
        width = places[1] - places[0]
        return Found(
            [
                above_zero(
                    results.values(run.name, "fall"),
                    "the same tokens cost less in the last quarter of a context than in the second",
                ),
                above_zero(
                    results.values(run.name, "exchange"),
                    "they cost more if the first half of the context is of another place",
                ),
            ],
            ["place in the context", "loss"],
            [
                [f"{begin}-{begin + width - 1}", spread(losses)]
                for begin, losses in zip(places, bins, strict=True)
            ],
            [
                Chart(
                    "long_context",
                    f"Loss by place in contexts of {context} tokens",
                    "place in the context (tokens)",
                    common.LOSS,
                    [Series("", [begin + width / 2 for begin in places], bins)],
                )
            ],
        )

    return Study(
        "long_context",
        "5. Loss by position in a long context keeps falling to its end.",
        [run],
        [],
        find,
    )
