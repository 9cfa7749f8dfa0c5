"""A block model of 1 + 1 layers that decodes, with random weights."""

from blocktx.config.model import BlockConfig, StackConfig
from blocktx.model.build import build
from tests.helpers.random_weights import random_params

STACK = StackConfig(layers=1, width=32, heads=2)
NET = build(
    BlockConfig(
        vocab_size=53,
        context_length=128,
        scan_layers=False,
        block_decoder=STACK,
        token_decoder=STACK,
    )
)
PARAMS = random_params(NET)
