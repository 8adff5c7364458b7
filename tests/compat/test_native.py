"""nicefast's layers as native classes of each library: one density, whoever computes it."""

import pytest
import torch

import nicefast as nf
from helpers import kolmogorov_smirnov, make

nflows = pytest.importorskip("nflows", reason="needs nflows")
normflows = pytest.importorskip("normflows", reason="needs normflows")
zuko = pytest.importorskip("zuko", reason="needs zuko")
pytest.importorskip("FrEIA", reason="needs FrEIA")

from FrEIA.framework import SequenceINN  # noqa: E402
from nflows.flows import Flow  # noqa: E402
from nflows.transforms import CompositeTransform, ReversePermutation  # noqa: E402

from nicefast.compat import distributions, freia  # noqa: E402
from nicefast.compat import nflows as own_nflows  # noqa: E402
from nicefast.compat import normflows as own_normflows  # noqa: E402
from nicefast.compat import zuko as own_zuko  # noqa: E402

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


def scaled(layer, model):
    with torch.no_grad():
        getattr(layer, "layer", layer).log_scale.copy_(model.scaling.log_scale)
    return layer


def in_nflows(model):
    layers = [own_nflows.AdditiveCoupling(c.partition, c.conditioner) for c in model.couplings]
    layers.append(scaled(own_nflows.Scaling(6), model))
    flow = Flow(CompositeTransform([*layers, ReversePermutation(6)]), own_nflows.Logistic((6,)))
    return flow.log_prob, flow.sample


def in_normflows(model):
    layers = [own_normflows.AdditiveCoupling(c.partition, c.conditioner) for c in model.couplings]
    layers = [scaled(own_normflows.Scaling(6), model), *layers[::-1]]
    flow = normflows.NormalizingFlow(own_normflows.Logistic(6), layers)
    return flow.log_prob, lambda n: flow.sample(n)[0]


def in_zuko(model):
    layers = [own_zuko.AdditiveCoupling(c.partition, c.conditioner) for c in model.couplings]
    layers.append(scaled(own_zuko.Scaling(6), model))
    flow = zuko.lazy.Flow(layers, own_zuko.Logistic(6))
    return flow().log_prob, lambda n: flow().sample((n,))


def in_freia(model):
    inn = SequenceINN(6)
    for c in model.couplings:
        inn.append(freia.AdditiveCoupling, partition=c.partition, conditioner=c.conditioner)
    inn.append(freia.Scaling)
    scaled(inn.module_list[-1], model)

    def log_prob(x):
        z, log_det = inn(x)
        back, inverse = inn(z, rev=True)
        torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inverse, -log_det)
        return model.prior.log_prob(z).sum(-1) + log_det

    return log_prob, lambda n: inn(model.prior.sample((n, 6)), rev=True)[0]


def in_torch(model):
    prior = distributions.Logistic(torch.zeros(6), torch.ones(6))
    steps = [distributions.ScalingTransform(model.scaling.log_scale.detach(), cache_size=1)]
    steps += [
        distributions.CouplingTransform(c.partition, c.conditioner).with_cache()
        for c in reversed(model.couplings)
    ]
    d = torch.distributions.TransformedDistribution(
        torch.distributions.Independent(prior, 1), steps
    )
    drawn = d.rsample((4,))
    torch.testing.assert_close(d.log_prob(drawn), model.log_prob(drawn), rtol=1e-5, atol=1e-4)
    assert d.expand((2,)).sample().shape == (2, 6)
    return d.log_prob, lambda n: d.sample((n,))


@pytest.mark.parametrize("build", [in_nflows, in_normflows, in_zuko, in_freia, in_torch])
def test_log_prob_and_samples_are_those_of_the_flow(build):
    model = make(6)
    log_prob, sample = build(model)
    torch.testing.assert_close(log_prob(X), model.log_prob(X), rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        z, _ = model(sample(2000))
    assert kolmogorov_smirnov(z, "logistic") < 2


@pytest.mark.parametrize("context", [0, 3])
def test_context_reaches_the_conditioner(context):
    p = nf.Partition.half(6)
    mlp = nf.MLP(3, (8,), 3, context=context)
    c = torch.randn(9, context) if context else None
    y, _ = nf.AdditiveCoupling(p, mlp)(X, c)
    torch.testing.assert_close(own_nflows.AdditiveCoupling(p, mlp)(X, c)[0], y)
    torch.testing.assert_close(own_normflows.AdditiveCoupling(p, mlp).inverse(X, c)[0], y)
    torch.testing.assert_close(own_zuko.AdditiveCoupling(p, mlp)(c)(X), y)
    module = freia.AdditiveCoupling([(6,)], [(3,)] if context else [], partition=p, conditioner=mlp)
    torch.testing.assert_close(module((X,), [c] if context else [])[0][0], y)


def test_priors_in_double_precision_and_under_a_context():
    base = own_nflows.Logistic((2, 3)).double()
    assert base.sample(4).dtype == torch.float64
    assert base.sample(4, context=torch.zeros(5, 1)).shape == (5, 4, 2, 3)
    assert torch.equal(base.mean(), torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match=r"inputs must have shape \(N, 2, 3\), got \(4, 3\)"):
        base.log_prob(torch.zeros(4, 3))
    z, log_prob = own_normflows.Logistic((2, 3)).double()(7)
    assert (z.shape, log_prob.shape, z.dtype) == ((7, 2, 3), (7,), torch.float64)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="partition must split 6 features, as dims_in has, got 4"):
        freia.AdditiveCoupling(
            [(6,)], partition=nf.Partition.half(4), conditioner=torch.nn.Linear(2, 2)
        )
    with pytest.raises(ValueError, match="features must be an integer >= 1, got 0"):
        own_zuko.Scaling(0)
    with pytest.raises(ValueError, match=r"log_scale must be a tensor of shape \(D,\)"):
        distributions.ScalingTransform(torch.zeros(2, 2))
