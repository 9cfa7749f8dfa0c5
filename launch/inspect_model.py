"""Look inside a model while it reads a text: attention maps, and tokens nearest to the prefixes.

    python launch/inspect_model.py --checkpoint=runs/quickstart --output=look --prompt="My fellow \
citizens of the Senate and House of Representatives: the state of the Union is strong, and the \
people of the United States are at peace with all the nations of the world."

writes block_attention.png and token_attention.png (the mean over the text's blocks) into --output.
It prints the share of attention on the first block and, for each block, the tokens nearest to the
inputs of the token decoder. A text of 10 to 20 blocks gives maps that can be read.
"""

import pathlib

from absl import flags

import blocktx
from blocktx import command_line, inspect_model, plotting
from blocktx.progress_bar import ProgressBar

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder (its newest checkpoint) or one step's."
)
_PROMPT = flags.DEFINE_string("prompt", None, "The text that the model reads, some 10 blocks.")
_OUTPUT = flags.DEFINE_string("output", ".", "The folder to write pictures into.")
_COUNT = flags.DEFINE_integer("count", 5, "How many of the nearest tokens to list.")


def main() -> None:
    with ProgressBar(total=4, desc="load", unit=" steps") as bar:
        _inspect(bar)


def _inspect(bar: ProgressBar) -> None:
    def next_step(name: str) -> None:
        bar.update()
        bar.set_description(name)

    engine = blocktx.load(_CHECKPOINT.value)
    model, params, tokenizer = engine.model, engine.params, engine.tokenizer
    text = inspect_model.in_blocks(tokenizer.encode(_PROMPT.value), model, tokenizer.pad_id)
    blocks = [repr(tokenizer.decode(row[mask].tolist())) for row, mask in zip(*text, strict=True)]
    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)

    def save(name: str, weights, labels: list[str], title: str) -> None:
        plotting.save(inspect_model.plot_attention(weights, labels, title), output / name)
        print(f"{title}: {output / name}")

    next_step("block decoder")
    weights = inspect_model.block_attention(model, params, *text)
    group = getattr(model.config, "embeddings_per_block", 1)
    labels = [block for block in blocks for _ in range(group)]
    kind = "block decoder" if model.config.kind == "block" else "vanilla model"
    save("block_attention.png", weights, labels, f"attention of the {kind}")
    share_L, even = inspect_model.first_block_share(weights, group)
    for layer, share in enumerate(share_L):
        print(f"  layer {layer}: {share:.0%} on the first block (uniform attention: {even:.0%})")
    if model.config.kind == "vanilla":
        return
    next_step("token decoder")
    if len(blocks) > 1:
        weights = inspect_model.token_attention(model, params, *text).mean(0)
        labels = inspect_model.token_labels(model.config)
        save("token_attention.png", weights, labels, "attention of the token decoder, mean")
    next_step("nearest tokens")
    tokens, cosines = inspect_model.nearest_tokens(model, params, *text, count=_COUNT.value)
    what = "prefix" if model.config.conditioning == "prefix" else "vector"
    print(f"nearest tokens to each {what} (cosine), by the block that was read last")
    for block, found_PxV, cosine_PxV in zip(blocks, tokens.tolist(), cosines, strict=True):
        print(block)
        for i, (found, cosine) in enumerate(zip(found_PxV, cosine_PxV, strict=True)):
            near = (
                f"{tokenizer.decode([t])!r} {c:.2f}" for t, c in zip(found, cosine, strict=True)
            )
            print(f"  {what} {i}: {', '.join(near)}")


if __name__ == "__main__":
    command_line.run(main, required=("checkpoint", "prompt"))
