"""Compile a run's programs for absent chips, and report their cost.

    python launch/compile.py --config=configs/paper.py:block_1b4 --topology=v5e:16x16

needs no TPU: pip install -e '.[aot]'. For GPUs, as in --topology=h100:8, it needs no GPU:
pip install -e '.[gpu]'. Any field of the configuration can be overridden. What does not fit in
the chips' memory is an error that says by how much, and what would help.
"""

import dataclasses
import json
import sys

from absl import flags
from ml_collections import config_flags

from blocktx import command_line
from blocktx.benchmark import equal_vanilla
from blocktx.compile import (
    Report,
    Topology,
    compile_decoding,
    compile_train_step,
    find_topology,
    table,
)
from blocktx.config import RunConfig
from blocktx.files import write_atomic
from blocktx.model import QUANTIZATIONS
from blocktx.progress_bar import elapsed

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A Python file whose get_config() describes the run (see configs/)."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:16x16, v5p:4x4x4 or h100:8.")
_PROGRAM = flags.DEFINE_enum(
    "program",
    "train",
    ["train", "prefill", "decode", "serve"],
    "The training step, reading prompts, or decoding a block: a block step and its token steps. "
    "serve: a block of --batch_size rows of launch/serve.py.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Rows over all chips. None: the configuration's, or to decode 64 a chip."
)
_CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "Tokens that the cache is for, when decoding. None: the model's context.",
)
_AGAINST = flags.DEFINE_enum(
    "against",
    None,
    ["vanilla"],
    "Also compile for a vanilla model of as many non-embedding parameters.",
)
_QUANTIZE = flags.DEFINE_enum(
    "quantize", None, QUANTIZATIONS, "When decoding: keep the kernels as integers."
)
_JSON = flags.DEFINE_string("json", None, "A file to write all figures to.")
_TARGET_CONFIG = flags.DEFINE_string(
    "target_config",
    None,
    "A file that describes the GPU to XLA (stream_executor.GpuTargetConfigProto as text), in place "
    "of the package's.",
)


def _compile(config: RunConfig, topology: Topology) -> Report:
    if _PROGRAM.value == "train":
        return compile_train_step(config, topology)
    return compile_decoding(
        config,
        topology,
        _PROGRAM.value,
        batch_size=_BATCH_SIZE.value or 64 * len(topology.devices),
        context=_CONTEXT.value or config.model.context_length,
        quantized=_QUANTIZE.value,
    )


def main() -> None:
    if _PROGRAM.value == "train":
        for flag in (_CONTEXT, _QUANTIZE):
            if flag.value is not None:
                raise ValueError(f"--{flag.name}: is for --program=prefill, decode or serve")
        if _BATCH_SIZE.value is not None:
            _CONFIG.value.training.batch_size = _BATCH_SIZE.value
    configs = [command_line.run_config(_CONFIG.value)]
    topology = find_topology(_TOPOLOGY.value, _TARGET_CONFIG.value)
    if _AGAINST.value:
        if configs[0].model.kind != "block":
            raise ValueError("--against: the model is a vanilla model itself")
        vanilla = equal_vanilla(configs[0].model)
        configs.append(dataclasses.replace(configs[0], model=vanilla))
    reports = []
    for config in configs:
        what = f"{_PROGRAM.value} of the {config.model.kind} model for {_TOPOLOGY.value}"
        print(f"compiling {what}; this takes minutes", file=sys.stderr, flush=True)
        with elapsed("compiling"):
            reports.append(_compile(config, topology))
    print(table(reports))
    if _JSON.value:
        text = json.dumps([report.to_dict() for report in reports], indent=2)
        write_atomic(_JSON.value, text + "\n")


if __name__ == "__main__":
    command_line.run(main, required=("config", "topology"))
