"""Compile a run's programs for chips that are not there, and say what they will cost.

python launch/compile.py --config=configs/paper.py:block_1b4 --topology=v5e:16x16
"""

from absl import flags
from ml_collections import config_flags

from blocktx import aot, command_line
from blocktx.config import from_config_dict
from blocktx.topology import find_topology

_CONFIG = config_flags.DEFINE_config_file("config", help_string="As of launch/train.py.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:16x16, v5p:4x4x4 or h100:8.")
_TARGET_CONFIG = flags.DEFINE_string("target_config", None, "GPU.")


def main() -> None:
    topology = find_topology(_TOPOLOGY.value, _TARGET_CONFIG.value)
    report = aot.compile_train_step(from_config_dict(_CONFIG.value), topology)
    print(report, report.memory_total, report.ratio, report.binds)


if __name__ == "__main__":
    command_line.run(main, required=("config", "topology"))
