"""Runs tests as other processors would: python tests/processors.py [arguments of pytest].

Libraries choose their arithmetic by the processor, and an environment variable makes them choose
otherwise. Every variant that can run here gets a run of pytest of its own, of tests/kernels and
tests/engine where no arguments are given; a variant whose instructions are missing here is named
and left out. The exit code is 1 where a variant failed, and where one found no test.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
VARIANTS = (  # of NumPy's products; of PyTorch's; of its other operators; of those that are fused
    {},
    {"OPENBLAS_CORETYPE": "Prescott"},
    {"OPENBLAS_CORETYPE": "Sandybridge"},
    {"OPENBLAS_CORETYPE": "Haswell"},
    {"OPENBLAS_CORETYPE": "Zen"},
    {"OPENBLAS_CORETYPE": "SkylakeX"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"MKL_CBWR": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "avx512"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
)
TESTS = ("tests/kernels", "tests/engine", "tests/test_engine_contract.py")
ARGUMENTS = (*TESTS, "-q", "-n", "2", "--dist", "loadfile")
PROBE = """
import numpy, torch
a = numpy.ones((65, 65), numpy.float32)
a @ a, a.astype(float) @ a
b = torch.from_numpy(a)
for c in (b, b.double(), torch.nn.functional.linear(b, b, b[0])):
    c.exp() + c.tanh() * c.sigmoid() - torch.nn.functional.softplus(c[:, ::2]).sum(1, keepdim=True)
    c.mul_(2).t().add(c).cumsum(0).isfinite().all(), c.argsort(), c.bfloat16().float().relu_()
"""


def main(arguments: list[str]) -> int:
    failed = 0
    names = sorted({name for variant in VARIANTS for name in variant})
    plain = {name: value for name, value in os.environ.items() if name not in names}
    for variant in VARIANTS:
        title = " ".join(f"{name}={value}" for name, value in variant.items()) or "as it is"
        environment = {**plain, **variant}
        probe = [sys.executable, "-c", PROBE]
        done = subprocess.run(probe, env=environment, capture_output=True, text=True, check=False)
        if done.returncode < 0:  # a signal: of an illegal instruction
            print(f"{title}: left out, this processor cannot run it", flush=True)
            continue
        if done.returncode:
            print(f"{title}: {done.stderr}", flush=True)
            failed = 1
            continue
        tests = [sys.executable, "-m", "pytest", *(arguments or ARGUMENTS)]
        code = subprocess.run(tests, env=environment, cwd=ROOT, check=False).returncode
        print(f"{title}: {'passed' if code == 0 else f'failed ({code})'}", flush=True)
        failed = failed or int(code != 0)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
