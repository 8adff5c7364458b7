import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, TransformedDistribution

import nicefast as nf
from nicefast.distributions import FlowDistribution


def make(features, **options):
    model = nf.NICE(features, **{"hidden": (8,), "couplings": 2, **options})
    with torch.no_grad():
        model.scaling.log_scale.normal_()
    return model


def test_shapes_and_values(backend, device):
    flow = make((1, 2, 3)).to(device)
    d = flow.distribution()
    assert d.batch_shape == ()
    assert d.event_shape == (1, 2, 3)
    assert d.sample().shape == (1, 2, 3)
    x = d.sample((4, 5))
    assert x.shape == (4, 5, 1, 2, 3)
    assert d.log_prob(x).shape == (4, 5)
    assert torch.allclose(d.log_prob(x), flow.log_prob(x))
    assert not x.requires_grad
    assert d.rsample((2,)).requires_grad


def test_context_gives_the_batch_shape(backend, device):
    flow = make(4, context=3).to(device)
    c = torch.randn(2, 5, 3, device=device)
    d = flow.distribution(c)
    assert d.batch_shape == (2, 5)
    x = d.sample((7,))
    assert x.shape == (7, 2, 5, 4)
    assert torch.allclose(d.log_prob(x), flow.log_prob(x, c.expand(7, 2, 5, 3)))
    one = torch.zeros(4, device=device)
    assert d.log_prob(one).shape == (2, 5)
    assert torch.allclose(d.log_prob(one)[1, 2], flow.log_prob(one, c[1, 2]), atol=1e-5)
    e = flow.distribution(c[0]).expand(torch.Size((6, 5)))
    assert e.sample((2,)).shape == (2, 6, 5, 4)
    assert e.log_prob(torch.zeros(6, 5, 4, device=device)).shape == (6, 5)


def test_rsample_is_differentiable(backend, device):
    flow = make(4).to(device)
    flow.distribution().rsample((3,)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    assert flow.scaling.log_scale.grad.abs().sum() > 0


def test_same_seed_same_sample():
    d = make(4).distribution()
    torch.manual_seed(7)
    a = d.sample((3,))
    torch.manual_seed(7)
    assert torch.equal(a, d.sample((3,)))


def test_validation():
    d = FlowDistribution(make(4), validate_args=True)
    with pytest.raises(ValueError, match="value"):
        d.log_prob(torch.full((2, 4), torch.nan))


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_transformed_distribution_in_both_directions(backend, device, shape):
    flow = make(shape).to(device)
    base = Independent(
        nf.priors.Logistic(torch.zeros(shape, device=device), torch.ones(shape, device=device)),
        len(shape),
    )
    model = TransformedDistribution(base, [flow.transform().inv])
    x = torch.randn(5, *shape, device=device)
    assert torch.allclose(model.log_prob(x), flow.log_prob(x), atol=1e-4)
    assert model.sample((3,)).shape == (3, *shape)
    assert model.event_shape == shape
    # the other way: the latent's distribution, when the data are the flow's
    latent = TransformedDistribution(flow.distribution(), [flow.transform()])
    z = torch.randn(5, *shape, device=device)
    assert torch.allclose(latent.log_prob(z), base.log_prob(z), atol=1e-4)


def test_transform_laws():
    flow = make(3)
    t = flow.transform()
    x = torch.randn(4, 3)
    z = t(x)
    assert torch.allclose(t.inv(z), x, atol=1e-5)
    assert t.inv.inv is t
    assert t == flow.transform()
    assert t.log_abs_det_jacobian(x, z).shape == (4,)
    assert torch.allclose(t.inv.log_abs_det_jacobian(z, x), -t.log_abs_det_jacobian(x, z))
    assert t.domain.event_dim == t.codomain.event_dim == 1
    assert t.with_cache(1).flow is flow
    cached = t.with_cache(1)
    assert cached(x) is cached(x)


def test_conditional_transform():
    flow = make(2, context=3, prior="normal")
    c = torch.randn(5, 3)
    base = MultivariateNormal(torch.zeros(5, 2), torch.eye(2))
    d = TransformedDistribution(base, [flow.transform(c).inv])
    x = torch.randn(5, 2)
    assert torch.allclose(d.log_prob(x), flow.log_prob(x, c), atol=1e-4)
