#!/usr/bin/env bash
# Several machines, one torchrun on each, meeting at a store on node 0. Run it on every machine:
#
#   NNODES=2 NODE=0 HEAD=10.0.0.1:29500 launch/multinode.sh VERB [overrides...]     # on 10.0.0.1
#   NNODES=2 NODE=1 HEAD=10.0.0.1:29500 launch/multinode.sh VERB [overrides...]     # on the other
#
# The same overrides on each; the code, the model and the data where every machine finds them, and run.output_root in a
# folder they share (checkpoints are written by all ranks).
#
# Environment (required):
#   NNODES       number of machines
#   NODE         this machine's number, from 0; node 0 serves the store
#   HEAD         host:port of node 0, as the others reach it. What is read from that port is never unpickled, but whoever
#                reaches it can end the run or read what the ranks tell each other: use the cluster's private network.
# Environment (optional):
#   NPROC        ranks on this machine: a number, or `gpu` (default) for one per GPU
#   LOCAL_ADDR   address of this machine that the others can reach. Set it where the machine's own name resolves to
#                127.0.0.1; the nodes otherwise wait for each other until the timeout. GLOO_SOCKET_IFNAME and
#                NCCL_SOCKET_IFNAME name the network interface where there are several.
#   RDZV_ID      name of this start, equal on all machines (default fsdp_qlora); a new one for every start where
#                processes of an old one may still be alive
#   SHUTDOWN_SECONDS  time the ranks have after SIGTERM, SIGINT or SIGUSR1 to save and leave (default 120)
#   TORCHRUN     the torchrun to use (default: the one on PATH)
#
# torchrun turns every failure into exit code 1: the true one is in <run.output_root>/<run.name>/exit.json.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$0"; }
fail() {
  printf 'launch/multinode.sh: %s (launch/multinode.sh -h explains)\n' "$1" >&2
  exit 2
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
esac
missing=()
for name in NNODES NODE HEAD; do
  [ -n "${!name:-}" ] || missing+=("$name")
done
[ ${#missing[@]} -eq 0 ] || fail "not set: ${missing[*]}"
[ $# -ge 1 ] || fail "a VERB is needed, as in: launch/multinode.sh train run.name=first"
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES is '$NNODES'; it must be a number from 1"
[[ $NODE =~ ^(0|[1-9][0-9]*)$ ]] || fail "NODE is '$NODE'; it must be a number from 0"
[ "$NODE" -lt "$NNODES" ] || fail "NODE is $NODE, but the $NNODES nodes are counted from 0"
[[ $HEAD =~ ^[^[:space:]]+:[0-9]+$ ]] || fail "HEAD is '$HEAD'; it must be host:port"
NPROC=${NPROC:-gpu}
[[ $NPROC =~ ^([1-9][0-9]*|gpu)$ ]] || fail "NPROC is '$NPROC'; it must be a number from 1, or gpu"

address=()
if [ -n "${LOCAL_ADDR:-}" ]; then address=(--local-addr "$LOCAL_ADDR"); fi

# torchrun sets this to 1 itself, with a warning; launcher.threads_per_rank decides the threads of torch's operations.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# An environment variable instead of torchrun's --shutdown-timeout, which torch 2.11 does not know (it then waits 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_SECONDS:-120}"

# A static rendezvous, in which each node has its number: a c10d rendezvous, which lets nodes come and go, unpickles what
# it reads from its port, so that whoever reaches the port runs code as you.
exec "${TORCHRUN:-torchrun}" \
  --nnodes "$NNODES" \
  --nproc-per-node "$NPROC" \
  --rdzv-id "${RDZV_ID:-fsdp_qlora}" \
  --node-rank "$NODE" \
  --master-addr "${HEAD%:*}" \
  --master-port "${HEAD##*:}" \
  ${address[@]+"${address[@]}"} \
  --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
  -m fsdp_qlora "$@"
