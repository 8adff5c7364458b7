#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: the tests on the device, then
# the element-wise benchmark. Needs no network: installs this checkout into the Python that has torch
# (2.11 or newer), triton (3.6 or newer), pytest, pytest-benchmark and hypothesis.
# Results go to $OUT (default bench/results/).
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
timeout 360 $PYTHON -m pytest tests --ignore=tests/test_compile.py -q \
    --junitxml="$OUT/tests.xml" 2>&1 | tee "$OUT/tests.txt" || failed=1
timeout 150 $PYTHON -m pytest bench -q --benchmark-only --benchmark-columns=median,iqr,rounds \
    --benchmark-json="$OUT/elementwise.json" 2>&1 | tee "$OUT/elementwise.txt" || failed=1
exit $failed
