import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch

import nicefast as nf
from nicefast.runtime import backend as module


def test_context_manager_restores():
    before = nf.get_backend()
    with nf.set_backend("reference"):
        assert nf.get_backend() == "reference"
        with nf.set_backend("auto"):
            assert nf.get_backend() == "auto"
        assert nf.get_backend() == "reference"
    assert nf.get_backend() == before


def test_set_at_once_and_for_every_thread():
    restore = nf.set_backend("reference")
    try:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(nf.get_backend()))
        thread.start()
        thread.join()
        assert seen == ["reference"]
    finally:
        restore.__exit__(None, None, None)


def test_unknown_name():
    with pytest.raises(ValueError, match="must be one of auto, triton, reference, got 'cuda'"):
        nf.set_backend("cuda")


def test_auto_takes_the_reference_on_the_cpu():
    with nf.set_backend("auto"):
        assert not module.uses_kernels(torch.device("cpu"))


def test_kernels_really_run(triton_backend, device, monkeypatch):
    """The two backends are two implementations: a kernel that is broken is noticed."""
    called = []
    monkeypatch.setattr(module.kernels(), "couple", lambda x, *rest: called.append(1) or x.clone())
    x, shift = torch.zeros(2, 4, device=device), torch.ones(2, 2, device=device)
    nf.functional.additive_coupling(x, shift, nf.Partition.half(4))
    with nf.set_backend("reference"):
        nf.functional.additive_coupling(x, shift, nf.Partition.half(4))
    assert called == [1]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose kernels are not interpreted, as far as the choice of a backend asks."""
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(module, "_interpreted", lambda: (False, None))
    monkeypatch.setattr(module, "_why_not_gpu", module._why_not_gpu.__wrapped__)
    return torch.device("cuda", 0)


def test_a_gpu_without_a_c_compiler_takes_pytorch(gpu, monkeypatch):
    """Triton compiles what launches kernels at the first launch."""
    import triton

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton.runtime, "driver", Driver())
    with nf.set_backend("auto"):
        assert not module.uses_kernels(gpu)
    assert "Failed to find C compiler" in module.why_not_kernels(gpu)
    monkeypatch.undo()


@pytest.fixture
def probed(gpu, monkeypatch):
    """That GPU, where the one kernel that is tried does as ``probe`` does."""
    import triton

    from nicefast.kernels import launch

    class Probe:
        def __getitem__(self, grid):
            assert grid == (1,)
            return self.run

    probe, zeros = Probe(), torch.zeros
    monkeypatch.setattr(triton.runtime, "driver", mock.Mock())
    monkeypatch.setattr(launch, "_probe", probe)
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))  # there is no such device
    return probe


def test_a_triton_that_cannot_compile_leaves_the_gpu_to_pytorch_in_one_line(
    gpu, probed, monkeypatch
):
    def fail(y):
        raise RuntimeError("ptxas: unknown target sm_999\n" + 40 * "and its assembly\n")

    probed.run = fail
    reason = (
        "Triton cannot compile and launch kernels here (RuntimeError: ptxas: unknown target sm_999)"
    )
    with nf.set_backend("auto"):
        assert not module.uses_kernels(gpu)
        assert module.describe(gpu) == f"plain PyTorch on cuda:0 ({reason})"
    monkeypatch.setattr(module, "_choice", "triton")
    with pytest.raises(RuntimeError) as raised:
        module.uses_kernels(gpu)
    assert str(raised.value) == f"backend 'triton' cannot run on cuda:0: {reason}"


def test_a_chip_that_is_too_old_says_so_in_one_line(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert module.why_not_kernels(gpu) == (
        "compute capability 7.5 is older than 8.0, the oldest the kernels are checked for"
    )


def test_a_gpu_that_compiles_takes_the_kernels(gpu, probed):
    probed.run = lambda y: None
    with nf.set_backend("auto"):
        assert module.uses_kernels(gpu)


def test_a_gpu_without_memory_is_not_one_without_kernels(gpu, probed):
    def fail(y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    probed.run = fail
    with nf.set_backend("auto"), pytest.raises(torch.OutOfMemoryError):
        module.uses_kernels(gpu)


def run(code, **environment):
    """Run ``code`` in a Python without Triton's interpreter."""
    import os

    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NICEFAST_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


USE = """
import torch, nicefast as nf
x = torch.zeros(2, 4)
print(nf.functional.additive_coupling(x, torch.ones(2, 2), nf.Partition.half(4)).sum().item())
print(nf.NICE(4, hidden=(8,)).log_prob(x).shape[0], nf.NICE(4, hidden=(8,)).sample(3).shape[0])
"""
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


def test_without_triton():
    done = run(NO_TRITON + USE)
    assert done.stdout.split() == ["4.0", "2", "3"], done.stderr


def test_import_needs_torch_and_numpy_only():
    code = """
import sys
before = set(sys.modules)
import nicefast
third = {m.partition('.')[0] for m in set(sys.modules) - before}
print(sorted(third & {'triton', 'safetensors', 'typer', 'rich', 'matplotlib', 'sklearn', 'scipy'}))
"""
    done = run("import torch\n" + code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_triton_where_it_cannot_run():
    without = run(NO_TRITON + "import nicefast as nf; nf.set_backend('triton')")
    assert (
        "RuntimeError: backend 'triton' cannot run here: Triton cannot be imported"
        in without.stderr
    )
    environment = run(NO_TRITON + USE, NICEFAST_BACKEND="triton")
    assert "backend 'triton' cannot run on cpu: Triton cannot be imported" in environment.stderr
    if not torch.cuda.is_available():
        no_gpu = run("import nicefast as nf; nf.set_backend('triton')")
        assert "no GPU is available" in no_gpu.stderr


def test_environment():
    assert run(USE, NICEFAST_BACKEND="reference").stdout.split() == ["4.0", "2", "3"]
    bad = run(USE, NICEFAST_BACKEND="cuda")
    assert "NICEFAST_BACKEND must be one of auto, triton, reference, got 'cuda'" in bad.stderr
