"""What does the model compute, and from which parameters?

sharding.py           logical axis names of parameters
layers.py             norm, projections, embedding and MLP of a layer
cache.py              the fixed-shape KV cache
attention.py          self-attention and cached attention of a layer
attention_record.py   attention weights of a run
stack.py              a stack of layers
embedder.py           tokens of a block to block embeddings
block_decoder.py      causal attention over blocks
token_decoder.py      the tokens of one block
block_transformer.py  the three parts as one model; legend of shapes
vanilla.py            the vanilla transformer baseline
build.py              models and parameters from a configuration
params.py             stacked and unstacked parameters
quantize.py           int8 kernels for decoding
loss.py               masked next-token loss by position in the block
"""

from blocktx.model.attention import Attention
from blocktx.model.attention_record import record_attention
from blocktx.model.block_transformer import BlockTransformer
from blocktx.model.build import Model, abstract_params, build, init_params
from blocktx.model.cache import CACHE_AXES, Cache
from blocktx.model.loss import (
    loss_by_position,
    loss_mask,
    masked_cross_entropy,
    next_logits,
    token_losses,
)
from blocktx.model.params import classifier_kernel, for_decoding, stack_layers, unstack_layers
from blocktx.model.quantize import QUANTIZATIONS, Int8Kernel, quantize
from blocktx.model.vanilla import Vanilla

__all__ = [
    "CACHE_AXES",
    "QUANTIZATIONS",
    "Attention",
    "BlockTransformer",
    "Cache",
    "Int8Kernel",
    "Model",
    "Vanilla",
    "abstract_params",
    "build",
    "classifier_kernel",
    "for_decoding",
    "init_params",
    "loss_by_position",
    "loss_mask",
    "masked_cross_entropy",
    "next_logits",
    "quantize",
    "record_attention",
    "stack_layers",
    "token_losses",
    "unstack_layers",
]
