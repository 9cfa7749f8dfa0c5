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
_PROFILE = flags.DEFINE_string(
    "profile",
    "",
    "FIRST:LAST, numbers of steps of which jax.profiler writes a trace to WORKDIR/profile (look at "
    "it in TensorBoard or xprof).",
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "~/.cache/blocktx/compiled",
    "A folder, also gs://, that keeps compiled programs for the next start; empty for none.",
)
_RESUME = flags.DEFINE_bool("resume", False, "Go on from the newest checkpoint in --workdir.")


def _profile() -> range:
    if not _PROFILE.value:
        return range(0)
    first, _, last = _PROFILE.value.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise ValueError(f"--profile: got {_PROFILE.value!r}, expected FIRST:LAST, as in 10:12")
    return range(int(first) - 1, int(last))


def main() -> None:
    profile = _profile()
    command_line.keep_compiled(_COMPILATION_CACHE.value)
    train(from_config_dict(_CONFIG.value), _WORKDIR.value, resume=_RESUME.value, profile=profile)
    workdir = pathlib.Path(_WORKDIR.value)
    print(f"checkpoints in {workdir / 'checkpoints'}, loss curve in {workdir / 'loss.png'}")
    print(f"python launch/generate.py --checkpoint={workdir} --prompt='...'")


if __name__ == "__main__":
    command_line.run(main, required=("config", "workdir"))
