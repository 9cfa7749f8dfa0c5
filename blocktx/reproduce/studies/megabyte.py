"""Finding 10: throughput against MEGABYTE's."""

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Found, Results, Run, Study, holds, lower, spread


def study(base: Base) -> Study:
    run, ours = Run("megabyte", base.megabyte), common.ordinary(base)
    models = {"block": base.fast_block, "MEGABYTE": base.fast_megabyte}
    speed = common.speed_of("megabyte", base, models)

    def find(results: Results) -> Found:
        losses = {"block": results.values(ours.name), "MEGABYTE": results.values(run.name)}
        checks = [
            lower(losses["block"], losses["MEGABYTE"], "the loss is lower, too", results.noise())
        ]
        rows = [[name, spread(losses[name])] for name in models]
        header = ["model", "loss"]
        if speeds := results.rates(speed.name):
            ratio = speeds["block"] / speeds["MEGABYTE"]
            statement = "more than 1.5 times MEGABYTE's throughput"
            checks.insert(0, holds(ratio > 1.5, statement, f"{ratio:.2f}x"))
            header.append("tokens/s")
            rows = [[*row, f"{speeds[row[0]]:.0f}"] for row in rows]
        return Found(checks, header, rows, [])

    return Study(
        "megabyte", "10. More than 1.5 times MEGABYTE's throughput.", [ours, run], [speed], find
    )
