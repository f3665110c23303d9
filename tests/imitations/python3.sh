#!/bin/sh
# An imitation of Python: becomes a virtual environment, installs, and trains 8
# generations, as far as the file `limit` says, or ends with the status of a file.
case "$1 $2" in
  "-c "*) [ ! -e "$ROOT/old_python" ] ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "python $*" >>"$ROOT/calls" ;;
  "-m jes.train")
    for word; do
      case $word in --workdir=*) folder=${word#--workdir=} ;; esac
    done
    trap 'echo stopped >>"$ROOT/trained"; exit 143' TERM
    mkdir -p "$folder/checkpoints"
    echo '{}' >"$folder/config.json"
    # On the worker that the file `first` names, or 0, it is JAX's process 0.
    if [ "${WORKER_NUMBER:-0}" = "$(cat "$ROOT/first" 2>/dev/null || echo 0)" ]; then
      touch "$folder.first"
    else
      rm -f "$folder.first"
    fi
    ledger=$folder/ledger.jsonl
    [ -e "$ledger" ] || echo '{"format": 1}' >"$ledger"
    rows=$(grep -c generation "$ledger")
    echo "${CUDA_VISIBLE_DEVICES:-all} from $rows: $*" >>"$ROOT/trained"
    while [ "$rows" -lt 8 ]; do
      if [ -e "$ROOT/status" ]; then exit "$(cat "$ROOT/status")"; fi
      sleep 0.02
      [ "$rows" -lt "$(cat "$ROOT/limit")" ] || continue
      echo "{\"generation\": $rows, \"fitness\": [0.5]}" >>"$ledger"
      echo "{\"generation\": $rows}" >>"$folder/metrics.jsonl"
      rows=$((rows + 1))
      rm -f "$folder/checkpoints/"*
      echo "$rows" >"$folder/checkpoints/$rows"
    done
    echo '{}' >"$folder/summary.json"
    ;;
esac
