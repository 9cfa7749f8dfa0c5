"""The gain at equal quality: loss against throughput and memory (paper, figures 2 and 3)."""

import dataclasses
import itertools
import math
import statistics

from blocktx import benchmark
from blocktx.config import ModelConfig
from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import (
    Chart,
    Check,
    Found,
    Panels,
    Results,
    Run,
    Series,
    Speed,
    Study,
    holds,
    spread,
)

_GAIN = 3.0  # times vanilla's throughput that are wanted at equal loss
_RATES = (0.5, 1.0, 2.0)  # of the configured learning rate, in the sweep
_SWEEP = 4  # the part of the steps that the sweep takes is one in so many


def study(base: Base) -> Study:
    runs = _runs(base)
    models = {name: run.config.model for name, run in runs.items()}
    speeds = {
        name: Speed(
            f"frontier_{name}",
            models,
            dict.fromkeys(models, prompt),
            new,
            base.scale.batch_size,
        )
        for name, (prompt, new) in base.scale.frontier_settings.items()
    }

    def find(results: Results) -> Found:
        losses = {name: results.values(run.name) for name, run in runs.items()}
        sizes = {
            name: str(results.values(run.name, "non_embedding")[0]) for name, run in runs.items()
        }
        checks: list[Check] = []
        header, charts = ["model", "non-embedding", "loss"], []
        rows = [[common.describe(models[name]), sizes[name], spread(losses[name])] for name in runs]
        for setting, speed in speeds.items():
            memory = _memory(models, speed)
            header.append(f"{setting}: MB a row")
            for row, name in zip(rows, runs, strict=True):
                row.append(f"{memory[name][0]:.2f}")
            picture = common.setting(speed)
            of_memory = _chart(picture, "cache and logits (MB a row)", models, losses, memory)
            if not results.rates(speed.name):
                charts.append(of_memory)
                continue
            rates = results.speeds[speed.name]["repeats"]
            header.append(f"{setting}: tokens/s")
            for row, name in zip(rows, runs, strict=True):
                row.append(f"{statistics.median(rates[name]):.0f}")
            checks += _gains(setting, models, losses, rates)
            of_speed = _chart(picture, "generated tokens per second", models, losses, rates)
            charts += [of_speed, of_memory]
        pictures = [Panels("frontier", "Loss against throughput and memory", charts)]
        return Found(checks, header, rows, pictures)

    return Study(
        "frontier",
        "The gain at equal quality: a block model has several times vanilla's throughput at equal "
        "loss.",
        list(runs.values()),
        list(speeds.values()),
        find,
    )


def learning_rate(base: Base) -> Study:
    """Return the sweep that the learning rates of the frontier's runs come from."""
    sweep = {
        name: {rate: _with_rate(run, rate) for rate in _RATES} for name, run in _runs(base).items()
    }

    def find(results: Results) -> Found:
        checks, rows = [], []
        for name, runs in sweep.items():
            losses = {rate: results.values(run.name) for rate, run in runs.items()}
            mean = {rate: statistics.mean(of) for rate, of in losses.items()}
            best = min(mean, key=mean.__getitem__)
            chosen = runs[1.0].config.optimizer.learning_rate
            checks.append(
                holds(best == 1.0, f"{name}: {chosen:g} is best", f"{best * chosen:g} is best")
            )
            rows.append([name, f"{chosen:g}", *map(spread, losses.values())])
        header = ["run", "learning rate", *(f"loss at {rate:g} times it" for rate in _RATES)]
        return Found(checks, header, rows, [])

    return Study(
        "learning_rate",
        f"The frontier's learning rates are the best of three, in 1/{_SWEEP} of the steps.",
        [run for runs in sweep.values() for run in runs.values()],
        [],
        find,
    )


def _runs(base: Base) -> dict[str, Run]:
    """Return the frontier's runs by name; those that are also in other studies have their name."""
    others = [common.vanilla(base), *(common.of_length(base, length) for length in common.LENGTHS)]
    shared = {run.config: run for run in others}
    return {name: shared.get(config, Run(name, config)) for name, config in base.frontier.items()}


def _with_rate(run: Run, times: float) -> Run:
    short = common.shortened(run.config, _SWEEP)
    rate = short.optimizer.learning_rate * times
    optimizer = dataclasses.replace(short.optimizer, learning_rate=rate)
    return Run(f"{run.name}_rate_{times:g}", dataclasses.replace(short, optimizer=optimizer))


def _memory(models: dict[str, ModelConfig], speed: Speed) -> dict[str, list[float]]:
    """Return counted MB of the cache and the logits of one row, by model."""
    memory = {}
    for name, config in models.items():
        prompt, new = speed.prompt_tokens[name], speed.new_tokens
        roomy = benchmark.with_room(config, prompt + new)
        memory[name] = [benchmark.counted_bytes(roomy, prompt, new) / 1e6]
    return memory


def _families(models: dict[str, ModelConfig]) -> dict[str, list[str]]:
    families: dict[str, list[str]] = {}
    for name, model in models.items():
        families.setdefault(common.describe(model).partition(",")[0], []).append(name)
    return families


def _chart(
    setting: str,
    xlabel: str,
    models: dict[str, ModelConfig],
    losses: dict[str, list[float]],
    x: dict[str, list[float]],
) -> Chart:
    series = []
    for family, names in _families(models).items():
        names = sorted(names, key=lambda name: statistics.median(x[name]))
        series.append(
            Series(
                family,
                [statistics.median(x[name]) for name in names],
                [losses[name] for name in names],
                joined=len(names) > 1,
                point_labels=[common.describe(models[name]).rpartition(", ")[2] for name in names],
                x_range=[(min(x[name]), max(x[name])) for name in names],
            )
        )
    return Chart("frontier", setting, xlabel, common.LOSS, series, log="x")


def _gains(
    setting: str,
    models: dict[str, ModelConfig],
    losses: dict[str, list[float]],
    rates: dict[str, list[float]],
) -> list[Check]:
    """Compare block models with the line through vanilla's, where it has their loss or rate."""
    points = {
        name: (statistics.mean(losses[name]), math.log(statistics.median(rates[name])))
        for name in models
    }
    vanilla = sorted(points[name] for name in models if models[name].kind == "vanilla")
    blocks = {name: points[name] for name in models if models[name].kind == "block"}
    ratios = {
        name: math.exp(rate - at)
        for name, (loss, rate) in blocks.items()
        if (at := _interpolate(vanilla, loss)) is not None
    }
    by_rate = sorted((rate, loss) for loss, rate in vanilla)
    gaps = {
        name: at - loss
        for name, (loss, rate) in blocks.items()
        if (at := _interpolate(by_rate, rate)) is not None
    }
    return [
        _best(
            ratios,
            _GAIN,
            f"{setting}: {_GAIN:g} times vanilla's throughput at equal loss",
            _list({name: f"{ratio:.1f}x" for name, ratio in ratios.items()})
            or "no block model has a loss between those of the vanilla models",
        ),
        _best(
            gaps,
            0.0,
            f"{setting}: a lower loss than vanilla at equal throughput",
            _list({name: f"{gap:+.4f}" for name, gap in gaps.items()})
            or "no block model is as slow as a vanilla model",
        ),
    ]


def _best(gains: dict[str, float], wanted: float, statement: str, seen: str) -> Check:
    """Check whether the largest gain is above `wanted`; undecided if nothing can be compared."""
    if not gains:
        return Check(statement, seen, "undecided")
    return holds(max(gains.values()) > wanted, statement, seen)


def _interpolate(line: list[tuple[float, float]], x: float) -> float | None:
    """Return y at x on the line through sorted points; None outside of them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y0
    return None


def _list(seen: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in seen.items())
