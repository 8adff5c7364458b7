"""Kernel tests run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import importlib.util
import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before nicefast

import numpy as np
import pytest

import nicefast as nf
from helpers import GuardedMemory
from ways import Way

torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)


def _row_wise_dot(builder, a, b, d, *precision):
    """``tl.dot`` of the interpreter, by which a row's bits do not depend on its place in the tile.

    Kernels promise that on a device. The interpreter's own product is a BLAS's, and on some
    processors a BLAS sums rows in different orders. The loops of ``einsum`` call no BLAS. They sum
    in float64, so that the error of a result is not a matter of the order of its sums.
    """
    from triton.runtime.interpreter import TensorHandle

    assert {a.data.dtype.kind, b.data.dtype.kind} == {"f"}, (a.dtype, b.dtype)
    left, right = (np.ascontiguousarray(side.data, np.float64) for side in (a, b))
    product = np.einsum("mk,kn->mn", left, right, optimize=False)
    return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


if not HAS_GPU and importlib.util.find_spec("triton"):
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot = _row_wise_dot


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="everything that takes long, too")


def pytest_collection_modifyitems(config, items):
    missing = {} if HAS_GPU else {"gpu": "a GPU: torch.cuda.is_available() is false here"}
    if not config.getoption("--all"):
        missing["long"] = "--all, which make check-all gives"
    for item in items:
        for mark, what in missing.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"needs {what}"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def triton_backend():
    pytest.importorskip("triton", reason="needs Triton")
    with nf.set_backend("triton"):
        yield


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    """Both implementations in turn."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    with nf.set_backend(request.param):
        yield request.param


@pytest.fixture
def guarded(monkeypatch, triton_backend):
    """Kernel outputs come from memory poisoned with NaN, between guard bands checked afterwards."""
    memory = GuardedMemory(torch.empty)
    monkeypatch.setattr(torch, "empty", memory.empty)
    yield memory
    monkeypatch.undo()
    memory.check()


@pytest.fixture(params=Way.NAMES)
def way(request, monkeypatch):
    """Each engine in turn, the layer path, and a frozen flow: see :class:`ways.Way`."""
    if request.param in ("kernel", "gemm"):
        pytest.importorskip("triton", reason="needs Triton")
    found = Way(request.param, monkeypatch)
    with nf.set_backend(found.backend):
        yield found
