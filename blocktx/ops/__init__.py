"""How is each operation computed?

Arrays in, arrays out: no Flax, no parameters.

    norm.py             LayerNorm
    rotary.py           rotary position embeddings
    gelu.py             exact GELU
    attention.py        attention over a cache
    short_attention.py  attention within a block, Pallas kernel for TPU
    flash_attention.py  attention over long sequences, splash attention for TPU
    cross_entropy.py    cross-entropy without materialized logits
"""

from blocktx.ops.attention import attend, formulation
from blocktx.ops.cross_entropy import cross_entropy_sum
from blocktx.ops.flash_attention import flash_attention, is_long
from blocktx.ops.gelu import gelu
from blocktx.ops.norm import normalize
from blocktx.ops.rotary import rotary, rotary_by_product
from blocktx.ops.short_attention import is_short, short_attention

__all__ = [
    "attend",
    "cross_entropy_sum",
    "flash_attention",
    "formulation",
    "gelu",
    "is_long",
    "is_short",
    "normalize",
    "rotary",
    "rotary_by_product",
    "short_attention",
]
