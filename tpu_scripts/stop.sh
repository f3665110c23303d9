#!/bin/sh
# Stops the run on all workers, and leaves the TPU.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

usage 'usage: stop.sh
Asks the run to save and end (SIGTERM), and kills what is left after STOP_SECONDS.
run.sh goes on with it.' "$@"
no_arguments "$@"
check_tpu_settings

on all stop
