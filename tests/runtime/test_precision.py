"""The precision of products, by whichever of PyTorch's settings it is said."""

import contextlib

import pytest
import torch

import nicefast as nf
from nicefast.runtime.precision import at_matmul_precision, at_precision, matmul_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("level", ["highest", "high", "medium"])
def test_one_setting_for_all_devices(level):
    torch.set_float32_matmul_precision(level)
    assert matmul_precision(CPU) == matmul_precision(GPU) == level


def test_each_device_has_its_own():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    assert (matmul_precision(CPU), matmul_precision(GPU)) == ("highest", "high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert (matmul_precision(CPU), matmul_precision(GPU)) == ("medium", "highest")


def test_flows_run_under_either():
    flow, x = nf.NICE(6, hidden=(8,)), torch.randn(3, 6)
    expected = flow.log_prob(x)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert torch.equal(flow.log_prob(x), expected)
    assert "precision 'highest'" in flow.explain()


def test_a_block_leaves_what_it_found():
    torch.set_float32_matmul_precision("high")
    with at_matmul_precision("medium"):
        assert matmul_precision(CPU) == "medium"
    assert torch.get_float32_matmul_precision() == "high"
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # the other is tf32 now
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError), at_matmul_precision("highest"):
            assert matmul_precision(CPU) == "highest"
            raise ZeroDivisionError
        assert (matmul_precision(CPU), matmul_precision(GPU)) == ("high", "highest")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with at_matmul_precision("high"):
        assert matmul_precision(GPU) == "high"
    assert (matmul_precision(CPU), matmul_precision(GPU)) == ("medium", "highest")


def test_a_block_by_the_name_of_its_precision():
    with at_precision("bf16", CPU):
        assert torch.is_autocast_enabled("cpu")
        assert matmul_precision(CPU) == "highest"
        with at_precision("tf32", CPU):
            assert not torch.is_autocast_enabled("cpu")
            assert matmul_precision(CPU) == "high"
    assert not torch.is_autocast_enabled("cpu")
    assert matmul_precision(CPU) == "highest"
    with pytest.raises(ValueError, match="precision must be one of float32, tf32, bf16, got 'fp8'"):
        at_precision("fp8", CPU).__enter__()
