"""The benchmark's quick tables as pytest-benchmark tests: `pytest bench --benchmark-only`.

Same cases, weights and gate as `python -m bench --quick`; what pytest-benchmark adds is its storage
and --benchmark-compare. Providers do not take turns here: for ratios use `python -m bench`.
"""

from functools import cache

import pytest
import torch

from bench import measure, workloads
from bench.elementwise import COMPILED, has_compiler, operations
from bench.gate import Gate
from bench.providers import make_weights

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TASKS = {
    f"{task.case}-{task.direction}-{name}": (task, name)
    for task in workloads.tasks("quick", DEVICE.type)
    for name in task.providers
}
ROWS, FEATURES = 16_384, 784


@cache
def gate(shape):
    torch.manual_seed(0)
    x = torch.randn(shape.rows, shape.features, device=DEVICE)
    return Gate(shape, make_weights(shape), x)


@cache
def elementwise():
    torch.manual_seed(0)
    found = operations(ROWS, FEATURES, DEVICE)
    return {f"{o.case}-{o.direction}": o for o in found}


def run(benchmark, call, given):
    def wait():
        call(given)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(wait, rounds=5, warmup_rounds=2)


@pytest.mark.parametrize("name", TASKS)
def test_flow(benchmark, name):
    task, provider = TASKS[name]
    own = gate(task.shape)
    record, calls = measure.admit(provider, own, task.precision, task.direction)
    if not calls:
        if record["status"].startswith("not installed"):
            pytest.skip(record["status"])
        pytest.fail(record["status"])
    benchmark.group = f"{task.case}: {task.shape.title}; {task.direction}, {task.precision}"
    call = next(iter(calls.values()))
    call.prepare()
    run(benchmark, call.run, own.given(task.direction))


OPERATIONS = {
    "coupling-forward": ("nicefast", "slice + cat"),
    "coupling-inverse": ("nicefast", "slice + cat"),
    "coupling-in place": ("nicefast", "x[:, d:].add_(shift)"),
    "coupling-backward": ("nicefast", "slice + cat"),
    "scaling-forward": ("nicefast", "plain", COMPILED),
    "scaling-backward": ("nicefast", "plain"),
    "sampling-sample": ("nicefast", "plain"),
}


@pytest.mark.parametrize(("name", "way"), [(n, w) for n, ways in OPERATIONS.items() for w in ways])
def test_elementwise(benchmark, name, way):
    if way == COMPILED and not has_compiler(DEVICE):
        pytest.skip("no C++ compiler")
    operation = elementwise()[name]
    assert operation.check(way)[1] is None, "wrong, so not timed"
    benchmark.group = f"{name}, {ROWS:,} rows of {FEATURES}"
    run(benchmark, operation.ways[way], operation.inputs[0])
