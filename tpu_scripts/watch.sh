#!/bin/sh
# Keeps a run going through preemptions, from a machine that stays.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

usage 'usage: watch.sh [--config.NAME=VALUE ...]
Looks every POLL_SECONDS at the TPU and the run until the run has finished. A TPU that
was taken away is deleted and asked for again, jes is installed, and the run goes on
from what is in BUCKET; so does a run that has crashed, or has had no new generation for
STALL_SECONDS. Gives up after TRIES starts without progress, and where the settings are
wrong. In the end, good or bad, the run is saved and the TPU deleted, which costs as long
as it is there; KEEP=1 leaves it.' "$@"
check_tpu_settings
check_flags "$@"
[ -n "$BUCKET" ] || fail 2 'BUCKET is not set: without it a run ends with its TPU'

tries=0 # starts since the ledger grew
most=0  # generations that were seen in it
since=$(date +%s) # when they were, or when the run was started
lost=0  # looks in a row that failed

# end STATUS MESSAGE: the logs are gone with the TPU.
end() {
  say "$2"
  if [ "$1" != 0 ] && node_state READY && [ "$STATE" = READY ]; then
    on all logs 40 || :
  fi
  if [ "$KEEP" = 1 ]; then
    say "$TPU is left, and costs: delete.sh"
  else
    sh "$HERE/delete.sh" || say "$TPU is NOT deleted, and costs: delete.sh -f"
  fi
  exit "$1"
}

# launch FLAG...: the run.
launch() {
  sh "$HERE/run.sh" "$@" && since=$(date +%s)
}

attempt() {
  tries=$((tries + 1))
  [ "$tries" -le "$TRIES" ] || end 1 "$TRIES starts without progress"
}

# again FLAG...: deletes what is left of the TPU, and starts on a new one.
again() {
  attempt
  sh "$HERE/delete.sh" && begin "$@"
}

# begin FLAG...: from wherever the request for a TPU is to the run.
begin() {
  status=0
  sh "$HERE/create.sh" || status=$?
  case $status in
    0) ;;
    3) return 0 ;; # not yet
    *) return 1 ;;
  esac
  sh "$HERE/setup.sh" && launch "$@"
}

# look FLAG...: at the run on a TPU that is there.
look() {
  said=$(status_of all) || return 1
  # Of all workers' lines (a word, the exit status, generations) what says most: process
  # 0 alone knows that a run has finished; wrong settings go before other errors.
  said=$(printf '%s\n' "$said" | awk '
    !($1 in rank) { next }
    { code = $1 == "stopped" && $2 == 2 ? 0.5 : 0 }
    rank[$1] + code > best { best = rank[$1] + code; word = $1; status = $2 }
    $3 > rows { rows = $3 }
    END { if (word) print word, status, rows + 0 }
    BEGIN { rank["none"] = 1; rank["stopped"] = 2; rank["running"] = 3; rank["finished"] = 4 }')
  [ -n "$said" ] || return 1
  word=${said%% *} rows=${said##* } code=${said#* } code=${code%% *}
  is_number "$rows" || return 1
  if [ "$rows" -gt "$most" ]; then
    most=$rows
    since=$(date +%s)
    tries=0
  fi
  still=$(($(date +%s) - since))
  case $word in
    running)
      say "running, $rows generations"
      if [ "$still" -gt "$STALL_SECONDS" ]; then
        attempt
        say "no generation for $still s: starting it again"
        sh "$HERE/stop.sh" && launch "$@"
      fi
      ;;
    finished)
      on all save || return 1
      end 0 "finished after $rows generations: $BUCKET/$RUN"
      ;;
    none)
      attempt
      say 'not started here yet'
      sh "$HERE/setup.sh" && launch "$@"
      ;;
    stopped)
      [ "$code" != 2 ] || end 2 "the settings or the data are wrong"
      attempt
      say "ended with exit status $code after $rows generations: starting it again"
      # Other workers may still wait for the one that ended.
      sh "$HERE/stop.sh" && launch "$@"
      ;;
    *) return 1 ;;
  esac
}

# step FLAG...: one look at the TPU, and what follows from it.
step() {
  queued_state SUSPENDED || return 1
  say "$TPU is $STATE"
  case $STATE in
    NONE)
      attempt
      begin "$@"
      ;;
    CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES) begin "$@" ;;
    FAILED | SUSPENDED) again "$@" ;;
    SUSPENDING | DELETING) ;; # over soon
    ACTIVE)
      # The node is taken away first; the request for it notices later.
      node_state READY || return 1
      case $STATE in
        READY) look "$@" ;;
        PREEMPTED | TERMINATED | STOPPED | NONE)
          say "the node is $STATE"
          again "$@"
          ;;
        *) say "the node is $STATE" ;;
      esac
      ;;
    *) return 1 ;;
  esac
}

while :; do
  if step "$@"; then
    lost=0
  else
    lost=$((lost + 1))
    [ "$lost" -lt "$LOOKS" ] || end 1 "$LOOKS failures in a row"
    say "that failed, trying again in $POLL_SECONDS s"
  fi
  if dry; then exit 0; fi # one round: the TPU was taken away
  sleep "$POLL_SECONDS"
done
