"""Finding 5: loss by place in a long context."""

import dataclasses
import itertools

import numpy as np

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Chart, Found, Results, Run, Series, Study, lower, spread


def study(base: Base) -> Study:
    context, width = base.scale.long_context, base.scale.curve_bin
    config = base.vary(context_length=context)
    times = context // base.block.model.context_length
    rows = max(1, config.training.batch_size // times)  # as many tokens a step
    training = dataclasses.replace(config.training, batch_size=rows, microbatches=1)
    run = Run("long_context", dataclasses.replace(config, training=training), curve_bin=width)

    def find(results: Results) -> Found:
        curves = results.values(run.name, "loss_by_place")
        places = [begin for begin, _ in curves[0]]
        bins = [[loss for _, loss in at] for at in zip(*curves, strict=True)]
        quarters = [part.mean(0).tolist() for part in np.array_split(np.array(bins), 4)]
        noise = results.noise()
        return Found(
            [
                lower(
                    after,
                    before,
                    f"quarter {i} of the context has a lower loss than the one before",
                    noise,
                )
                for i, (before, after) in enumerate(itertools.pairwise(quarters), 2)
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
                    [Series("block", [begin + width / 2 for begin in places], bins)],
                )
            ],
        )

    return Study(
        "long_context",
        "5. Loss by place in a long context keeps falling to its end.",
        [run],
        [],
        find,
    )
