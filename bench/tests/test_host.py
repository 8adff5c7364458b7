"""The host's time before a launch is measured without a GPU: outside Triton's interpreter, so that
the command runs in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

from bench import host

ROOT = Path(__file__).parent.parent.parent


def run(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_says_what_is_in_its_figures(tmp_path):
    out = tmp_path / "made" / "host.md"
    done = run("-m", "bench", "host", "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert out.read_text() == done.stdout
    for part in ("In a figure:", "Not in a figure:", "goal", "`torch.add` of two tensors"):
        assert part in done.stdout
    row = re.compile(r"\| (.+): (\w+) \| ([\d.]+) \| ([\d.]+) \| (?:at most (\d+))? \|")
    found = row.findall(done.stdout)
    kinds = ("ordinary", "frozen", "frozen, replayed", "graphed (deprecated)")
    assert [(kind, method) for kind, method, *_ in found] == [
        (kind, method) for kind in kinds for method in host.METHODS
    ]
    assert all(float(us) > 0 < float(additions) for *_, us, additions, _ in found)
    goals = {kind: int(goal) for kind, *_, goal in found if goal}
    assert goals == host.GOALS == {"ordinary": 50, "frozen": 15, "frozen, replayed": 6}


def test_interpreted_kernels_have_no_launch():
    done = run("-m", "bench", "host", "--rounds", "1", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "TRITON_INTERPRET" in done.stderr


WAYS = """
import sys
import torch, triton
from bench import host
from nicefast.runtime import backend
from nicefast.kernels import launch
import nicefast as nf

before = vars(backend).copy(), triton.runtime.driver._active
launches = []


class Driver(host.Driver):
    def launcher_cls(self, source, metadata):
        return lambda *_: launches.append(source.name)


with host.stand_in(), torch.no_grad():
    triton.runtime.driver.set_active(Driver())
    for name, call in host.calls().items():
        call()
        launches.clear()
        call()
        print(name, *launches)
assert (vars(backend), triton.runtime.driver._active) == before
assert nf.NICE(4, hidden=(8,)).plan(torch.zeros(1, 4)).name == "rows"
"""


def test_every_call_goes_the_way_of_a_gpu():
    done = run("-c", WAYS)
    assert done.returncode == 0, done.stderr
    of = dict(re.match(r"(.+: \w+) ?(.*)", line).groups() for line in done.stdout.splitlines())
    kernels = {"log_prob": "flow_fwd_kernel", "forward": "flow_fwd_kernel"}
    kernels["inverse"] = "flow_inv_kernel"
    for method, kernel in kernels.items():
        assert of[f"ordinary: {method}"] == f"pack_kernel {kernel}"
        assert of[f"frozen: {method}"] == kernel
        for kind in ("frozen, replayed", "graphed (deprecated)"):
            assert of[f"{kind}: {method}"] == "", "a replay launches nothing"
