"""Train a model.

    python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any field of the configuration can be overridden, as in --config.training.steps=50. Ctrl-C and
SIGTERM save before they stop; the same command with --resume goes on from there, and
launch/restart.sh gives it again for as long as it takes.

On several hosts, every one runs this command. On Cloud TPU, in GKE, SLURM and Open MPI they find
each other; elsewhere tell them, as in
--coordinator_address=10.0.0.2:8476 --num_processes=2 --process_id=0.

It ends with 0 when all is trained; 1: an error that somebody must look at; 2: a mistake in the
flags; 130: Ctrl-C; 143: saved, after SIGTERM or a notice of maintenance; others: a crash.
"""

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from blocktx import command_line
from blocktx.config import from_config_dict
from blocktx.parallel import HEARTBEAT_TIMEOUT, MODES, initialize
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
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    MODES,
    "Whether other processes take part: auto asks the environment, on insists, off is alone.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port on which process 0 waits for the others."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes take part.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout", 300, "Seconds to wait for all processes to come."
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    HEARTBEAT_TIMEOUT,
    "Seconds without a sign of life after which a process counts as dead, and the others end.",
)


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
    try:
        initialize(
            _DISTRIBUTED.value,
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            initialization_timeout=_INITIALIZATION_TIMEOUT.value,
            heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
        )
    except ValueError as error:
        command_line.fail(f"--{error}")
    train(from_config_dict(_CONFIG.value), _WORKDIR.value, resume=_RESUME.value, profile=profile)
    if jax.process_index():
        return
    workdir = epath.Path(_WORKDIR.value)
    print(f"checkpoints in {workdir / 'checkpoints'}, loss curve in {workdir / 'loss.png'}")
    print(f"python launch/generate.py --checkpoint={workdir} --prompt='...'")


if __name__ == "__main__":
    command_line.run(main, required=("config", "workdir"))
