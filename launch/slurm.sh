#!/usr/bin/env bash
# Training on GPUs of a SLURM cluster: one process for each GPU, requeued until all is trained.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: launch/slurm.sh [OPTION]... -- TRAINING_FLAG...

Submits a job that runs launch/train.py with these flags in a process for each GPU, which
jax.distributed connects by what SLURM tells them. Before the time limit, and when the job is
preempted, the run saves; the job then goes back into the queue and resumes, as it does after a crash.
--workdir is a folder that all nodes see, or gs://... The job's log is in it, or for gs:// in this
clone.

Options:
  --name=NAME             of the job (default blocktx)
  --nodes=N               (default 1)
  --gpus_per_node=N       (default 8)
  --cpus_per_gpu=N        (default 8)
  --time=LIMIT            for one stay on the nodes, such as 24:00:00; default: the partition's
  --partition=NAME, --account=NAME, --qos=NAME   default: the cluster's
  --python=PATH           (default .venv/bin/python of this clone)
  --grace_seconds=N       time to save in before the limit (default 120)
  --max_restarts=N        after crashes and preemptions (default 100)
  --sbatch=FLAG           one more flag for sbatch, such as --sbatch=--exclusive; may be repeated
  --dry-run               print the command and the job's script, and submit nothing
  --help                  show this

Example:
  launch/slurm.sh --nodes=2 --time=24:00:00 -- \
      --config=configs/paper.py:block_170m --workdir=/shared/runs/block_170m \
      --config.data.source=/shared/texts
USAGE
}

die() { printf 'slurm.sh: error: %s\n' "$*" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=blocktx nodes=1 gpus_per_node=8 cpus_per_gpu=8 time='' partition='' account='' qos=''
python=$root/.venv/bin/python grace_seconds=120 max_restarts=100 more=() dry_run=''
while (($#)); do
  case $1 in
    --name=* | --nodes=* | --gpus_per_node=* | --cpus_per_gpu=* | --time=* | --partition=* | \
      --account=* | --qos=* | --python=* | --grace_seconds=* | --max_restarts=*)
      option=${1%%=*} value=${1#*=}
      [[ -n $value ]] || die "$option: is empty"
      case $option in
        --nodes | --gpus_per_node | --cpus_per_gpu | --grace_seconds | --max_restarts)
          [[ $value =~ ^[1-9][0-9]*$ ]] || die "$option: got '$value', expected a whole number" ;;
      esac
      printf -v "${option#--}" %s "$value" ;;
    --sbatch=*) more+=("${1#*=}") ;;
    --dry-run) dry_run=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option '$1'; flags of launch/train.py stand after --; see --help" ;;
  esac
  shift
done
training=("$@")
for wanted in config workdir; do
  [[ " ${training[*]} " == *" --$wanted="* ]] || die "--$wanted=... is missing after --"
done
logs=$root
for flag in "${training[@]}"; do
  case $flag in
    --workdir=gs://*) ;;
    --workdir=*) logs=${flag#--workdir=} ;;
  esac
done
# The log of a job must have a folder when the job starts. A new run may find it in its workdir.
[[ $logs == /* ]] || logs=$root/$logs
[[ -n $dry_run ]] || mkdir -p "$logs"

# Every process must see all GPUs of its node, and takes the one of its SLURM_LOCALID: no
# --gpus-per-task. The signal goes to the steps, not to this script.
submit=(
  sbatch --job-name="$name" --nodes="$nodes" --gpus-per-node="$gpus_per_node"
  --ntasks-per-node="$gpus_per_node" --cpus-per-task="$cpus_per_gpu" --signal="TERM@$grace_seconds"
  --requeue --open-mode=append --output="$logs/$name-%j.log" --chdir="$root"
)
[[ -z $time ]] || submit+=(--time="$time")
[[ -z $partition ]] || submit+=(--partition="$partition")
[[ -z $account ]] || submit+=(--account="$account")
[[ -z $qos ]] || submit+=(--qos="$qos")
submit+=("${more[@]}")

job() {
  cat <<JOB
#!/usr/bin/env bash
set -uo pipefail
# Slurm 22.05 to 23.02 does not pass --cpus-per-task on from sbatch.
srun --kill-on-bad-exit=1 --cpus-per-task=$cpus_per_gpu $(printf '%q ' "$python" launch/train.py "${training[@]}")--resume
code=\$?
case \$code in
  0 | 1 | 2 | 130) exit \$code ;;
esac
if ((\${SLURM_RESTART_COUNT:-0} >= $max_restarts)); then
  echo "ended with code \$code after \$SLURM_RESTART_COUNT restarts; not run again" >&2
  exit \$code
fi
echo "ended with code \$code; goes back into the queue" >&2
scontrol requeue "\$SLURM_JOB_ID"
JOB
}

if [[ -n $dry_run ]]; then
  printf '%q ' "${submit[@]}"
  printf "<<'JOB'\n"
  job
  printf 'JOB\n'
else
  job | "${submit[@]}"
fi
