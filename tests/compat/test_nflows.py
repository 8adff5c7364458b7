"""nflows' additive coupling made fast, and nicefast's classes for it, in what is nflows' own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import nicefast as nf

pytest.importorskip("nflows", reason="needs nflows")

from nflows.distributions.base import Distribution
from nflows.flows import Flow
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms import (
    AdditiveCouplingTransform,
    CompositeTransform,
    InverseTransform,
    ReversePermutation,
    Transform,
)

from nicefast.compat import nflows as own

MASK = [0, 1, 0, 1, 1, 0]
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
BOTH = (lambda m, x: m(x), lambda m, x: m.inverse(x))


class Net(nn.Linear):
    def forward(self, x, context=None):
        return torch.tanh(super().forward(x))


def both(before):
    after = copy.deepcopy(before)
    assert len(nf.accelerate(after).replaced) == 1
    return before, after


def pair(net=Net):
    return both(AdditiveCouplingTransform(MASK, net))


def gradients(y, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(y, inputs, torch.randn_like(y), allow_unused=True)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_architectures(data):
    """Masks of any numbers, the library's own networks with context, dropout and batch norm."""
    mask = data.draw(st.lists(st.sampled_from([-2.5, 0.0, 0.5, 1.0, 3.0]), min_size=2, max_size=9))
    if not min(mask) <= 0 < max(mask):
        mask[0], mask[-1] = 0.0, 1.0
    rows = data.draw(st.integers(2, 6))
    image = data.draw(st.booleans())
    options = {
        "context": data.draw(st.sampled_from([None, 2])),
        "dropout": data.draw(st.sampled_from([0.0, 0.3])),
        "norm": data.draw(st.booleans()),
    }
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    training, inverse = data.draw(st.booleans()), data.draw(st.booleans())

    def net(a, b):
        shared = {
            "num_blocks": 1,
            "dropout_probability": options["dropout"],
            "use_batch_norm": options["norm"],
        }
        if image:
            return ConvResidualNet(a, b, 5, context_channels=options["context"], **shared)
        return ResidualNet(a, b, 5, context_features=options["context"], **shared)

    torch.manual_seed(data.draw(st.integers(0, 99)))
    before, after = both(AdditiveCouplingTransform(mask, net).to(dtype).train(training))
    event = (3, 2) if image else ()
    x = torch.randn(rows, len(mask), *event, dtype=dtype, requires_grad=True)
    context = None
    if options["context"]:
        context = torch.randn(rows, options["context"], *event, dtype=dtype, requires_grad=True)
    results = []
    for m in (before, after):
        torch.manual_seed(2)  # the same units are dropped
        y, log_det = (m.inverse if inverse else m)(x, context)
        inputs = [x, *m.parameters()] + ([] if context is None else [context])
        results.append((y, log_det, gradients(y, inputs), list(m.buffers())))
    close = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {}
    torch.testing.assert_close(results[1][:2], results[0][:2], **close)
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, **(close or {"rtol": 1e-4, "atol": 1e-5}))
    torch.testing.assert_close(results[1][3], results[0][3])  # running statistics


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("call", BOTH)
def test_function_transforms_and_forward_mode(call, recording):
    results = []
    for m in pair():
        one = lambda x, m=m: call(m, x[None])[0][0]  # noqa: E731
        with torch.set_grad_enabled(recording):
            results.append(
                [vmap(one)(X), *(f(one)(X[0]) for f in (jacrev, jacfwd, hessian))],
            )
    torch.testing.assert_close(*results)


def test_parameters_swapped_by_functional_call():
    results = []
    for m in pair():
        loss = lambda p, m=m: functional_call(m, p, (X,))[0].square().sum()  # noqa: E731
        results.append(grad(loss)(dict(m.named_parameters())))
    torch.testing.assert_close(*results)


def test_second_derivatives():
    x, results = X.clone().requires_grad_(), []
    for m in pair():
        (first,) = torch.autograd.grad(m(x)[0].sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, *m.parameters()]))
    torch.testing.assert_close(*results)


class Own(torch.Tensor):
    pass


def test_tensors_without_memory_and_of_other_classes():
    for m in pair():
        for call in BOTH:
            assert type(call(m, X.as_subclass(Own))[0]) is Own
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert call(m, mode.from_tensor(X))[0].shape == X.shape
            y, log_det = call(copy.deepcopy(m).to("meta"), X.to("meta"))
            assert (y.device.type, log_det.shape) == ("meta", (4,))
        with torch.device("meta"):  # where new tensors would go
            assert m(X)[0].device == X.device


@pytest.mark.parametrize(
    "sides",
    [
        ([5, 0, 2], [1, 3, 4]),
        ([0, 2, 5], [4, 3, 1]),
        ([0, 2, 5], [1, 3, 3]),
        ([0, 2, 3], [1, 4, 5]),
    ],
)
def test_features_in_any_order_of_a_checkpoint_are_followed(sides):
    before, after = pair()
    after(X)  # the partition is made
    state = before.state_dict()
    state["identity_features"], state["transform_features"] = map(torch.tensor, sides)
    written = sorted({*sides[0], *sides[1]})  # nflows leaves the others as they are in memory
    for m in (before, after):
        m.load_state_dict(state)
    for call in BOTH:
        torch.testing.assert_close(call(after, X)[0][:, written], call(before, X)[0][:, written])


def test_a_model_made_in_inference_mode_follows_its_checkpoint():
    with torch.inference_mode():
        before, after = pair()
        other = AdditiveCouplingTransform([1, 0, 1, 0, 0, 1], Net)
        after(X)
        for m in (before, after):
            m.load_state_dict(other.state_dict())
        assert torch.equal(after(X)[0], other(X)[0])
        assert torch.equal(before(X)[0], other(X)[0])


def test_a_conditioner_may_write_over_its_input():
    class Over(Net):
        def forward(self, x, context=None):
            shift = super().forward(x)
            x.zero_()
            return shift

    _, after = pair(Over)
    plain = AdditiveCouplingTransform(MASK, Net)
    plain.load_state_dict(after.state_dict())
    with torch.no_grad():
        given = X.clone()
        torch.testing.assert_close(after(given), plain(X))
        assert torch.equal(given, X)


def test_its_own_errors_are_kept():
    for m in pair():
        with pytest.raises(ValueError, match="Inputs must be a 2D or a 4D tensor"):
            m(torch.zeros(2, 6, 1))
        with pytest.raises(ValueError, match="Expected features = 6, got 5"):
            m.inverse(torch.zeros(2, 5))


def test_native_classes_compose_both_ways():
    p = nf.Partition.alternating(6)
    layers = [own.AdditiveCoupling(p, nf.MLP(3, (8,), 3)), own.Scaling(6)]
    assert all(isinstance(layer, Transform) for layer in layers)
    with torch.no_grad():
        layers[1].log_scale.copy_(torch.linspace(-1, 1, 6) + 0.3)
    chain = CompositeTransform([layers[0], ReversePermutation(6), InverseTransform(layers[1])])
    y, log_det = chain(X)
    back, inverse = chain.inverse(y)
    torch.testing.assert_close(back, X)
    torch.testing.assert_close(log_det, torch.full((4,), -1.8))
    torch.testing.assert_close(inverse, -log_det)
    jacobian = torch.autograd.functional.jacobian(lambda x: chain(x[None])[0][0], X[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logistic_under_a_context(dtype):
    base = own.Logistic((6,)).to(dtype)
    assert isinstance(base, Distribution)
    assert not base.state_dict()  # as StandardNormal
    flow = Flow(own.AdditiveCoupling(nf.Partition.half(6), nf.MLP(3, (8,), 3)), base).to(dtype)
    assert flow.sample(5, batch_size=2).shape == (5, 6)
    context = torch.zeros(3, 1, dtype=dtype)
    samples, log_prob = base.sample_and_log_prob(5, context)
    assert (samples.shape, log_prob.shape) == ((3, 5, 6), (3, 5))
    expected = torch.distributions.Independent(nf.priors.standard("logistic").expand((6,)), 1)
    torch.testing.assert_close(log_prob, expected.log_prob(samples), check_dtype=False)
    assert (samples.dtype, log_prob.dtype) == (dtype, dtype)
    assert torch.equal(base.mean(context), torch.zeros(3, 6, dtype=dtype))
    z = torch.tensor([[1e4, -1e4, 0, 30, -30, 1]], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(base.log_prob(z), z)
    torch.testing.assert_close(slope, -torch.tanh(z / 2))


@pytest.mark.parametrize("extreme", [0.0, 1.0])
def test_logistic_samples_are_never_infinite(extreme, monkeypatch):
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: rand(*a, **k).fill_(extreme))
    assert own.Logistic((2,)).sample(3).isfinite().all()
