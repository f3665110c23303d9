#!/bin/sh
# Asks for a TPU, if there is none, and waits until it is there.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

usage 'usage: create.sh
Asks for the TPU as a queued resource and waits until it is ACTIVE. If it exists, that
is said. Exit status: 0 ACTIVE, 1 it cannot be had, 3 not yet (again: waits on).' "$@"
no_arguments "$@"
check_tpu_settings

queued_state NONE || fail 1 'the state cannot be read'
case $STATE in
  NONE)
    set -- --node-id="$TPU" --accelerator-type="$ACCELERATOR" \
      --runtime-version="$RUNTIME" --quiet
    [ "$SPOT" = 0 ] || set -- "$@" --spot
    [ -z "$VALID_UNTIL" ] || set -- "$@" --valid-until-duration="$VALID_UNTIL"
    # shellcheck disable=SC2086  # several flags
    queued create "$@" $CREATE_FLAGS
    ;;
  *) say "$TPU exists" ;;
esac

waited=0
while :; do
  queued_state ACTIVE || say 'the state cannot be read, trying again'
  case $STATE in
    ACTIVE)
      say "$TPU is ACTIVE"
      exit 0
      ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING | NONE)
      fail 1 "$TPU is $STATE: delete.sh, then create.sh again"
      ;;
  esac
  if [ "$waited" -ge "$WAIT_SECONDS" ]; then
    say "$TPU is $STATE after $waited s: the same command waits on"
    exit 3
  fi
  say "$TPU is $STATE"
  sleep "$POLL_SECONDS"
  waited=$((waited + POLL_SECONDS))
done
