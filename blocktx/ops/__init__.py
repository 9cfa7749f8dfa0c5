"""How is each operation computed?

Arrays in, arrays out: no Flax, no parameters.

    norm.py             LayerNorm and RMSNorm
    rotary.py           rotary position embeddings
    gelu.py             exact GELU
    attention.py        attention, plain and over a cache
    attention_kernels.py  when the kernels below apply; they import Pallas on first use
    short_attention.py  attention within a block, Pallas kernel for TPU
    short_attention_kernels.py  the bodies of its kernels
    flash_attention.py  attention over long sequences, splash attention for TPU
    cross_entropy.py    cross-entropy without materialized logits
"""

from blocktx.ops.attention import attend, attend_by_products, choose_attention, repeat_heads
from blocktx.ops.attention_kernels import (
    attend_cudnn,
    attend_short,
    attend_splash,
    fits_products,
    fits_short,
    fits_splash,
    why_not_cudnn,
)
from blocktx.ops.cross_entropy import cross_entropy_sum
from blocktx.ops.gelu import gelu
from blocktx.ops.norm import normalize
from blocktx.ops.rotary import rotary, rotary_by_head, rotary_by_product

__all__ = [
    "attend",
    "attend_by_products",
    "attend_cudnn",
    "attend_short",
    "attend_splash",
    "choose_attention",
    "cross_entropy_sum",
    "fits_products",
    "fits_short",
    "fits_splash",
    "gelu",
    "normalize",
    "repeat_heads",
    "rotary",
    "rotary_by_head",
    "rotary_by_product",
    "why_not_cudnn",
]
