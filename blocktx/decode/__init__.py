"""How is text generated?

sampling.py    sampling parameters
sampler.py     the choice of a token from logits
prompts.py     prompts laid out in whole blocks
block.py       one block of each row
loop.py        batches: jitted prefill and decoding loop
generate.py    batches: host code around the loop
rows.py        continuous decoding: jitted functions over a fixed number of rows
request.py     continuous decoding: a request's part of the arrays
continuous.py  continuous decoding: requests admitted to free rows
stream.py      text of growing token sequences
inputs.py      prompts and stop conditions as users give them
texts.py       token ids of prompts to texts, as one batch or continuously
engine.py      text in, text out

`generate` works on arrays in host memory and cannot be traced. The functions below it can. They are
jitted and pure, and their state is a pytree:

    prompts = layout_prompts(tokens_BxT, mask_BxT, model.config, max_new_tokens=64, ...)
    sampling = Sampling.create(SamplingConfig(temperature=0), rows=len(prompts.end_B))
    state = prefill(model, params, prompts)                         a DecodeState
    state = decode_blocks(model, params, state, sampling, 8, 0)     8 blocks; donates the state

`ContinuousDecoder` serves `Engine.generate`, if there are more prompts than rows, and the HTTP
server in `blocktx.serve`.
"""

from blocktx.decode.continuous import ContinuousDecoder
from blocktx.decode.engine import Engine, Generation, load
from blocktx.decode.generate import generate, use_mesh
from blocktx.decode.inputs import encode_text
from blocktx.decode.loop import DecodeState, decode_blocks, prefill
from blocktx.decode.prompts import Placement, Prompts, bucket, layout_prompts
from blocktx.decode.request import Request, Update
from blocktx.decode.rows import decode_rows, init_rows
from blocktx.decode.sampling import Sampling, SamplingConfig, seed_words
from blocktx.decode.stream import Continuation

__all__ = [
    "Continuation",
    "ContinuousDecoder",
    "DecodeState",
    "Engine",
    "Generation",
    "Placement",
    "Prompts",
    "Request",
    "Sampling",
    "SamplingConfig",
    "Update",
    "bucket",
    "decode_blocks",
    "decode_rows",
    "encode_text",
    "generate",
    "init_rows",
    "layout_prompts",
    "load",
    "prefill",
    "seed_words",
    "use_mesh",
]
