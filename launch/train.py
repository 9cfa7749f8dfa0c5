"""Train a model.

    python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Flags override fields of the configuration, such as --config.training.steps=200. After Ctrl-C or
SIGTERM the run saves, then stops. The same command with --resume continues it, and
launch/restart.sh repeats the command until training is complete.

On several hosts, run this command on every one. On Cloud TPU, in GKE, SLURM and Open MPI they find
each other. Elsewhere pass --coordinator_address=10.0.0.2:8476 --num_processes=2 --process_id=0.

Exit codes: 0: training is complete. 1: an error that a person must look at. 2: a mistake in the
flags. 130: Ctrl-C. 143: saved after SIGTERM or a preemption notice. Others: a crash; try again.
"""

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from blocktx import command_line
from blocktx.config import UserError
from blocktx.parallel import HEARTBEAT_TIMEOUT, MODES, initialize, prepare_gpu
from blocktx.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A Python file whose get_config() describes the run (see configs/)."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run: new, or to resume.")
_PROFILE = flags.DEFINE_string(
    "profile",
    "",
    "FIRST:LAST, the steps of which jax.profiler writes a trace to WORKDIR/profile, for "
    "TensorBoard or xprof.",
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "~/.cache/blocktx/compiled",
    "A folder, also gs://, for compiled programs; empty for none.",
)
_RESUME = flags.DEFINE_bool(
    "resume", False, "Continue from the newest whole checkpoint in --workdir."
)
_STEP = flags.DEFINE_integer(
    "step", None, "With --resume: the checkpoint to continue from. Newer ones are set aside."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    MODES,
    "Whether to connect to other processes. auto: if the environment names them.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, which listens on it."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout", 300, "Seconds to wait for all processes."
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    HEARTBEAT_TIMEOUT,
    "Seconds without a heartbeat after which a process is considered dead, and the others end.",
)


def _profile() -> range:
    if not _PROFILE.value:
        return range(0)
    first, _, last = _PROFILE.value.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise UserError(f"--profile: got {_PROFILE.value!r}, expected FIRST:LAST, as in 10:12")
    return range(int(first) - 1, int(last))


def main() -> None:
    profile = _profile()
    if _STEP.value is not None and not _RESUME.value:
        command_line.fail("--step: is for --resume only")
    config = command_line.run_config(_CONFIG.value)
    command_line.enable_compilation_cache(_COMPILATION_CACHE.value)
    prepare_gpu(training=True)
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
    train(config, _WORKDIR.value, resume=_RESUME.value, step=_STEP.value, profile=profile)
    if jax.process_index():
        return
    workdir = epath.Path(_WORKDIR.value)
    print(f"checkpoints in {workdir / 'checkpoints'}, loss curve in {workdir / 'loss.png'}")
    if profile:
        print(f"trace for TensorBoard or xprof in {workdir / 'profile'}")
    print(f"python launch/generate.py --checkpoint={workdir} --prompt='...'")


if __name__ == "__main__":
    command_line.run(main, required=("config", "workdir"), restarted=True)
