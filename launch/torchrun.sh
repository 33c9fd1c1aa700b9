#!/usr/bin/env bash
# One machine, N ranks, started by torchrun.
#
#   launch/torchrun.sh NPROC VERB [overrides...]
#   launch/torchrun.sh 8 train model.name=Qwen/Qwen3-8B data.train=chats.jsonl run.name=first
#
# NPROC is a number, or `gpu` for one rank per GPU. `fsdp-qlora train launcher.nproc_per_node=N` does the same with
# shorter messages and the true exit code; take this script where torchrun itself is wanted. torchrun turns every
# failure into exit code 1: the true one is in outputs/<run.name>/exit.json (75: stopped early on a signal and saved).
#
# Environment:
#   SHUTDOWN_SECONDS  time the ranks have after SIGTERM, SIGINT or SIGUSR1 to save and leave (default 120; torch 2.11:
#                     always 30)
#   MAX_RESTARTS      how often the ranks are started again from the last checkpoint when one dies (default 0)
#   TORCHRUN          the torchrun to use (default: the one on PATH)
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$0"; }
fail() {
  printf 'launch/torchrun.sh: %s\n' "$1" >&2
  exit 2
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  '') usage >&2; exit 2 ;;
esac
[ $# -ge 2 ] || fail "NPROC and VERB are needed, as in: launch/torchrun.sh 2 train experiment=quickstart"
nproc=$1
shift
[[ $nproc =~ ^([1-9][0-9]*|gpu)$ ]] || fail "NPROC is '$nproc'; it must be a number from 1, or gpu."

# torchrun sets this to 1 itself, with a warning; launcher.threads_per_rank decides the threads of torch's operations.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# An environment variable instead of torchrun's --shutdown-timeout, which torch 2.11 does not know (it then waits 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_SECONDS:-120}"

# Else restarted ranks meet in a store that still holds the last attempt's keys, and hang (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

exec "${TORCHRUN:-torchrun}" \
  --standalone \
  --max-restarts "${MAX_RESTARTS:-0}" \
  --nproc-per-node "$nproc" \
  --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
  -m fsdp_qlora "$@"
