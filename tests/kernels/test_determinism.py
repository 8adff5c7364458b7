"""The same call gives the same bits."""

import pytest
import torch

import nicefast as nf

F = nf.functional


def run(device, dtype, n, d):
    torch.manual_seed(1)
    p = nf.Partition.random(d, 0)
    x = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    shift = torch.randn(n, len(p.shifted), device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(len(p.shifted), device=device, dtype=dtype, requires_grad=True)
    s = torch.randn(d, device=device, dtype=dtype, requires_grad=True)
    z, log_prob = F.scale_log_prob(F.additive_coupling(x, shift, p, bias=bias), s, return_z=True)
    h = F.sample_prior(s, n, seed=3)
    loss = log_prob.sum() + (z.float() ** 2).sum() + (h.float() ** 3).sum()
    return [log_prob, z, h, *torch.autograd.grad(loss, (x, shift, bias, s))]


def test_twice(triton_backend, device):
    for a, b in zip(
        run(device, torch.float32, 37, 13), run(device, torch.float32, 37, 13), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_many_times_on_a_gpu(triton_backend, device, dtype):
    first = run(device, dtype, 40_001, 785)
    for _ in range(5):
        for a, b in zip(first, run(device, dtype, 40_001, 785), strict=True):
            assert torch.equal(a, b)
