#!/usr/bin/env bash
# The GPU tests on this machine, offline.
#
#   BUNDLE=build/gpu-bundle tests/gpu/run.sh [pytest arguments]     # in a checkout, with a bundle (make gpu-bundle)
#   tests/gpu/run.sh                                                # inside a copied bundle; or where all is installed
#   DEVICE=cpu tests/gpu/run.sh                                     # a dry run of the same tests on a CPU
#
# Environment:
#   BUNDLE  folder made by launch/gpu_bundle.py; the project's code is taken from where this script lies
#   DEVICE  cuda (default) or cpu
#   PYTHON  the interpreter that has torch and transformers (default python3)
# A machine without the device is a failure here, not a skip.
set -euo pipefail

fail() {
  printf 'tests/gpu/run.sh: %s\n' "$1" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$(command -v "${PYTHON:-python3}") || fail "there is no ${PYTHON:-python3}"
case $python in
  /*) ;;
  *) python=$PWD/$python ;;
esac
paths=$root
if [ -n "${BUNDLE:-}" ]; then
  [ -d "$BUNDLE/site" ] || fail "BUNDLE is '$BUNDLE', which has no folder site; make it with launch/gpu_bundle.py"
  paths=$root:$(cd "$BUNDLE" && pwd)/site
elif [ -d "$root/site" ]; then
  paths=$root:$root/site
fi
export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}"
export FSDP_QLORA_TEST_DEVICE="${DEVICE:-cuda}"
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
# Plugins that happen to be installed here are not ours to depend on, nor to trip over.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1

cd "$root"
"$python" - <<'PYTHON' || fail "the machine is not ready; see above"
import os
import sys

import bitsandbytes
import fsdp_qlora
import peft
import torch
import transformers

print(f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}")
for module in (bitsandbytes, peft, fsdp_qlora):
    print(f"{module.__name__} {getattr(module, '__version__', '')} from {os.path.dirname(module.__file__)}")
kind = os.environ["FSDP_QLORA_TEST_DEVICE"]
if kind != "cpu":
    if not getattr(torch, kind).is_available():
        sys.exit(f"torch finds no {kind} device here; DEVICE=cpu is a dry run.")
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
PYTHON

exec "$python" -m pytest -p pytest_timeout -p no:cacheprovider -m gpu tests/gpu "$@"
