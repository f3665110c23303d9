# shellcheck shell=sh disable=SC2034  # these are for the scripts that read this file
# Settings of all scripts here. Change them here, or give them in the environment:
#   TPU=second ACCELERATOR=v6e-8 sh tpu_scripts/create.sh

# The TPU.
PROJECT=${PROJECT:-}                       # Google Cloud project; needed
ZONE=${ZONE:-us-central2-b}
ACCELERATOR=${ACCELERATOR:-v4-8}           # accelerator type
RUNTIME=${RUNTIME:-tpu-ubuntu2204-base}    # runtime version, see README.md
TPU=${TPU:-jes}                            # name of the queued resource and its node
SPOT=${SPOT:-0}                            # 1: cheaper, and can be taken away
VALID_UNTIL=${VALID_UNTIL:-}               # 6h: ask no longer than that for a TPU
WAIT_SECONDS=${WAIT_SECONDS:-7200}         # how long create.sh waits for it
POLL_SECONDS=${POLL_SECONDS:-60}           # between two looks at a state

CREATE_FLAGS=${CREATE_FLAGS:-}             # more of gcloud's: --service-account=... etc.
SSH_FLAGS=${SSH_FLAGS:-}                   # --internal-ip, --tunnel-through-iap, ...

# What is installed on it.
REPOSITORY=${REPOSITORY:-}                 # a git URL; empty: this checkout is copied
REVISION=${REVISION:-HEAD}                 # branch, tag or commit of REPOSITORY
FOLDER=${FOLDER:-jes}                      # of the checkout there, in the home folder
EXTRA=${EXTRA:-tpu}                        # of pyproject.toml: tpu, cuda12, cuda13
PYTHON_VERSION=${PYTHON_VERSION:-3.12}     # had where python3 is older than 3.11

# The run.
RUN=${RUN:-$TPU}                           # its name; the run folder is runs/$RUN
CONFIG=${CONFIG:-configs/arc_c.py}
BUCKET=${BUCKET:-}                         # gs://bucket/folder: runs are kept there
# Variables that workers get too, where they are set here; PASS names more of yours.
PASS="HF_TOKEN HF_HOME XLA_FLAGS LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR ${PASS:-}"
SYNC_SECONDS=${SYNC_SECONDS:-60}           # between two copies to BUCKET
STOP_SECONDS=${STOP_SECONDS:-300}          # for a run to save, before it is killed
TRIES=${TRIES:-5}                          # starts without progress, then we give up
LOOKS=${LOOKS:-60}                         # that fail in a row, then so does watch.sh
STALL_SECONDS=${STALL_SECONDS:-7200}       # without a generation: watch.sh starts it again
KEEP=${KEEP:-0}                            # 1: watch.sh leaves the TPU when it ends

# 1: every command is printed, quoted for a shell, and none is run.
DRY_RUN=${DRY_RUN:-0}
