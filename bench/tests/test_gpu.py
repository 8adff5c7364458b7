"""The benchmark where there is a GPU, which is pretended: who is measured, and by what clock."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import measure, timing, workloads
from bench.gate import Gate
from bench.providers import PRECISIONS, Shape, make_weights

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(8, (16, 12), 96)
SCRIPT = Path(__file__).parents[1] / "gpu_check.sh"


@pytest.fixture
def there_is_a_gpu(monkeypatch):
    """So torch says. What then asks for it fails, unless a test gives it something."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def timed(monkeypatch):
    """Which tables are timed: none really is."""
    tasks, sizes = [], []
    monkeypatch.setattr(measure, "flow_records", lambda task, *_: tasks.append(task) or [])
    monkeypatch.setattr(measure, "elementwise_records", lambda *size: sizes.append(size[:2]) or [])
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(command, "_prepare", lambda task, device: (None, []))
    return tasks, sizes


def test_all_of_the_default_set_is_measured_on_a_gpu(there_is_a_gpu, timed, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(timing, "machine", lambda *_: {})
    (state,) = command._states(None, "default", "cuda")
    out = str(tmp_path / "none")
    assert command.main(["--child", state, "--out", out]) == 0  # a GPU is the default
    tasks, sizes = timed
    assert tasks == list(workloads.tasks("default", "cuda", precisions=list(PRECISIONS)))
    assert not all(map(workloads.is_headline, tasks))
    assert sizes == list(workloads.ELEMENTWISE_SIZES)


def test_the_cpu_beside_a_gpu_is_asked_for_what_a_cpu_is(there_is_a_gpu, timed, tmp_path):
    out = str(tmp_path / "none")
    assert command.main(["--device=cpu", "--child=no-faults", "--out", out]) == 0
    tasks, sizes = timed
    assert tasks == list(workloads.tasks("default", "cpu"))
    assert sizes == list(workloads.ELEMENTWISE_SIZES)
    tasks.clear()
    sizes.clear()
    assert command.main(["--device=cpu", "--child=default", "--out", out]) == 0
    assert tasks
    assert all(map(workloads.is_headline, tasks))
    assert not sizes


@pytest.mark.parametrize("direction", workloads.DIRECTIONS)
def test_a_table_of_the_cpu_beside_a_gpu(there_is_a_gpu, monkeypatch, direction):
    real = timing.product_calls
    # newer optimisers, in a PyTorch that was built for GPUs, ask one whether it captures a graph
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: None
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(timing, "product_calls", lambda dtype, _, *a, **k: real(dtype, 64, *a, **k))
    gate = Gate(SHAPE, make_weights(SHAPE), torch.randn(SHAPE.rows, SHAPE.features))
    task = workloads.Task("case", SHAPE, direction, "float32", ("plain", "nicefast"))
    found = measure.flow_records(task, gate, [gate.given(direction)], 2, 0.0)
    assert [r["timer"] for r in found] == ["perf_counter"] * 2
    assert all(r["launches"] > 0 for r in found)


def test_the_cpu_s_own_cache_and_no_gpu_in_what_its_figures_depend_on(there_is_a_gpu):
    assert timing.input_sets(1 << 20, CPU) == max(2, -(-2 * timing.cache_bytes(CPU) // (1 << 20)))
    about = timing.machine(CPU)
    assert about["gpu"] is about["capability"] is None
    assert about["cache_bytes"] == timing.cache_bytes(CPU)


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """Ten calls of a millisecond a turn beside one that takes 22."""
    clock, seen = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return later.at - self.at

    def call(name, milliseconds):
        def run(_):
            seen.append(name)
            clock[0] += milliseconds

        return timing.Call(run)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls = {"flow": call("flow", 1.0), "torch.mm": call("torch.mm", 22.0)}
    found = timing.interleave(calls, [0], GPU, rounds=4, warmup=1, least=9.5e-3)
    assert {t.timer for t in found.values()} == {"cuda events"}
    assert found["flow"].median == pytest.approx(1e-3)
    assert found["torch.mm"].median == pytest.approx(22e-3)
    assert seen.count("torch.mm") == 1 + 4
    assert seen.count("flow") == 1 + 4 * 10


STAND_IN = """#!/usr/bin/env bash
echo "$PIP_BREAK_SYSTEM_PACKAGES $(basename "$0") $(printf '%q ' "$@")" >> "$LOG"
[ -z "${SAID:-}" ] || [[ "$*" != *"$SAID"* ]] || { echo "FAILED tests/test_some.py"; exit 1; }
"""


def checked(folder, *arguments, **environment):
    """The script's exit status and the commands that it runs, by stand-ins for all of them."""
    for name in ("python", "timeout"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}
    environment |= {"LOG": str(folder / "log"), "OUT": str(folder / "out")}
    command = ["bash", str(SCRIPT), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, check=False)
    return done.returncode, (folder / "log").read_text().splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")
def test_the_check_on_a_gpu(tmp_path):
    code, lines = checked(tmp_path)
    assert code == 0
    assert "1 python -m pip install" in lines[0]  # into a Python managed by others, too
    tests, bench, compiled, rest = (line for line in lines if " timeout " in line)
    limits = [re.match(r"1 timeout -k (\d+) -s INT (\d+) ", line) for line in (tests, bench, rest)]
    assert all(limits)
    assert all(int(m[1]) + int(m[2]) < 540 for m in limits)
    assert int(limits[0][2]) + int(limits[1][2]) + 100 < 540
    assert f"--junitxml={tmp_path}/out/tests.xml" in tests
    assert f"--junitxml={tmp_path}/out/rest.xml" in rest
    assert f"--out {tmp_path}/out/default.jsonl" in bench
    for line in (bench, compiled):
        options = command._parse(shlex.split(line.split(" -m bench ")[1]), skipped := [])
        assert not skipped
        assert options.device == "cuda"
    for name in ("kernels/test_flow_kernels", "test_functional"):
        assert f" tests/{name}.py " in tests
        assert f" --ignore=tests/{name}.py " in rest
    assert tests.index("tests/kernels/") < tests.index("tests/test_functional")
    assert "tests/scoring/test_tables.py" not in tests + rest  # on no GPU, so among all the rest


def test_whatever_is_on_the_device_is_among_what_the_check_tests_first(request):
    """Of all that is collected now."""
    source = SCRIPT.read_text()
    pattern = re.compile(re.search(r"^on_device='(.*)'$", source, re.M)[1], re.M)
    fixtures = {"device", "backend", "triton_backend", "guarded"}
    found = {
        item.path
        for item in request.session.items
        if fixtures & set(item.fixturenames) or item.get_closest_marker("gpu")
    }
    assert not [path for path in found if not pattern.search(path.read_text())]


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")
@pytest.mark.parametrize("part", ["tests.xml", "default.jsonl", "rest.xml"])
def test_a_failure_of_any_part_is_the_check_s(tmp_path, part):
    code, lines = checked(tmp_path, SAID=part)
    assert code == 1
    assert len([line for line in lines if " timeout " in line]) == 4  # the others go on


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")
def test_one_part_of_the_full_set(tmp_path):
    code, lines = checked(tmp_path, "--full", "MNIST")
    assert code == 0
    (line,) = (line for line in lines if " timeout " in line)
    assert "-m bench --full --case MNIST" in line
