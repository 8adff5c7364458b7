"""The definition itself: change of variables, by hand and against determinants."""

import math

import pytest
import torch
from torch.distributions import (
    Independent,
    MultivariateNormal,
    PowerTransform,
    TransformedDistribution,
    Uniform,
)

import nicefast as nf
from helpers import partitions

F, R = nf.functional, nf.reference


def flow(d, **options):
    options = {"hidden": (16,), "couplings": 3, **options}
    model = nf.NICE(d, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model


def affine(d, scale, offset):
    """The flow of Y = scale * X + offset for X of the prior: z = (y - offset) / scale."""
    model = nf.NICE(d, hidden=(), couplings=2, partition="half", prior="normal").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for coupling in model.couplings:
            coupling.conditioner.linears[-1].bias.fill_(-offset)
        model.scaling.log_scale.fill_(-math.log(scale))
    return model


@pytest.fixture(autouse=True, params=["reference", "triton"])
def _both(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="needs Triton")
        if torch.cuda.is_available():
            pytest.skip("the model here lives on the CPU")
    with nf.set_backend(request.param):
        yield


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
def test_log_det_is_that_of_the_jacobian(partition, prior):
    model = flow(5, partition=partition, prior=prior)
    x = torch.randn(5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[0], x)
    z, log_det = model(x)
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-12)
    back = torch.autograd.functional.jacobian(lambda z: model.inverse(z)[0], z.detach())
    assert torch.allclose(back @ jacobian, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert model.inverse(z)[1].item() == pytest.approx(-log_det.item())
    want = R.prior_log_prob(z, prior).sum() + log_det
    assert model.log_prob(x).item() == pytest.approx(want.item())


def test_coupling_conserves_volume():
    for p in partitions(6):
        linear = torch.nn.Linear(len(p.conditioning), len(p.shifted)).double()
        layer = nf.AdditiveCoupling(p, torch.nn.Sequential(linear, torch.nn.Tanh()))
        x = torch.randn(6, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda x, f=layer: f(x)[0], x)
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(0.0, abs=1e-14)
        assert torch.equal(layer(x)[1], torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_inverse_undoes_forward(prior):
    model = flow(13, partition="random", prior=prior)
    x = 5 * torch.randn(20, 13, dtype=torch.float64)
    assert torch.allclose(model.inverse(model(x)[0])[0], x, atol=1e-12)
    assert torch.allclose(model(model.inverse(x)[0])[0], x, atol=1e-12)


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_density_integrates_to_one(prior):
    if nf.get_backend() == "triton":
        pytest.skip("600,000 points are too many for the interpreter")
    model = flow(2, partition="half", activation="tanh", prior=prior)
    axis = torch.linspace(-40, 40, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = model.log_prob(grid).exp().sum().item() * (axis[1] - axis[0]).item() ** 2
    assert total == pytest.approx(1.0, abs=1e-3)


def test_two_x_plus_three_of_a_normal():
    """Y = 2X + 3, X ~ N(0, 1): Y ~ N(3, 4), in each of two independent features."""
    y = torch.tensor([[3.0, 3.0], [1.0, 4.5]], dtype=torch.float64)
    want = torch.distributions.Normal(3.0, 2.0).log_prob(y).sum(-1)
    assert torch.allclose(affine(2, 2.0, 3.0).log_prob(y), want)
    assert affine(2, 2.0, 3.0).log_prob(y)[0].item() == pytest.approx(-math.log(2 * math.pi * 4))


def test_two_x_plus_three_of_a_uniform():
    """Y = 2X + 3, X ~ U(0, 1): the density is 1/2 on (3, 5), in each of two features."""
    unit = Independent(Uniform(torch.zeros(2).double(), torch.ones(2).double()), 1)
    d = TransformedDistribution(unit, affine(2, 2.0, 3.0).transform().inv)
    y = torch.tensor([[3.1, 4.9], [4.0, 4.0]], dtype=torch.float64)
    assert torch.allclose(d.log_prob(y), torch.full((2,), -2 * math.log(2), dtype=torch.float64))


def test_square_root_of_a_uniform():
    """Y = sqrt(X), X ~ U(0, 1): density 2y; then 2Y + 3 has density (v - 3) / 2."""
    unit = Independent(Uniform(torch.zeros(2).double(), torch.ones(2).double()), 1)
    root = PowerTransform(torch.tensor(0.5, dtype=torch.float64))
    v = torch.tensor([[3.5, 4.5], [4.0, 4.9]], dtype=torch.float64)
    for scale, offset, density in ((1.0, 0.0, 2 * (v - 3) / 2), (2.0, 3.0, (v - 3) / 2)):
        y = v if offset else (v - 3) / 2
        d = TransformedDistribution(unit, [root, affine(2, scale, offset).transform().inv])
        assert torch.allclose(d.log_prob(y), density.log().sum(-1))


def test_a_x_plus_b_of_a_multivariate_normal():
    """Y = AX + b, X ~ N(0, I): Y ~ N(b, A A^T), for A = L U diag(s) built of two couplings."""
    lower = torch.tensor([[0.7, -1.2], [0.3, 2.0]], dtype=torch.float64)
    upper = torch.tensor([[-0.5, 0.4], [1.5, 0.9]], dtype=torch.float64)
    b = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    s = torch.tensor([0.5, 2.0, 1.5, 0.8], dtype=torch.float64)
    model = nf.NICE(4, hidden=(), couplings=2, partition="half", prior="normal").double()
    eye = torch.eye(4, dtype=torch.float64)
    first, second = eye.clone(), eye.clone()
    first[2:, :2], second[:2, 2:] = lower, upper  # z = diag(1/s) second first y + constant
    with torch.no_grad():
        for coupling, weight in zip(model.couplings, (lower, upper), strict=True):
            coupling.conditioner.linears[0].weight.copy_(weight)
            coupling.conditioner.linears[0].bias.zero_()
        m = second @ first / s[:, None]
        a = torch.linalg.inv(m)
        constant = -(second @ first) @ b
        model.couplings[1].conditioner.linears[0].bias.copy_(constant[:2] - upper @ constant[2:])
        model.couplings[0].conditioner.linears[0].bias.copy_(constant[2:])
        model.scaling.log_scale.copy_(-s.log())
    y = 3 * torch.randn(20, 4, dtype=torch.float64)
    want = MultivariateNormal(b, a @ a.T).log_prob(y)
    assert torch.allclose(model.log_prob(y), want, atol=1e-10)
    x = torch.randn(6, 4, dtype=torch.float64)
    assert torch.allclose(model.inverse(x)[0], x @ a.T + b)


def test_every_operation_differentiates_twice():
    x, shift = (
        torch.randn(2, 5).double().requires_grad_(),
        torch.randn(2, 2).double().requires_grad_(),
    )
    s = torch.randn(5).double().requires_grad_()
    p = nf.Partition.half(5)
    assert torch.autograd.gradgradcheck(lambda x, m: R.additive_coupling(x, m, p), (x, shift))
    for prior in R.PRIORS:
        assert torch.autograd.gradgradcheck(
            lambda x, s, prior=prior: R.scale_log_prob(x, s, prior, True), (x, s)
        )
