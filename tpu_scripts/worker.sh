#!/bin/sh
# What happens on a worker of a TPU; the other scripts call it through ssh.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

usage 'usage: worker.sh COMMAND
  install            jes and what it needs, in .venv
  start [FLAG...]    the run, detached; says so if it is running
  status             none, running, stopped or finished; exit status; generations
  stop               the run, after it has saved
  save               copies the run folder to BUCKET (that of process 0 alone)
  logs LINES         the last lines, each after the name of the worker
  follow LINES       them and what comes
The run is in runs/RUN, its log beside it in runs/RUN.log.' "$@"
check_settings
cd "$HERE/.."

workdir=runs/$RUN
there=$BUCKET/$RUN
log=runs/$RUN.log
notes=runs/$RUN.worker # lock, process ids, exit status
python=.venv/bin/python

install() {
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    run rm -rf .venv
    if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      run python3 -m venv .venv
    else
      run python3 -m pip install --quiet --user uv
      run python3 -m uv venv --quiet --seed --python "$PYTHON_VERSION" .venv
    fi
  fi
  run "$python" -m pip install --quiet --editable ".[$EXTRA]"
}

# Whether this worker's run folder is the one that counts: that of JAX's process 0, which
# need not be worker 0. The run itself leaves the mark.
first() {
  [ -e "$workdir.first" ]
}

running() {
  [ -e "$notes/lock" ] && ! flock --nonblock "$notes/lock" true
}

rows() { # generations, or steps
  if [ -e "$workdir/metrics.jsonl" ]; then
    wc -l <"$workdir/metrics.jsonl"
  else
    echo 0
  fi
}

# Copies the run folder to the bucket, in an order that leaves there a run that can go
# on wherever it is cut off: the ledger after the small files, as it was before them;
# then the checkpoints, without which the ledger is replayed; the summary last, if all
# was done before we began.
save() (
  if [ -z "$BUCKET" ]; then return 0; fi
  if ! dry; then
    if [ ! -e "$workdir/config.json" ] || ! first; then return 0; fi
    mkdir -p "$notes"
    exec 9>"$notes/saving" # one at a time
    flock 9
  fi
  last='^(ledger[.]jsonl|summary[.]json)$|.*[.]part$'
  finished=
  ledger=
  if dry || [ -e "$workdir/summary.json" ]; then finished=1; fi
  if dry || [ -e "$workdir/ledger.jsonl" ]; then
    ledger=$notes/ledger.jsonl
    run cp "$workdir/ledger.jsonl" "$ledger" || return 1
  fi
  run gcloud storage rsync --recursive --exclude="$last|^checkpoints/|^model/" \
    "$workdir" "$there" || return 1
  if [ -n "$ledger" ]; then
    run gcloud storage cp "$ledger" "$there/ledger.jsonl" || return 1
  fi
  run gcloud storage rsync --recursive --exclude="$last" \
    --delete-unmatched-destination-objects "$workdir" "$there" || return 1
  if [ -n "$finished" ]; then
    run gcloud storage cp "$workdir/summary.json" "$there/summary.json"
  fi
)

# Takes the run folder from the bucket; that of process 0, where it was, is newer.
restore() {
  if [ -z "$BUCKET" ]; then return 0; fi
  if ! dry && [ -e "$workdir/config.json" ] && first; then return 0; fi
  # Nothing there and not to be read are two things: the second must not start anew.
  set -- gcloud storage objects list "$there/*" --format='value(name)' --limit=1
  found=$(run "$@") || fail 1 "$there cannot be read"
  if [ -z "$found" ]; then return 0; fi
  if dry; then printf '%s\n' "$found"; fi
  # Aside first: half a run folder is none.
  run rm -rf "$workdir.part"
  run mkdir -p "$workdir.part"
  run gcloud storage rsync --recursive "$there" "$workdir.part" ||
    fail 1 "$there could not be copied"
  run rm -rf "$workdir"
  run mv "$workdir.part" "$workdir"
}

start() {
  set -- "$python" -m jes.train --config="$CONFIG" --workdir="$workdir" "$@"
  if dry; then
    restore
    quote "$@"
    return 0
  fi
  mkdir -p "$notes"
  exec 8>"$notes/lock" # held by what we start, to its end
  if ! flock --nonblock 8; then
    say "$RUN is running already"
    return 0
  fi
  rm -f "$notes/supervisor" "$notes/child" "$notes/code"
  restore
  nohup sh "$HERE/worker.sh" supervise "$@" >>"$log" 2>&1 </dev/null &
  echo $! >"$notes/supervisor"
  say "$RUN is started, its log is $(pwd)/$log"
}

# supervise COMMAND...: the run, and copies of its folder in between and in the end.
supervise() {
  asked=
  # A session of its own, so that a signal reaches it once, through us.
  setsid "$@" &
  child=$!
  trap 'asked=1; kill -TERM "$child" 2>/dev/null || :' TERM INT HUP
  echo "$child" >"$notes/child"
  while sleep "$SYNC_SECONDS" && kill -0 $$ 2>/dev/null; do
    save || say 'the copy to the bucket failed, trying again later'
  done 8>&- &
  saver=$!
  code=0
  wait "$child" || code=$?
  # A signal to us ends `wait`, too, and once.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  kill "$saver" 2>/dev/null || :
  save || say 'the last copy to the bucket failed'
  say "ended with exit status $code${asked:+, as asked}"
  echo "$code" >"$notes/code"
}

status() {
  if running; then
    echo "running 0 $(rows)"
  elif [ -e "$workdir/summary.json" ]; then
    echo "finished 0 $(rows)"
  elif [ -e "$notes/supervisor" ]; then
    echo "stopped $(cat "$notes/code" 2>/dev/null || echo 1) $(rows)"
  else
    echo "none 0 $(rows)"
  fi
}

stop() {
  if dry; then
    run kill -TERM "$notes/supervisor"
    save
    return
  fi
  if ! running; then
    say "$RUN is not running"
    save
    return
  fi
  say "stopping $RUN"
  kill -TERM "$(cat "$notes/supervisor")" || :
  if ! flock --wait "$STOP_SECONDS" "$notes/lock" true; then
    say "$RUN is killed after $STOP_SECONDS s"
    kill -KILL "-$(cat "$notes/child")" 2>/dev/null || :
    flock --wait "$STOP_SECONDS" "$notes/lock" true
  fi
}

[ $# -gt 0 ] || fail 2 'needs a command (-h for help)'
command=$1
shift
case $command in
  install | status | stop | save) no_arguments "$@" ;;
  start) check_flags "$@" ;;
  supervise) ;; # of start alone
  logs | follow)
    [ $# -eq 1 ] || fail 2 "$command needs a number of lines"
    require is_number 'a whole number' LINES "$1"
    ;;
  *) fail 2 "there is no command '$command' (-h for help)" ;;
esac
case $command in
  logs) tail -n "$1" "$log" | sed "s/^/$(hostname): /" ;;
  follow) exec tail -n "$1" -f "$log" ;;
  *) "$command" "$@" ;;
esac
