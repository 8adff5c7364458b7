import math

import pytest
import torch

import nicefast as nf
from helpers import kolmogorov_smirnov

Logistic = nf.priors.Logistic


def exact_logistic():
    """The same distribution assembled from torch's parts."""
    from torch.distributions import SigmoidTransform, TransformedDistribution, Uniform

    base = Uniform(torch.zeros((), dtype=torch.float64), 1)
    return TransformedDistribution(base, [SigmoidTransform().inv])


def test_log_prob_against_torch():
    z = torch.linspace(-15, 15, 301, dtype=torch.float64)
    assert torch.allclose(
        Logistic().expand((301,)).log_prob(z), exact_logistic().log_prob(z), atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_every_finite_input(dtype):
    largest = torch.finfo(dtype).max
    z = torch.tensor([0.0, 1e-30, 20.0, 1e4, -1e4, largest / 4, -largest / 4], dtype=dtype)
    log_prob = nf.priors.standard("logistic", dtype=dtype).log_prob(z)
    assert log_prob.isfinite().all()
    assert log_prob[3] == log_prob[4] == -1e4
    assert log_prob[0].item() == pytest.approx(-2 * math.log(2))


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_density_integrates_to_one_and_matches_the_cdf(prior):
    d = nf.priors.standard(prior, dtype=torch.float64)
    z = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    p = d.log_prob(z).exp()
    assert torch.trapezoid(p, z).item() == pytest.approx(1.0, abs=1e-9)
    between = torch.trapezoid(p[:120_001], z[:120_001]).item()
    assert between == pytest.approx(0.5, abs=1e-9)
    assert torch.trapezoid(-p * d.log_prob(z), z).item() == pytest.approx(
        d.entropy().item(), abs=1e-6
    )
    assert torch.trapezoid(p * z * z, z).item() == pytest.approx(d.variance.item(), abs=1e-6)


def test_cdf_and_icdf_undo_each_other():
    d = Logistic(torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
    u = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    assert torch.allclose(d.cdf(d.icdf(u)), u)


def test_location_and_scale():
    loc = torch.tensor([0.0, 3.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    d = Logistic(loc, scale)
    z = torch.randn(5, 2, dtype=torch.float64)
    want = nf.reference.prior_log_prob((z - loc) / scale, "logistic") - scale.log()
    assert torch.allclose(d.log_prob(z), want)
    assert torch.autograd.gradcheck(lambda a, b: Logistic(a, b).log_prob(z), (loc, scale))
    assert d.batch_shape == (2,)
    assert d.expand((4, 2)).log_prob(z[:4]).shape == (4, 2)
    assert d.rsample((7,)).requires_grad
    assert not d.sample((7,)).requires_grad
    assert torch.equal(d.mean, loc)
    assert d.stddev[1].item() == pytest.approx(0.5 * math.pi / math.sqrt(3))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sampler_is_never_infinite(monkeypatch, uniform, dtype):
    def extreme(shape, dtype=None, device=None):
        return torch.full(shape, uniform, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "rand", extreme)
    z = nf.priors.standard("logistic", dtype=dtype).rsample((3,))
    assert z.isfinite().all()
    assert z.dtype == dtype


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_samples_follow_the_cdf(prior):
    torch.manual_seed(3)
    assert kolmogorov_smirnov(nf.priors.standard(prior).sample((20_000,)), prior) < 1.95


def test_second_derivative_at_zero():
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: Logistic().log_prob(z), (z,))


def test_bad_input():
    with pytest.raises(ValueError, match="prior must be one of logistic, normal, got 'cauchy'"):
        nf.priors.standard("cauchy")
    with pytest.raises(ValueError, match="scale"):
        Logistic(0.0, -1.0, validate_args=True)


@pytest.mark.parametrize("wrong", [None, "a", [1.0], 1j])
@pytest.mark.parametrize("name", ["loc", "scale"])
def test_what_is_no_number_is_named(name, wrong):
    with pytest.raises(TypeError, match=f"{name} must be a number or a tensor, got "):
        Logistic(**{name: wrong})
