"""Train a model.

    python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any field of the configuration can be overridden, as in --config.training.steps=50. Ctrl-C and
SIGTERM save before they stop; the same command with --resume goes on from there.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from blocktx import command_line
from blocktx.config import from_config_dict
from blocktx.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A Python file whose get_config() describes the run (see configs/)."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run: new, or to be resumed.")
_RESUME = flags.DEFINE_bool("resume", False, "Go on from the newest checkpoint in --workdir.")


def main() -> None:
    train(from_config_dict(_CONFIG.value), _WORKDIR.value, resume=_RESUME.value)
    workdir = pathlib.Path(_WORKDIR.value)
    print(f"checkpoints in {workdir / 'checkpoints'}, loss curve in {workdir / 'loss.png'}")
    print(f"python launch/generate.py --checkpoint={workdir} --prompt='...'")


if __name__ == "__main__":
    command_line.run(main, required=("config", "workdir"))
