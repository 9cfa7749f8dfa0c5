#!/usr/bin/env bash
# Training on Cloud TPUs in a GKE cluster, through xpk.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: launch/gke_xpk.sh COMMAND --cluster=CLUSTER --zone=ZONE [OPTION]... [-- TRAINING_FLAG...]

Commands:
  create-cluster   make a cluster with TPUs; needs --tpu_type
  start            train; needs --workload and --tpu_type; what stands after -- are the flags of
                   launch/train.py, with --workdir=gs://...
  logs             follow what the first host prints; needs --workload
  status           the workloads of the cluster
  stop             end the workload: it saves; needs --workload
  delete-cluster   give everything back

Options:
  --cluster=CLUSTER, --zone=ZONE
  --project=PROJECT       default: gcloud's
  --workload=NAME         the name of the run
  --tpu_type=TYPE         such as v5litepod-256
  --slices=N              so many pods that train as one over the network (default 1)
  --spot | --reservation=ID | --on_demand   create-cluster: how the TPUs are paid (default --spot)
  --docker_image=IMAGE    start: an image that has this clone as its folder, installed; default: one
                          that xpk makes of this clone, and that installs itself at each start
  --max_restarts=N        start: after hosts were lost (default 50)
  --grace_seconds=N       start: time to save in when hosts are taken away (default 120)
  --dry-run               print the commands and run none
  --help                  show this

Needs xpk (pip install xpk), gcloud, kubectl and, without --docker_image, docker.
USAGE
}

die() { printf 'gke_xpk.sh: error: %s\n' "$*" >&2; exit 2; }

(($#)) || die "no command; see --help"
[[ $1 != --help ]] || { usage; exit 0; }
command=$1
shift
case $command in
  create-cluster | start | logs | status | stop | delete-cluster) ;;
  *) die "unknown command '$command'; see --help" ;;
esac

cluster='' zone='' project='' workload='' tpu_type='' slices=1 paid=() docker_image=''
max_restarts=50 grace_seconds=120 dry_run=''
while (($#)); do
  case $1 in
    --cluster=* | --zone=* | --project=* | --workload=* | --tpu_type=* | --docker_image=* | \
      --slices=* | --max_restarts=* | --grace_seconds=*)
      option=${1%%=*} value=${1#*=}
      [[ -n $value ]] || die "$option: is empty"
      case $option in
        --slices | --max_restarts | --grace_seconds)
          [[ $value =~ ^[0-9]+$ ]] || die "$option: got '$value', expected a whole number" ;;
      esac
      printf -v "${option#--}" %s "$value" ;;
    --spot) paid+=(--spot) ;;
    --on_demand) paid+=(--on-demand) ;;
    --reservation=*) paid+=("$1") ;;
    --dry-run) dry_run=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option '$1'; flags of launch/train.py stand after --; see --help" ;;
  esac
  shift
done
training=("$@")
[[ -n $cluster ]] || die "--cluster is missing"
[[ -n $zone ]] || die "--zone is missing"
[[ $command == start || ${#training[@]} == 0 ]] || die "$command takes no flags of launch/train.py"
need() {
  local option
  for option; do
    [[ -n ${!option} ]] || die "$command: --$option is missing"
  done
}

run() {
  if [[ -n $dry_run ]]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

where=(--cluster="$cluster" --zone="$zone")
[[ -z $project ]] || where+=(--project="$project")

case $command in
  create-cluster)
    need tpu_type
    ((${#paid[@]} <= 1)) || die "${paid[*]}: one of them at most"
    run xpk cluster create "${where[@]}" --tpu-type="$tpu_type" --num-slices="$slices" \
      "${paid[@]:---spot}"
    ;;
  start)
    need workload tpu_type
    config='' workdir=''
    for flag in "${training[@]}"; do
      case $flag in
        --config=*) config=1 ;;
        --workdir=gs://*) workdir=1 ;;
        --workdir=*) die "$flag: every host would have a folder of its own; use gs://" ;;
      esac
    done
    [[ -n $config ]] || die "start: --config=... is missing after --"
    [[ -n $workdir ]] || die "start: --workdir=gs://... is missing after --"
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    # xpk passes SIGTERM on to the shell of this command only, so the loop has to take its place.
    train="exec launch/restart.sh python launch/train.py$(printf ' %q' "${training[@]}") --resume"
    if [[ -n $docker_image ]]; then
      image=(--docker-image="$docker_image")
    else
      image=(--base-docker-image=python:3.12 --script-dir="$root")
      train="pip install --quiet -e '.[tpu,gcs]' && $train"
    fi
    run xpk workload create "${where[@]}" --workload="$workload" --tpu-type="$tpu_type" \
      --num-slices="$slices" --max-restarts="$max_restarts" \
      --termination-grace-period-seconds="$grace_seconds" "${image[@]}" --command="$train"
    ;;
  logs)
    need workload
    first=jobset.sigs.k8s.io/jobset-name=$workload,batch.kubernetes.io/job-completion-index=0
    run kubectl logs --follow --prefix --tail=100 --selector="$first"
    ;;
  status) run xpk workload list "${where[@]}" ;;
  stop)
    need workload
    run xpk workload delete "${where[@]}" --workload="$workload"
    ;;
  delete-cluster) run xpk cluster delete "${where[@]}" ;;
esac
