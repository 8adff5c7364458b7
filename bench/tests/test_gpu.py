"""The benchmark where there is a GPU, which is pretended: who is measured, and by what clock."""

import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gpu_check, gpu_tests, measure, report, timing, workloads
from bench.gate import Gate
from bench.providers import PRECISIONS, Shape, make_weights

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(8, (16, 12), 96)


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


def test_no_call_of_the_default_set_takes_a_gpu_long():
    for task in workloads.tasks("default", "cuda", precisions=list(PRECISIONS)):
        assert task.shape.operations(False) <= 0.05 * 30e12  # 50 ms at 30 TFLOP/s


def test_a_report_has_launches_beside_whole_calls(monkeypatch, tmp_path):
    monkeypatch.setattr(measure.timing, "bare", lambda run, device: (run() and 0) or 2e-3)
    record = {
        "device": "a GPU", "status": "timed", "case": "MNIST", "title": "t", "provider": "plain",
        "direction": "log_prob", "precision": "float32", "rows": 4, "features": 8, "hidden": [4],
        "couplings": 4, "median": 3e-3, "low": 3e-3, "high": 3e-3, "run": {"date": "d"},
    }  # fmt: skip
    record |= measure.bare(timing.Call(lambda x: x), 1, CPU)
    text = report.report([record], tmp_path).read_text()
    assert "launches alone, ms" in text
    assert "| 2 |" in text

    def refused(run, device):
        raise RuntimeError("no capture")

    monkeypatch.setattr(measure.timing, "bare", refused)
    assert "no capture" in measure.bare(timing.Call(lambda x: x), 1, CPU)["not_bare"]


def run_check(*arguments, **environment):
    script = Path(gpu_check.__file__).with_suffix(".sh")
    environment = os.environ | {"PYTHON": sys.executable} | environment
    environment["PATH"] = str(Path(sys.executable).parent) + ":/usr/bin:/bin"
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")
def test_a_dry_run_of_the_check_leaves_one_archive_and_one_text(tmp_path):
    pytest.importorskip("triton", reason="needs Triton")
    done = run_check("all", "--dry-run", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_check.tar.gz", "summary.txt"}
    summary = (tmp_path / "summary.txt").read_text()
    for name in ("kernels: kernels: passed", "tests: tests: passed", "bench: elementwise: passed"):
        assert name in summary
    with tarfile.open(tmp_path / "gpu_check.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    wanted = {"machine.json", "kernels.jsonl", "tests-0.xml", "default.jsonl", "report.md"}
    assert wanted <= names


def test_what_is_cut_off_or_fails_is_said_and_the_others_go_on(tmp_path, monkeypatch):
    def steps(work, dry):
        code = "print('FAILED tests/test_some.py', flush=True); import time; time.sleep(60)"
        yield gpu_check.Step("slow", [[sys.executable, "-c", code]], 0.2, may_be_cut=True)
        yield gpu_check.Step("none", [["no-such-tool"]], tool="no-such-tool")
        yield gpu_check.Step("next", [[sys.executable, "-c", "print('3 passed')"]])

    monkeypatch.setitem(gpu_check.PARTS, "tests", steps)
    monkeypatch.setattr(gpu_check, "GRACE", 2)
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    assert gpu_check.Check(out, work, dry=True).run(["tests"], 10) == 1
    summary = (out / "summary.txt").read_text()
    assert "slow: failed" in summary
    assert "FAILED tests/test_some.py" in summary
    assert "none: dropped: no no-such-tool here" in summary
    assert "next: passed" in summary
    assert (out / "gpu_check.tar.gz").exists()


def test_the_check_s_benchmark_knows_its_options(tmp_path):
    steps = list(gpu_check.bench(tmp_path, dry=False))
    assert steps[0].name == "elementwise"
    for step in steps:
        options = command._parse(step.commands[0][3:], skipped := [])
        assert not skipped
        assert options.device == "cuda"
    assert sum(gpu_check.SECONDS.values()) <= 1800
    assert max(*gpu_check.SECONDS.values(), gpu_check.TOGETHER) + 2 * gpu_check.GRACE < 600


def test_every_test_is_in_one_shard_and_the_largest_first():
    sizes = Counter({f"test_{i}": i % 7 + 1 for i in range(40)})
    found = gpu_tests.shards(sizes, 3)
    assert sorted(name for own in found for name in own) == sorted(sizes)
    for own in found:
        assert [sizes[name] for name in own] == sorted((sizes[n] for n in own), reverse=True)
    totals = [sum(sizes[name] for name in own) for own in found]
    assert max(totals) - min(totals) <= 7
