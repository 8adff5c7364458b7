#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: the tests on the device, then
# the benchmark's default set. Needs no network: installs this checkout into the Python that has torch
# (2.11 or newer), triton (3.6 or newer), pytest, pytest-benchmark and hypothesis.
#
#   bench/gpu_check.sh                 tests, then the default set
#   bench/gpu_check.sh --full CASE     one part of the full set (python -m bench run --help names them)
#
# Results go to $OUT (default bench/results/). What takes too long is cut off: what was measured stays.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
unset TRITON_INTERPRET NICEFAST_BACKEND

$PYTHON -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
$PYTHON - "$OUT/machine.json" <<'PY' || exit 1
import json, platform, subprocess, sys
import torch, triton, nicefast
if not torch.cuda.is_available():
    sys.exit("gpu_check: torch finds no GPU here")
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
machine = {
    "device": torch.cuda.get_device_name(),
    "capability": torch.cuda.get_device_capability(),
    "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
    "cuda": torch.version.cuda, "nicefast": nicefast.__version__, "commit": commit,
}
print(json.dumps(machine, indent=1))
json.dump(machine, open(sys.argv[1], "w"), indent=1)
PY

failed=0
if [ "${1:-}" = --full ]; then
    timeout -s INT 500 $PYTHON -m bench --full --case "${2:?a case}" --out "$OUT/full-$2.jsonl" || failed=1
    exit $failed
fi
timeout 330 $PYTHON -m pytest tests --ignore=tests/test_compile.py -q \
    --junitxml="$OUT/tests.xml" 2>&1 | tee "$OUT/tests.txt" || failed=1
timeout -s INT 170 $PYTHON -m bench --out "$OUT/default.jsonl" 2>&1 | tee "$OUT/bench.txt" || failed=1
exit $failed
