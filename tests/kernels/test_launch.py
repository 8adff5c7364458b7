"""A launch that is remembered is the launch that Triton would make: with a stand-in for its driver,
outside the interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import torch, triton
import nicefast as nf
from bench import host
from nicefast.kernels import flow, launch, packing

seen, own = [], []


class Driver(host.Driver):
    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, about, enter, leave, *args):
            seen.append((metadata.hash, (x, y, z), tuple(map(said, args))))

        return run


def said(a):
    if isinstance(a, torch.Tensor):
        return a.dtype, a.shape, a.stride(), a.data_ptr() % 16
    return type(a), a


def counted(kernel):
    run = kernel.run

    def count(*args, **options):
        own.append(kernel)
        return run(*args, **options)

    kernel.run = count


for kernel in (flow.flow_fwd_kernel, flow.flow_inv_kernel, packing.pack_kernel):
    counted(kernel)
torch.set_grad_enabled(False)
memory = torch.randn(4096)
layouts = {
    "dense": memory[: 200 * 6].view(200, 6),
    "of few rows": memory[: 3 * 6].view(3, 6),
    "strided": memory[: 200 * 16].view(200, 16)[:, :6],
    "off": memory[1 : 1 + 200 * 6].view(200, 6),
}
with host.stand_in():
    triton.runtime.driver.set_active(Driver())
    for context in (0, 2):
        model = nf.NICE(6, hidden=(8, 8), couplings=2, context=context)
        c = torch.randn(200, 2) if context else None
        for name, x in layouts.items():
            if context and name != "dense":
                continue
            for method in ("log_prob", "forward", "inverse"):
                if method != "log_prob" and name in ("strided", "off"):
                    continue
                call, known = getattr(model, method), []
                for turn in range(3):
                    if turn == 2:
                        launch._compiled.clear()
                    seen.clear(), own.clear()
                    call(x, None if c is None else c[: len(x)])
                    known.append((list(seen), len(own)))
                first, second, third = known
                assert first[0] == second[0] == third[0], (name, method)
                assert len(first[0]) == 2, "packing, and the flow"
                # where rows begin is looked at by Triton alone
                assert second[1] == (name == "off"), (name, method, known)
                assert third[1] == 2, "nothing was remembered"
        if context:  # of another dtype, in the same place of the same launch
            for c in (c, c.half(), c):
                seen.clear()
                model.log_prob(layouts["dense"], c)
                assert seen[-1][2][1][0] is c.dtype
                known.append(seen[-1][0])
            assert known[-3] == known[-1] != known[-2], "the kernel of another dtype"
    kinds = len(launch._compiled)
    launch.KINDS = kinds
    model.log_prob(layouts["dense"][:, :3].repeat(1, 2), c)
    nf.NICE(5, hidden=(8,)).log_prob(torch.randn(4, 5))
    assert len(launch._compiled) <= kinds
print("the same")
"""


def test_a_remembered_launch_is_triton_s_own():
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout.endswith("the same\n"), run.stderr
