#!/usr/bin/env bash
# What needs a GPU, as one command: bench/gpu_check.sh [kernels|sanitize|tests|bench|all] [--seconds N]
# docs/gpu.md says what the parts are and what comes back in $OUT (default bench/results/gpu). Needs no
# network: installs this checkout into the Python that has torch, triton, pytest and hypothesis.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-bench/results/gpu}
unset TRITON_INTERPRET NICEFAST_BACKEND
export PIP_BREAK_SYSTEM_PACKAGES=1  # some Pythons are "externally managed" (PEP 668)
[[ " $* " == *" --dry-run "* ]] ||
    "${PYTHON:-python3}" -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
exec "${PYTHON:-python3}" -m bench.gpu_check "$@"
