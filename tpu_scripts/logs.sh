#!/bin/sh
# The last lines that the run has printed.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

usage 'usage: logs.sh [-f] [LINES]
Shows the last LINES (20) of the log of every worker; with -f, those of the first worker
and what comes, until Ctrl-C.' "$@"
follow=
if [ "${1:-}" = -f ]; then
  follow=1
  shift
fi
[ $# -le 1 ] || fail 2 "takes one number of lines, not '$*' (-h for help)"
require is_number 'a whole number' LINES "${1:-20}"
check_tpu_settings

if [ -n "$follow" ]; then
  on 0 follow "${1:-20}"
else
  on all logs "${1:-20}"
fi
