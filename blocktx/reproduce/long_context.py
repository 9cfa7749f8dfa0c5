"""Finding 5: loss by place in a long context."""

import dataclasses
import itertools
import statistics

from blocktx.reproduce import common
from blocktx.reproduce.scale import Base
from blocktx.reproduce.study import Chart, Found, Results, Run, Series, Study, lower, spread


def study(base: Base) -> Study:
    context, width = base.scale.long_context, base.scale.curve_bin
    config = base.vary(context_length=context)
    times = context // base.block.model.context_length
    rows = max(1, config.training.batch_size // times)  # as many tokens a step
    training = dataclasses.replace(config.training, batch_size=rows, microbatches=1)
    run = Run("long_context", dataclasses.replace(config, training=training), curve_bin=width)

    def find(results: Results) -> Found:
        curves = results.losses(run.name, "loss_by_place")
        bins = [list(losses) for losses in zip(*curves, strict=True)]
        places = [(i + 0.5) * width for i in range(len(bins))]
        quarter = max(1, len(bins) // 4)

        def mean(begin: int, end: int) -> list[float]:
            return [statistics.mean(curve[begin:end]) for curve in curves]

        quarters = [mean(i, i + quarter) for i in range(0, len(bins), quarter)][:4]
        return Found(
            [
                lower(after, before, f"quarter {i} of the context has a lower loss than the last")
                for i, (before, after) in enumerate(itertools.pairwise(quarters), 2)
            ],
            ["place in the context", "loss"],
            [
                [f"{i * width}-{(i + 1) * width - 1}", spread(losses)]
                for i, losses in enumerate(bins)
            ],
            [
                Chart(
                    "long_context",
                    f"Loss by place in contexts of {context} tokens",
                    "place in the context (tokens)",
                    common.LOSS,
                    [Series("block", places, bins)],
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
