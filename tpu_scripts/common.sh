# shellcheck shell=sh
# What the scripts share. Each sets HERE, the folder of this file, before reading it.

# shellcheck source=tpu_scripts/env.sh
. "$HERE/env.sh"

say() { printf '%s: %s\n' "${0##*/}" "$*"; }

fail() { # fail STATUS MESSAGE
  status=$1
  shift
  printf '%s: error: %s\n' "${0##*/}" "$*" >&2
  exit "$status"
}

# usage TEXT [ARGUMENT]: shows the text and ends, if the argument asks for it.
usage() {
  case ${2:-} in
    -h | --help)
      printf '%s\n' "$1"
      printf 'Settings: %s/env.sh, or the environment. ' "$HERE"
      echo 'DRY_RUN=1 prints the commands and runs none.'
      exit 0
      ;;
  esac
}

no_arguments() {
  [ $# -eq 0 ] || fail 2 "takes no arguments, not '$*' (-h for help)"
}

# quote WORD...: the words on one line as a shell would read them back.
quote() {
  space=
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_/.:=@%+,-]*)
        word=\'$(printf '%s\n' "$word" | sed "s/'/'\\\\''/g")\'
        ;;
    esac
    printf '%s%s' "$space" "$word"
    space=' '
  done
  echo
}

dry() { [ "$DRY_RUN" = 1 ]; }

# run COMMAND...: runs it, or only shows it.
run() {
  if dry; then quote "$@"; else "$@"; fi
}

is_number() {
  case $1 in '' | *[!0-9]*) return 1 ;; esac
}

is_switch() {
  case $1 in 0 | 1) ;; *) return 1 ;; esac
}

# require CHECK KIND NAME VALUE
require() {
  "$1" "$4" || fail 2 "$3 must be $2, not '$4'"
}

# Names become parts of paths, and of what is deleted: no surprises in them.
check_settings() {
  require is_switch '0 or 1' DRY_RUN "$DRY_RUN"
  require is_switch '0 or 1' SPOT "$SPOT"
  require is_switch '0 or 1' KEEP "$KEEP"
  for name in $PASS; do # they are read by `eval`
    case $name in
      [!A-Za-z_]* | *[!A-Za-z0-9_]*) fail 2 "PASS: '$name' is no name of a variable" ;;
    esac
  done
  require is_number 'a whole number' WAIT_SECONDS "$WAIT_SECONDS"
  require is_number 'a whole number' POLL_SECONDS "$POLL_SECONDS"
  require is_number 'a whole number' SYNC_SECONDS "$SYNC_SECONDS"
  require is_number 'a whole number' STOP_SECONDS "$STOP_SECONDS"
  require is_number 'a whole number' TRIES "$TRIES"
  require is_number 'a whole number' LOOKS "$LOOKS"
  require is_number 'a whole number' STALL_SECONDS "$STALL_SECONDS"
  case $RUN in
    '' | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*)
      fail 2 "RUN must be letters, digits, '.', '_' and '-', not '$RUN'"
      ;;
  esac
  case $BUCKET in
    '') ;;
    gs://?*) BUCKET=${BUCKET%/} ;;
    *) fail 2 "BUCKET must be like gs://bucket/folder, not '$BUCKET'" ;;
  esac
}

check_tpu_settings() {
  [ -n "$PROJECT" ] || fail 2 'PROJECT is not set: PROJECT=my-project sh ...'
  case $TPU in
    '' | [!a-z]* | *[!a-z0-9-]* | *-)
      fail 2 "TPU must be lower-case letters, digits and '-', not '$TPU'"
      ;;
  esac
  [ -n "$FOLDER" ] || fail 2 'FOLDER is empty: it is the name of a folder there'
  check_settings
}

# The flags of jes.train that a run is given beside its variables.
check_flags() {
  for flag; do
    case $flag in
      --config=* | --workdir=*) fail 2 "set CONFIG or RUN in place of '$flag'" ;;
      --?*) ;;
      *) fail 2 "not a flag of jes.train: '$flag' (such as --config.seed=1)" ;;
    esac
  done
}

# queued COMMAND ...: one of gcloud's on our queued resource.
queued() {
  command=$1
  shift
  set -- gcloud compute tpus queued-resources "$command" "$TPU" \
    --project="$PROJECT" --zone="$ZONE" "$@"
  run "$@"
}

# describe KIND FORMAT ASSUMED: sets STATE to what gcloud says, to NONE where there is
# no such thing, and to ASSUMED in a dry run. Not known (no network, no permission) is
# neither: status 1.
# shellcheck disable=SC2034  # STATE is what the callers read
describe() {
  set -- "$3" gcloud compute tpus "$1" describe "$TPU" \
    --project="$PROJECT" --zone="$ZONE" --format="$2"
  STATE=$1
  shift
  if dry; then
    quote "$@"
    return 0
  fi
  # Standard error apart: gcloud has warnings there too.
  errors=$(mktemp)
  if STATE=$("$@" 2>"$errors"); then
    rm -f "$errors"
    return 0
  fi
  reason=$(cat "$errors")
  rm -f "$errors"
  case $reason in
    *NOT_FOUND* | *'not found'*) STATE=NONE ;;
    *)
      STATE=UNKNOWN
      printf '%s\n' "$reason" >&2
      return 1
      ;;
  esac
}

queued_state() { describe queued-resources 'value(state.state)' "$1"; }

node_state() { describe tpu-vm 'value(state)' "$1"; }

# shown NAME: the value of a variable, in a dry run hidden where it is a secret.
shown() {
  case $1 in
    *TOKEN* | *KEY* | *SECRET* | *PASSWORD*) if dry; then echo hidden; return; fi ;;
  esac
  eval "printf '%s\\n' \"\$$1\""
}

# remote WORKER COMMAND...: runs it there in the home folder (WORKER: all, or a number).
remote() {
  worker=$1
  shift
  # shellcheck disable=SC2086  # several flags
  run gcloud compute tpus tpu-vm ssh "$TPU" --project="$PROJECT" --zone="$ZONE" \
    --quiet --worker="$worker" $SSH_FLAGS --command="$(quote "$@")"
}

# status_of WORKER: what worker.sh says of the run; none, where it is not installed.
status_of() {
  # The remote shell reads this; the values come as its arguments.
  # shellcheck disable=SC2016
  remote "$1" sh -c 'test ! -e "$1" && echo none 0 0 || RUN=$2 sh "$1" status' \
    sh "$FOLDER/tpu_scripts/worker.sh" "$RUN"
}

# on WORKER COMMAND [ARGUMENT...]: a command of worker.sh, with our settings.
on() {
  worker=$1
  shift
  set -- sh "$FOLDER/tpu_scripts/worker.sh" "$@"
  for name in $PASS; do
    eval "given=\${$name+1}"
    # shellcheck disable=SC2154  # set by eval
    [ -z "$given" ] || set -- "$name=$(shown "$name")" "$@"
  done
  remote "$worker" env "RUN=$RUN" "CONFIG=$CONFIG" "BUCKET=$BUCKET" "EXTRA=$EXTRA" \
    "PYTHON_VERSION=$PYTHON_VERSION" "SYNC_SECONDS=$SYNC_SECONDS" \
    "STOP_SECONDS=$STOP_SECONDS" "$@"
}
