"""Ceilings: the larger of two times, and the published rates."""

import pytest

from nicefast.roofline import DEVICES, PRECISIONS, Ceilings, Work


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
