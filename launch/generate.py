"""Generate text from a checkpoint.

python launch/generate.py --checkpoint=runs/quickstart --prompt="The state of the Union is"
"""

import itertools

import jax
from absl import flags

import blocktx
from blocktx import command_line
from blocktx.benchmark import decode_throughput, equal_vanilla, random_model
from blocktx.cost import count_params
from blocktx.model import QUANTIZATIONS
from blocktx.progress_bar import elapsed

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder (its newest checkpoint) or one step's."
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [""], "Text to continue; may be repeated. Empty: begin a new document."
)
_QUANTIZE = flags.DEFINE_enum("quantize", None, QUANTIZATIONS, "Keep the kernels as integers.")
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype", None, ["int8"], "Keep keys and values of the cache as integers."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to generate, at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 always takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k likeliest tokens; 0 from all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample from the fewest tokens that together have this probability."
)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Sample from the tokens with this share of the likeliest one's probability."
)
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same text.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends what is written; may be repeated.")
_PLACEMENT = flags.DEFINE_enum(
    "placement",
    None,
    ["pad", "force"],
    "Prompts that are not whole blocks: padded in front (for models trained with random padding) "
    "or forced on the token decoder. By default what fits the checkpoint's training.",
)
_STREAM = flags.DEFINE_boolean(
    "stream", False, "Print blocks as they are finished; for one prompt."
)
_AGAINST = flags.DEFINE_enum(
    "against",
    None,
    ["vanilla"],
    "Also measure decode throughput beside that of a vanilla model (with random weights, which do "
    "not change its speed) of as many non-embedding parameters, at the same prompt and length.",
)


def _compare(engine: blocktx.Engine, prompt_tokens: int, new_tokens: int) -> None:
    ours, theirs = engine.config.model, equal_vanilla(engine.config.model)
    models = [(engine.model, engine.params), random_model(theirs)]
    names = [f"{c.kind} ({count_params(c).non_embedding / 1e6:.1f}M)" for c in (ours, theirs)]
    print(
        f"\nDecode throughput in tokens/s on {jax.devices()[0].device_kind}, prompt of "
        f"{prompt_tokens} and {new_tokens} new tokens, prefill included\n"
        f"(non-embedding parameters in brackets)\n"
        f"{'batch':>5}  {names[0]:>16}  {names[1]:>16}  {'ratio':>5}"
    )
    for batch_size in (1, 32):
        with elapsed("compiling and measuring"):
            block, vanilla = decode_throughput(
                models, batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens
            )
        print(f"{batch_size:>5}  {block:>16.0f}  {vanilla:>16.0f}  {block / vanilla:>5.1f}")


def main() -> None:
    with elapsed("loading"):
        engine = blocktx.load(
            _CHECKPOINT.value, quantize=_QUANTIZE.value, cache_dtype=_CACHE_DTYPE.value
        )
    if _AGAINST.value and engine.config.model.kind != "block":
        raise ValueError("--against: the checkpoint is of a vanilla model itself")
    prompts = _PROMPT.value
    if _STREAM.value and len(prompts) > 1:
        raise ValueError(f"--stream: got {len(prompts)} prompts, prints one; leave it out")
    with elapsed("compiling and generating"):
        result = engine.generate(
            prompts[0] if _STREAM.value else prompts,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
            min_p=_MIN_P.value,
            seed=_SEED.value,
            stop=_STOP.value,
            placement=_PLACEMENT.value,
            stream=_STREAM.value,
        )
        first = next(result, "") if _STREAM.value else ""
    if _STREAM.value:
        for part in itertools.chain(prompts, [first], result):
            print(part, end="", flush=True)
        print()
    else:
        for prompt, text in zip(prompts, result, strict=True):
            print(f"{prompt}{text}" if len(prompts) == 1 else f"--- {prompt}{text}")
    if _AGAINST.value:
        longest = max(len(engine.tokenizer.encode(prompt)) for prompt in prompts)
        _compare(engine, max(longest, 1), _MAX_NEW_TOKENS.value)


if __name__ == "__main__":
    command_line.run(main, required=("checkpoint",))
