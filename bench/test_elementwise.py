"""Element-wise operations against plain PyTorch: `pytest bench --benchmark-only`.

Every case passes a correctness gate against float64 before it is timed. Same inputs, same dtype,
same device for both; on a GPU each timed call ends with a synchronisation, so that small cases
include the launch.
"""

import pytest
import torch

import nicefast as nf
from bench.providers import logistic_log_prob

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 262_144 if DEVICE == "cuda" else 16_384
D = 784


def plain_coupling(x, shift):
    """The half split as it is usually written."""
    half = D // 2
    return torch.cat((x[:, :half], x[:, half:] + shift), 1)


def fast_coupling(x, shift):
    return nf.functional.additive_coupling(x, shift, nf.Partition.half(D))


CASES = {
    "coupling": (plain_coupling, {"nicefast": fast_coupling, "plain": plain_coupling}),
    "log_prob": (
        logistic_log_prob,
        {"nicefast": nf.functional.scale_log_prob, "plain": logistic_log_prob},
    ),
}


def inputs(case, dtype):
    x = torch.randn(ROWS, D, device=DEVICE, dtype=dtype)
    other = (ROWS, D // 2) if case == "coupling" else (D,)
    return x, torch.randn(other, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("provider", ["nicefast", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_elementwise(benchmark, case, provider, dtype):
    torch.manual_seed(0)
    exact, providers = CASES[case]
    x, other = inputs(case, dtype)
    function = providers[provider]
    benchmark.group = f"{case} {ROWS} x {D} {str(dtype).removeprefix('torch.')} on {DEVICE}"
    with torch.no_grad():
        want = exact(x[:4096].double(), other[:4096].double())
        got = function(x[:4096], other[:4096]).double()
        tolerance = 4 * torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= tolerance, "wrong, so not timed"

        def call():
            function(x, other)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(call, rounds=20, warmup_rounds=3)
