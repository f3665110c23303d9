#!/bin/sh
# Deletes the queued resource and its node, if they are there.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

usage 'usage: delete.sh
Stops the run (it saves, and what is in BUCKET is brought up to date), then deletes the
TPU and its queued resource. If there is none, that is said.' "$@"
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
    # A node that was taken away cannot be asked; one that is there may be without jes.
    [ "$STATE" != READY ] || on all stop || say 'the run could not be stopped: going on'
    ;;
esac
queued delete --force --quiet
say "$TPU is deleted"
