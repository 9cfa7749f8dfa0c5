#!/usr/bin/env bash
# Runs a training command until it has trained all, through preemptions and crashes.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: launch/restart.sh [OPTION]... COMMAND [ARG]...

Runs COMMAND and, as long as it is preempted (it ends with 143: saved after SIGTERM or a notice of
maintenance) or crashes (every code but those below), runs it again, with --resume added.

It stops with COMMAND's code when that is 0 (all is trained), 1 (an error that somebody must look
at), 2 (a mistake in the flags) or 130 (Ctrl-C). SIGTERM, SIGINT and SIGHUP are passed on to COMMAND,
which is then waited for and not run again.

Options:
  --max_restarts=N      give up after so many short runs in a row (default 10)
  --healthy_after=SEC   a run is short if it lasted less than this (default 600)
  --backoff=SEC         wait so long before the first restart, and after each short run twice as
                        long as before, at most 5 minutes (default 5)
  --help                show this

Example:
  launch/restart.sh python launch/train.py --config=configs/paper.py:block_170m \
      --workdir=gs://my-bucket/block_170m
USAGE
}

say() { printf 'restart.sh: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 2; }

max_restarts=10 healthy_after=600 backoff=5
while (($#)); do
  case $1 in
    --help) usage; exit 0 ;;
    --max_restarts=* | --healthy_after=* | --backoff=*)
      name=${1%%=*} value=${1#*=}
      [[ $value =~ ^[0-9]+$ ]] || die "$name: got '$value', expected a whole number"
      printf -v "${name#--}" %s "$((10#$value))"
      shift ;;
    --) shift; break ;;
    -*) die "unknown option '$1'; see --help" ;;
    *) break ;;
  esac
done
(($#)) || die "no command to run; see --help"
command=("$@")

child='' ending='' interrupted='' pending=''
pass_on() {
  ending=1 interrupted=1
  if [[ -n $child ]]; then
    kill -s "$1" "$child" 2>/dev/null || true
  else
    pending=$1
  fi
}
for signal in TERM INT HUP; do
  # shellcheck disable=SC2064  # each signal passes on itself
  trap "pass_on $signal" "$signal"
done

# Runs a command and sets `code` to its own, whatever signals come meanwhile.
run() {
  "$@" &
  child=$!
  [[ -z $pending ]] || kill -s "$pending" "$child" 2>/dev/null || true
  while :; do
    interrupted='' code=0
    wait "$child" || code=$?
    [[ -n $interrupted ]] || break  # else the code is that of the signal, not of the child
  done
  child=''
}

set -m  # a command in the background would ignore SIGINT without
short=0 delay=$backoff
while :; do
  begin=$SECONDS
  run "${command[@]}"
  case $code in
    0) exit 0 ;;
    1 | 2 | 130) say "ended with code $code; not run again"; exit "$code" ;;
  esac
  if [[ -n $ending ]]; then
    say "ended with code $code after a signal; not run again"
    exit "$code"
  fi
  if ((SECONDS - begin >= healthy_after)); then
    short=0 delay=$backoff
  fi
  if ((short >= max_restarts)); then
    say "error: ended with code $code; gave up after $short restarts without a run of" \
      "$healthy_after seconds"
    exit "$code"
  fi
  short=$((short + 1))
  say "ended with code $code; restart $short of $max_restarts in $delay seconds"
  run sleep "$delay"
  [[ -z $ending ]] || exit 143
  delay=$((delay * 2 > 300 ? 300 : delay * 2))
  [[ " ${command[*]} " == *" --resume "* ]] || command+=(--resume)
done
