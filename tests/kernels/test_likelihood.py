"""Scaling + prior + log-determinant + row sum against the float64 definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nicefast as nf
from helpers import DTYPES, assert_three_way, error, strided

pytest.importorskip("triton", reason="needs Triton")
from nicefast.kernels.prior import spans

F, R = nf.functional, nf.reference

SHAPES = [(1, 2), (3, 3), (33, 8), (5, 13), (2, 130), (3, 1027)]
PRIORS = ["logistic", "normal"]


def draw(n, d, dtype, device):
    h = (3 * torch.randn(n, d, device=device)).to(dtype)
    return h, torch.randn(d, device=device).mul(0.5).to(dtype)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_forward(guarded, device, dtype, n, d, prior):
    h, s = draw(n, d, dtype, device)
    exact_z, exact = R.scale_log_prob(h.double(), s.double(), prior, return_z=True)
    plain_z, plain = R.scale_log_prob(h, s, prior, return_z=True)
    log_prob = F.scale_log_prob(h, s, prior)
    assert log_prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_three_way(log_prob, plain, exact)
    z, again = F.scale_log_prob(h, s, prior, return_z=True)
    assert torch.equal(again, log_prob)
    assert_three_way(z, plain_z, exact_z)


@pytest.mark.parametrize("programs", [2, 1024])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("return_z", [False, True])
@pytest.mark.parametrize(("n", "d"), [(1, 2), (67, 8), (5, 13), (3, 1027)])
def test_backward(guarded, device, monkeypatch, n, d, return_z, prior, programs):
    monkeypatch.setattr("nicefast.kernels.tile.REDUCTION_PROGRAMS", programs)
    h, s = (t.requires_grad_() for t in draw(n, d, torch.float32, device))

    def gradients(function, dtype, cotangents):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (h, s)]
        outputs = function(*inputs, prior, return_z)
        outputs = outputs if return_z else (outputs,)
        return torch.autograd.grad(outputs, inputs, [c.to(dtype) for c in cotangents])

    random = [torch.randn(n, d, device=device), torch.randn(n, device=device)]
    summed = [torch.ones((), device=device).expand(n, d), torch.ones((), device=device).expand(n)]
    turned = [torch.randn(d, n, device=device).t(), torch.randn(n, 2, device=device)[:, 0]]
    for cotangents in (random, summed, turned):
        chosen = cotangents if return_z else cotangents[1:]
        got = gradients(F.scale_log_prob, torch.float32, chosen)
        plain = gradients(R.scale_log_prob, torch.float32, chosen)
        exact = gradients(R.scale_log_prob, torch.float64, chosen)
        for g, p, e in zip(got, plain, exact, strict=True):
            assert_three_way(g, p, e)


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
@pytest.mark.parametrize("prior", PRIORS)
def test_strides(guarded, device, layout, prior):
    h, s = draw(7, 13, torch.float32, device)
    h = strided(h, layout).detach().requires_grad_()
    log_prob = F.scale_log_prob(h, s, prior)
    exact = R.scale_log_prob(h.double(), s.double(), prior)
    assert error(log_prob, exact) < 1e-4
    (got,) = torch.autograd.grad(log_prob.sum(), h)
    (want,) = torch.autograd.grad(exact.sum(), h)
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("return_z", [False, True])
def test_gradcheck_in_float64(triton_backend, device, prior, return_z):
    h, s = (t.requires_grad_() for t in draw(3, 5, torch.float64, device))
    assert torch.autograd.gradcheck(lambda h, s: F.scale_log_prob(h, s, prior, return_z), (h, s))


@pytest.mark.parametrize("prior", PRIORS)
def test_zero_rows(triton_backend, device, prior):
    h, s = (t.requires_grad_() for t in draw(0, 5, torch.float32, device))
    z, log_prob = F.scale_log_prob(h, s, prior, return_z=True)
    assert z.shape == (0, 5)
    assert log_prob.shape == (0,)
    (log_prob.sum() + z.sum()).backward()
    assert torch.equal(s.grad, torch.zeros_like(s))


def test_nan_stays_in_its_row(guarded, device):
    h, s = draw(9, 13, torch.float32, device)
    h[4, 7] = torch.nan
    for prior in PRIORS:
        log_prob = F.scale_log_prob(h, s, prior)
        assert log_prob.isnan().nonzero().flatten().tolist() == [4]


def test_far_tails(guarded, device):
    """|z| = 1e4 gives about -1e4 with the logistic prior, and its gradient is -sign(z)."""
    h = torch.tensor([[1e4, -1e4, 0.0]], device=device, requires_grad=True)
    log_prob = F.scale_log_prob(h, torch.zeros(3, device=device))
    assert log_prob.item() == pytest.approx(-2e4 - 2 * 0.6931472)
    log_prob.backward()
    assert torch.equal(h.grad, torch.tensor([[-1.0, 1.0, 0.0]], device=device))


def test_infinite_input_has_density_zero(guarded, device):
    h = torch.tensor([[torch.inf, 0.0], [0.0, 0.0]], device=device)
    for prior in PRIORS:
        log_prob = F.scale_log_prob(h, torch.zeros(2, device=device), prior)
        assert log_prob[0] == -torch.inf
        assert log_prob[1].isfinite()


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 70),
    seed=st.integers(0, 99),
    prior=st.sampled_from(PRIORS),
)
def test_any_shape(n, d, seed, prior):
    torch.manual_seed(seed)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    h, s = draw(n, d, torch.float64, on)
    with nf.set_backend("triton"):
        assert error(F.scale_log_prob(h, s, prior), R.scale_log_prob(h, s, prior)) < 1e-11 * d


@pytest.mark.parametrize("prior", PRIORS)
def test_products_of_many_factors_do_not_overflow(guarded, device, prior):
    """At 0 every factor is 2, and a lane has 200 of them: 2^200 is infinite in float32."""
    d = 50 * 1024
    h, s = torch.zeros(2, d, device=device), torch.zeros(d, device=device)
    assert spans(d, 1024)["SPANS"] > 1
    got = F.scale_log_prob(h, s, prior)
    exact = R.scale_log_prob(h.double(), s.double(), prior)
    assert error(got / exact, torch.ones_like(exact)) < 1e-6
