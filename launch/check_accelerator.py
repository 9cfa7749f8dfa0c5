"""Check an accelerator in ten minutes: correctness and speed, as JSON and as a page.

    python launch/check_accelerator.py --output=check

writes check.json and check.md, to attach to a bug report. It compares every formulation that the
device can run with the plain one, trains, compares greedy decoding with teacher forcing, and
measures a block and a vanilla model. The exit code is 1 if a check fails.
"""

import dataclasses
import json

from absl import flags

from blocktx import command_line
from blocktx.benchmark import Sizes, check_accelerator, page, passed
from blocktx.config import BlockConfig, StackConfig, UserError
from blocktx.files import write_atomic
from blocktx.parallel import prepare_gpu
from blocktx.progress_bar import ProgressBar

_CONFIG = flags.DEFINE_string(
    "config", "configs/paper.py:block_170m", "FILE.py or FILE.py:NAME; a block model to measure."
)
_OUTPUT = flags.DEFINE_string("output", None, "Path of the two files, without their endings.")
_TINY = flags.DEFINE_bool("tiny", False, "Everything at a size for a CPU, in a minute.")

_STACK = StackConfig(layers=2, width=256, heads=4)
_SMALL = BlockConfig(
    vocab_size=1000, context_length=1024, block_decoder=_STACK, token_decoder=_STACK
)
_TINY_STACK = StackConfig(layers=1, width=64, heads=2)
_TINY_SMALL = BlockConfig(
    vocab_size=50, context_length=128, block_decoder=_TINY_STACK, token_decoder=_TINY_STACK
)
_TINY_SIZES = Sizes(
    formulations=("token_attention", "norm", "loss", "token_cached_attention"),
    matrix=256,
    read_bytes=2**20,
    batch_size=2,
    steps=2,
    rows=2,
    prompt_tokens=16,
    new_tokens=8,
    batch_sizes=(1,),
    repeats=1,
)


def main() -> None:
    config = command_line.read_config(_CONFIG.value)
    if config.model.kind != "block":
        raise UserError(f"--config: {_CONFIG.value} is a vanilla model; use a block model")
    prepare_gpu(training=False)
    small = _TINY_SMALL if _TINY.value else _SMALL
    small = dataclasses.replace(small, compute_dtype=config.model.compute_dtype)
    sizes = _TINY_SIZES if _TINY.value else Sizes()
    with ProgressBar(total=5, unit=" sections") as bar:
        done = []

        def said(name: str) -> None:
            bar.count(len(done))
            done.append(name)

        found = check_accelerator(config, small, sizes, said)
    text = page(found)
    write_atomic(f"{_OUTPUT.value}.json", json.dumps(found, indent=2) + "\n")
    write_atomic(f"{_OUTPUT.value}.md", text)
    print(text)
    if not passed(found):
        command_line.fail(f"a check failed; see {_OUTPUT.value}.md", code=1)


if __name__ == "__main__":
    command_line.run(main, required=("output",))
