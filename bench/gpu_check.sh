#!/usr/bin/env bash
# What needs a GPU, in one command and under nine minutes: the tests that use the device, then the most
# asked for of the benchmark's default set, then the other tests as time is left. Needs no network:
# installs this checkout into the Python that has torch (2.11 or newer), triton (3.6 or newer), pytest,
# pytest-benchmark and hypothesis; where it has pytest-xdist, four processes test at once.
#
#   bench/gpu_check.sh                 tests, benchmark, other tests
#   bench/gpu_check.sh --full CASE     one part of the full set (python -m bench run --help names them)
#
# Results go to $OUT (default bench/results/). What takes too long is cut off, by SIGINT: upon SIGTERM
# pytest would write neither its failures nor its XML. What was tested and measured stays.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
unset TRITON_INTERPRET NICEFAST_BACKEND
export PIP_BREAK_SYSTEM_PACKAGES=1  # some Pythons are "externally managed" (PEP 668)

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

END=510   # seconds after the start when the last part is cut off
GRACE=20  # more, in which what is cut off writes what it has; pytest-xdist takes ten to end
# within SECONDS NAME COMMAND...: says it into $OUT/NAME.txt, too. 124 where all that is wrong is that
# it was cut off
within() {
    local most=$1 name=$2 left=$((END - SECONDS)) began=$SECONDS status
    shift 2
    ((most < left)) || most=$left
    if ((most < 1)); then
        echo "gpu_check: no time was left for $name"
        return 124
    fi
    timeout -k $GRACE -s INT $most "$@" 2>&1 | tee "$OUT/$name.txt"
    status=${PIPESTATUS[0]}
    ((status == 0 || SECONDS - began < most)) && return "$status"
    echo "gpu_check: $name was cut off after $most s"
    ! grep -qE '^(FAILED|ERROR) ' "$OUT/$name.txt" && return 124
}

if [ "${1:-}" = --full ]; then
    case=${2:?a case}
    within 500 "full-$case" $PYTHON -m bench --full --case "$case" --out "$OUT/full-$case.jsonl"
    exit
fi

pytest="$PYTHON -m pytest -q --ignore=tests/test_compile.py"  # that one compiles ahead of time
$PYTHON -c 'import xdist' 2>/dev/null && pytest+=" -n 4"
# whatever takes one of the fixtures that are on the device, or needs it; kernels before all else
on_device='^def [a-z_0-9]+\(.*\b(device|backend|triton_backend|guarded)\b|mark\.gpu'
gpu=$(for each in tests/kernels tests; do
    find $each -name 'test_*.py' -exec grep -lE "$on_device" {} + | sort
done | awk '!seen[$0]++')
failed=0
within 220 tests $pytest $gpu --junitxml="$OUT/tests.xml" || failed=1
# compiling takes too long for more than two flows
bench="$PYTHON -m bench --device cuda"
within 140 bench $bench --case tabular,MNIST,small-batch,elementwise \
    --direction log_prob,training,sample \
    --provider 'plain,nicefast,nicefast (frozen),nflows,normflows,FrEIA,zuko' \
    --out "$OUT/default.jsonl" || (($? == 124)) || failed=1
within 90 bench-compiled $bench --case tabular,MNIST --direction log_prob,training \
    --dtype float32 --provider plain,nicefast,compile \
    --out "$OUT/compiled/default.jsonl" || (($? == 124)) || failed=1
within $END rest $pytest tests bench/tests ${gpu//tests\//--ignore=tests/} --junitxml="$OUT/rest.xml" ||
    (($? == 124)) || failed=1
exit $failed
