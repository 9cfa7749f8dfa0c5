"""How is text generated?

prompts.py   prompts laid out in whole blocks
sampling.py  samplers
loop.py      jitted prefill and decoding loop
generate.py  token batches continued by the loop
stream.py    text of growing token sequences
engine.py    text in, text out
"""

from blocktx.decode.engine import Engine, load
from blocktx.decode.generate import generate
from blocktx.decode.loop import advance, prefill
from blocktx.decode.prompts import Placement, Prompts, bucket, place_prompts
from blocktx.decode.sampling import Sampling

__all__ = [
    "Engine",
    "Placement",
    "Prompts",
    "Sampling",
    "advance",
    "bucket",
    "generate",
    "load",
    "place_prompts",
    "prefill",
]
