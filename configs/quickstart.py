"""placeholder"""

from blocktx.config import (
    BlockConfig, DataConfig, OptimizerConfig, RunConfig, StackConfig, TrainingConfig, to_config_dict,
)


def get_config():
    stack = StackConfig(layers=2, width=256, heads=8)
    return to_config_dict(RunConfig(
        model=BlockConfig(vocab_size=2048, context_length=256, block_decoder=stack, token_decoder=stack),
        data=DataConfig(), optimizer=OptimizerConfig(), training=TrainingConfig()))
