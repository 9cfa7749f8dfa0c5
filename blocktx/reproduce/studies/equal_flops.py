"""Finding 8: block and vanilla at equal training FLOPs."""

import statistics

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Chart, Found, Results, Run, Series, Study, holds, lower, spread


def study(base: Base) -> Study:
    vanilla = common.vanilla(base)
    if base.equal_flops_vanilla != base.vanilla:
        vanilla = Run("flops_vanilla", base.equal_flops_vanilla)
    runs = {name: Run(name, config) for name, config in base.equal_flops_blocks.items()}
    models = {"vanilla": vanilla.config.model}
    models |= {name: run.config.model for name, run in runs.items()}
    speed = common.speed_of("equal_flops", base, models)

    def find(results: Results) -> Found:
        losses = {"vanilla": results.values(vanilla.name)}
        losses |= {name: results.values(run.name) for name, run in runs.items()}
        steps = {name: results.values(run.name, "steps")[0] for name, run in runs.items()}
        steps["vanilla"] = results.values(vanilla.name, "steps")[0]
        rows = [[name, str(steps[name]), spread(losses[name])] for name in models]
        header, speeds = ["model", "steps", "loss"], results.rates(speed.name)
        if not speeds:
            return Found([], header, rows, [])
        as_fast = [name for name in runs if speeds[name] >= speeds["vanilla"]]
        if as_fast:
            best = min(as_fast, key=lambda name: statistics.mean(losses[name]))
            statement = f"{best}, at least as fast as vanilla, has a lower loss"
            checks = [lower(losses[best], losses["vanilla"], statement, results.noise())]
        else:
            statement = "a block model is as fast as vanilla"
            checks = [holds(False, statement, "none is")]
        points = Series(
            "",
            [speeds[name] for name in models],
            [losses[name] for name in models],
            joined=False,
            point_labels=list(models),
        )
        return Found(
            checks,
            [*header, "tokens/s"],
            [[*row, f"{speeds[row[0]]:.0f}"] for row in rows],
            [
                Chart(
                    "equal_flops",
                    f"Equal training FLOPs; {common.setting(speed)}",
                    "generated tokens per second",
                    common.LOSS,
                    [points],
                    log="x",
                )
            ],
        )

    return Study(
        "equal_flops",
        "8. At equal training FLOPs and throughput a block model has a lower loss than vanilla.",
        [vanilla, *runs.values()],
        [speed],
        find,
    )
