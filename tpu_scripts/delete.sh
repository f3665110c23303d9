#!/bin/sh
# Deletes the queued resource and its node, if they are there.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

usage 'usage: delete.sh [-f]
Stops the run (it saves, and what is in BUCKET is brought up to date), then deletes the
TPU and its queued resource. If there is none, that is said. A run that is in no BUCKET
or cannot be stopped is deleted with -f only.' "$@"
force=
if [ "${1:-}" = -f ]; then
  force=1
  shift
fi
no_arguments "$@"
check_tpu_settings

queued_state ACTIVE || fail 1 'the state cannot be read'
case $STATE in
  NONE)
    say "$TPU does not exist"
    exit 0
    ;;
  DELETING)
    say "$TPU is being deleted"
    exit 0
    ;;
  ACTIVE)
    node_state READY || fail 1 'the state of the node cannot be read'
    # A node that was taken away cannot be asked.
    if [ "$STATE" = READY ] && [ -z "$force" ]; then
      [ -n "$BUCKET" ] || fail 1 'BUCKET is not set, runs are on its disk: delete.sh -f'
      on all stop || fail 1 'the run could not be stopped: delete.sh -f'
    fi
    ;;
esac
queued delete --force --quiet
say "$TPU is deleted"
