#!/bin/sh
# Starts the run on all workers, or goes on with it.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

usage 'usage: run.sh [--config.NAME=VALUE ...]
Starts python -m jes.train on all workers, detached, with the config CONFIG in the
folder runs/RUN, where the run goes on if it was there or in BUCKET before. If it is
running, that is said. logs.sh shows what it prints, stop.sh stops it.' "$@"
check_tpu_settings
check_flags "$@"

# What process 0 had is brought to the bucket, where the others take it from.
[ -z "$BUCKET" ] || on all save
on all start --distributed "$@"
