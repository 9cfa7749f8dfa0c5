#!/usr/bin/env bash
# Training on Cloud TPU VM pods: request, set up, train, delete.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: launch/tpu_pod.sh COMMAND NAME --zone=ZONE [OPTION]... [-- TRAINING_FLAG...]

Commands, in the order in which a run needs them:
  create   request a pod NAME in the queue; needs --accelerator_type
  setup    wait until there is one, copy this commit to every worker and install it there
  start    train on all workers, in a restart loop that outlives the connection; what stands after --
           are the flags of launch/train.py, with --workdir=gs://...
  logs     follow what a worker prints
  status   the state of the request, and the last line that every worker has printed
  stop     end the run: it saves, and this waits for it
  delete   give the pod back, whatever it does

Options:
  --zone=ZONE                  where the pod is
  --project=PROJECT            default: gcloud's
  --accelerator_type=TYPE      create: such as v5litepod-256, v6e-64, v5p-128
  --runtime_version=VERSION    create: default: the one for that type
  --slices=N                   create: so many pods that train as one over the network (default 1)
  --spot                       create: cheaper; may be taken away at any time
  --reserved                   create: from a reservation
  --python=VERSION             setup: default 3.12
  --worker=N, --slice=N        logs: default 0 and 0
  --dry-run                    print the commands and run none
  --help                       show this

Example:
  launch/tpu_pod.sh create my-pod --zone=us-west4-a --accelerator_type=v5litepod-16 --spot
  launch/tpu_pod.sh setup my-pod --zone=us-west4-a
  launch/tpu_pod.sh start my-pod --zone=us-west4-a -- \
      --config=configs/paper.py:block_170m --workdir=gs://my-bucket/block_170m \
      --config.data.source=gs://my-bucket/corpus

Every worker reads the data itself: give a folder in a bucket, or package:NAME.

Needs gcloud (https://cloud.google.com/sdk) after `gcloud auth login`, a quota for the TPUs, and for
the service account of the TPU VMs the role storage.objectAdmin on the bucket. A worker keeps the
run in ~/blocktx: run.log, run.pid.
USAGE
}

die() { printf 'tpu_pod.sh: error: %s\n' "$*" >&2; exit 2; }

(($#)) || die "no command; see --help"
[[ $1 != --help ]] || { usage; exit 0; }
command=$1
shift
case $command in
  create | setup | start | logs | status | stop | delete) ;;
  *) die "unknown command '$command'; see --help" ;;
esac
(($#)) && [[ $1 != -* ]] || die "$command: the name of the pod is missing"
name=$1
shift
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  die "name: got '$name', expected small letters, digits and hyphens"

zone='' project='' accelerator_type='' runtime_version='' slices=1 python=3.12
worker=0 slice=0 spot='' reserved='' dry_run=''
while (($#)); do
  case $1 in
    --zone=* | --project=* | --accelerator_type=* | --runtime_version=* | --python=* | \
      --slices=* | --worker=* | --slice=*)
      option=${1%%=*} value=${1#*=}
      [[ -n $value ]] || die "$option: is empty"
      case $option in
        --slices | --worker | --slice)
          [[ $value =~ ^[0-9]+$ ]] || die "$option: got '$value', expected a whole number" ;;
      esac
      printf -v "${option#--}" %s "$value" ;;
    --spot) spot=1 ;;
    --reserved) reserved=1 ;;
    --dry-run) dry_run=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option '$1'; flags of launch/train.py stand after --; see --help" ;;
  esac
  shift
done
training=("$@")
[[ -n $zone ]] || die "--zone is missing"
[[ $command == start || ${#training[@]} == 0 ]] || die "$command takes no flags of launch/train.py"

show() { printf '%q ' "$@"; printf '\n'; }
run() {
  if [[ -n $dry_run ]]; then show "$@"; else "$@"; fi
}

where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
queue=(gcloud compute tpus queued-resources)
on_all() { run "${queue[@]}" ssh "$name" "${where[@]}" --node=all --worker=all --command="$1"; }

default_runtime() {  # https://cloud.google.com/tpu/docs/runtimes
  case $accelerator_type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "--accelerator_type: '$accelerator_type' is unknown here; pass --runtime_version too" ;;
  esac
}

create() {
  [[ -n $accelerator_type ]] || die "create: --accelerator_type is missing"
  [[ -z $spot || -z $reserved ]] || die "--spot and --reserved exclude each other"
  ((slices > 0)) || die "--slices: got 0, expected at least 1"
  local request=("${queue[@]}" create "$name" "${where[@]}")
  request+=(--accelerator-type="$accelerator_type")
  runtime_version=${runtime_version:-$(default_runtime)}
  request+=(--runtime-version="$runtime_version")
  if ((slices > 1)); then
    request+=(--node-count="$slices" --node-prefix="$name")
  else
    request+=(--node-id="$name")
  fi
  [[ -z $spot ]] || request+=(--spot)
  [[ -z $reserved ]] || request+=(--reserved)
  run "${request[@]}"
}

setup() {
  local state=''
  local describe=("${queue[@]}" describe "$name" "${where[@]}" "--format=value(state.state)")
  if [[ -n $dry_run ]]; then
    printf '# every 30 seconds, until it says ACTIVE:\n'
    show "${describe[@]}"
  else
    while state=$("${describe[@]}"); [[ $state != ACTIVE ]]; do
      case $state in
        FAILED | SUSPENDED | SUSPENDING | DELETING)
          printf 'tpu_pod.sh: error: the request is %s; delete it and create it again\n' "$state" >&2
          exit 1 ;;
      esac
      printf 'the request is %s\n' "$state"
      sleep 30
    done
  fi
  local root archive
  root=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
  archive=$(git -C "$root" rev-parse --absolute-git-dir)/blocktx-$name.tar.gz  # nobody else's folder
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  run "${queue[@]}" scp "$archive" "$name:blocktx.tar.gz" "${where[@]}" --node=all --worker=all
  # The images come with an older Python; uv brings its own.
  on_all "set -e; mkdir -p ~/blocktx; tar -xzf blocktx.tar.gz -C ~/blocktx; cd ~/blocktx;\
 python3 -m pip install --quiet --user uv;\
 python3 -m uv venv --quiet --allow-existing --python=$(printf %q "$python") .venv;\
 python3 -m uv pip install --quiet --python=.venv/bin/python -e '.[tpu,gcs]'"
}

start() {
  local flag config='' workdir=''
  for flag in "${training[@]}"; do
    case $flag in
      --config=*) config=1 ;;
      --workdir=gs://*) workdir=1 ;;
      --workdir=*) die "$flag: every worker would have a folder of its own; use gs://" ;;
    esac
  done
  [[ -n $config ]] || die "start: --config=... is missing after --"
  [[ -n $workdir ]] || die "start: --workdir=gs://... is missing after --"
  on_all "cd ~/blocktx || exit 1;\
 if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then echo 'a run is going on; stop it'; exit 1; fi;\
 nohup setsid launch/restart.sh .venv/bin/python launch/train.py$(printf ' %q' "${training[@]}")\
 --resume >>run.log 2>&1 </dev/null & echo \$! >run.pid"
}

logs() {
  run "${queue[@]}" ssh "$name" "${where[@]}" --node="$slice" --worker="$worker" \
    --command='tail -n 100 -F ~/blocktx/run.log'
}

# The quotes of the next two are for the shell of the worker.
# shellcheck disable=SC2016
status() {
  run "${queue[@]}" describe "$name" "${where[@]}" "--format=value(state.state)"
  on_all 'cd ~/blocktx || exit 1; tail -n 1 run.log;\
 if kill -0 "$(cat run.pid)" 2>/dev/null; then echo running; else echo not running; fi'
}

# shellcheck disable=SC2016
stop() {
  on_all 'cd ~/blocktx || exit 1; kill -TERM "$(cat run.pid)" 2>/dev/null;\
 while kill -0 "$(cat run.pid)" 2>/dev/null; do sleep 1; done; tail -n 3 run.log'
}

delete() { run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet; }

"$command"
