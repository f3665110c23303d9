#!/bin/sh
# Puts jes on all workers of the TPU.
set -eu
HERE=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$HERE/common.sh"

usage 'usage: setup.sh
Copies this checkout (what git tracks, with your changes) to all workers, or clones
REPOSITORY there, and installs it in FOLDER/.venv. Again: brings them up to date.' "$@"
no_arguments "$@"
check_tpu_settings

from_git() {
  # The remote shell reads this; the values come as its arguments.
  # shellcheck disable=SC2016
  fetch='mkdir -p "$1"; cd "$1"; git init -q; git fetch -q --depth=1 "$2" "$3"'
  remote all sh -ec "$fetch; git checkout -q --detach FETCH_HEAD" \
    sh "$FOLDER" "$REPOSITORY" "$REVISION"
}

from_here() {
  root=$(dirname "$HERE")
  if dry; then
    archive=jes.tar.gz
    commit=HEAD
  else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    archive=$folder/jes.tar.gz
    # A commit of the changes to tracked files, if there are any; nothing is stashed.
    commit=$(git -C "$root" stash create)
  fi
  run git -C "$root" archive --format=tar.gz --output="$archive" "${commit:-HEAD}"
  # shellcheck disable=SC2086  # several flags
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU:jes.tar.gz" \
    --project="$PROJECT" --zone="$ZONE" --quiet --worker=all $SSH_FLAGS
  # shellcheck disable=SC2016
  remote all sh -ec 'mkdir -p "$1"; tar -xzf jes.tar.gz -C "$1"' sh "$FOLDER"
}

if [ -n "$REPOSITORY" ]; then from_git; else from_here; fi
on all install
