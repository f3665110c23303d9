#!/bin/sh
# Trains on the GPUs of this machine, and starts again after a crash.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

GPUS=${GPUS:-}                     # such as 0,2; empty: all
PYTHON=${PYTHON:-$HERE/../.venv/bin/python}
PAUSE_SECONDS=${PAUSE_SECONDS:-10} # before another try

usage 'usage: gpus.sh [--config.NAME=VALUE ...]
Runs python -m jes.train in one process that drives all GPUs, or those of GPUS=0,2, with
the config CONFIG in the folder runs/RUN, where the run goes on if it was there before.
After a crash it is started again, TRIES times in all; Ctrl-C or SIGTERM stop it.
PYTHON is the interpreter, PAUSE_SECONDS the time between tries.' "$@"
check_settings
check_flags "$@"
case $GPUS in
  *[!0-9,]*) fail 2 "GPUS must be numbers with commas between, not '$GPUS'" ;;
esac
require is_number 'a whole number' PAUSE_SECONDS "$PAUSE_SECONDS"

cd "$HERE/.."
set -- "$PYTHON" -m jes.train --config="$CONFIG" --workdir="runs/$RUN" "$@"
[ -z "$GPUS" ] || set -- env "CUDA_VISIBLE_DEVICES=$GPUS" "$@"
if dry; then
  quote "$@"
  exit 0
fi

command -v "$PYTHON" >/dev/null || fail 2 "there is no $PYTHON: set PYTHON"

asked=
child=
trap 'asked=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' INT TERM HUP
try=1
while :; do
  # A session of its own, so that Ctrl-C reaches it once, through us.
  setsid "$@" &
  child=$!
  code=0
  wait "$child" || code=$?
  # A signal to us ends `wait`, too.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  child=
  if [ "$code" = 0 ] || [ -n "$asked" ]; then exit "$code"; fi
  case $code in
    2) exit 2 ;; # the settings are wrong, and will be
    130 | 143) exit "$code" ;; # someone has stopped it
  esac
  say "ended with exit status $code, try $try of $TRIES"
  [ "$try" -lt "$TRIES" ] || exit "$code"
  try=$((try + 1))
  sleep "$PAUSE_SECONDS" &
  wait "$!" || exit 143
done
