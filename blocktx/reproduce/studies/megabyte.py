"""Finding 10: throughput against MEGABYTE's."""

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Found, Results, Run, Study, holds, lower, spread


def study(base: Base) -> Study:
    run, ours = Run("megabyte", base.megabyte), common.ordinary(base)
    models = {"block": base.fast_block, "MEGABYTE": base.fast_megabyte}
    speed = common.speed_of("megabyte", base, models)

    def find(results: Results) -> Found:
        speeds = results.rates(speed.name)
        losses = {"block": results.values(ours.name), "MEGABYTE": results.values(run.name)}
        ratio = speeds["block"] / speeds["MEGABYTE"]
        return Found(
            [
                holds(ratio > 1.5, "more than 1.5 times MEGABYTE's throughput", f"{ratio:.2f}x"),
                lower(
                    losses["block"], losses["MEGABYTE"], "the loss is lower, too", results.noise()
                ),
            ],
            ["model", "loss", "tokens/s"],
            [[name, spread(losses[name]), f"{speeds[name]:.0f}"] for name in models],
            [],
        )

    return Study(
        "megabyte", "10. More than 1.5 times MEGABYTE's throughput.", [ours, run], [speed], find
    )
