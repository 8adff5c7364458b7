"""Ceilings: the larger of two times, and the published rates."""

import pytest
import torch

from nicefast import roofline
from nicefast.roofline import DEVICES, PRECISIONS, Ceilings, Work

CPU = torch.device("cpu")


def test_the_larger_of_the_two_times_counts():
    ceilings = Ceilings(flops=100.0, bytes=10.0)
    assert ceilings.seconds(*Work(300, 20)) == 3  # products: 3 s, memory: 2 s
    assert ceilings.seconds(*Work(300, 50)) == 5  # memory: 5 s


@pytest.mark.parametrize("device", DEVICES)
def test_published_rates_are_in_order(device):
    published = DEVICES[device]
    assert 0 < published.fp32 < published.tf32 <= published.bf16
    assert 0 < published.host < published.bytes
    for precision in PRECISIONS:
        ceilings = published.ceilings(precision)
        assert 0 < ceilings.flops <= published.bf16
        assert ceilings.bytes == published.bytes
    assert 3 * published.ceilings("tf32x3").flops == pytest.approx(published.tf32)


def test_a_precision_that_nobody_publishes():
    with pytest.raises(ValueError, match=r"precision must be one of bf16, .*fp32, got 'fp16'"):
        DEVICES["H100 SXM"].ceilings("fp16")


def test_the_fastest_library_is_the_ceiling(monkeypatch):
    """PyTorch's own product may be another library's, at less than half of its rate."""
    seconds = {"torch.mm": 2.0, "oneDNN": 0.5, "copy": 1.0}
    monkeypatch.setattr(
        roofline, "product_calls", lambda *_: ({n: n for n in list(seconds)[:2]}, 100)
    )
    monkeypatch.setattr(roofline, "_best", lambda call, _: seconds.get(str(call), 1.0))
    assert roofline.ceilings.__wrapped__(CPU, False, "highest").flops == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_that_ceilings_are_measured_by_are_products(dtype):
    calls, operations = roofline.product_calls(dtype, 16, CPU)
    assert operations == 2 * 16**3
    found = [call() for call in calls.values()]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
