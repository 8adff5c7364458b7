"""zuko's additive coupling made fast, and nicefast's classes for zuko, in what is zuko's own."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import nicefast as nf

pytest.importorskip("zuko", reason="needs zuko")

from zuko.flows.coupling import GeneralCouplingTransform
from zuko.lazy import Flow
from zuko.transforms import AdditiveTransform, CouplingTransform, MonotonicAffineTransform

from nicefast.compat import zuko as own

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
CALLS = (
    lambda t, x: t(x),
    lambda t, x: t.inv(x),
    lambda t, x: t.call_and_ladj(x),
    lambda t, x: t.inv.call_and_ladj(x),
    lambda t, x: t.log_abs_det_jacobian(x, x),
    lambda t, x: t.inv.log_abs_det_jacobian(x, x),
)


def layer(features=6, context=0, mask=None, **options):
    options = {"univariate": AdditiveTransform, "shapes": [()], "hidden_features": (8,), **options}
    return GeneralCouplingTransform(features, context, mask, **options)


def both(before):
    after = copy.deepcopy(before)
    assert len(nf.accelerate(after).replaced) == 1
    return before, after


def values(result):
    return result if isinstance(result, tuple) else (result,)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_architectures(data):
    """Any mask, network, batch shape, and context that broadcasts to it."""
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2, max_size=9)))
    mask[0], mask[-1] = True, False
    if data.draw(st.booleans()):
        mask = ~mask
    batch = tuple(data.draw(st.lists(st.integers(1, 3), max_size=3)))
    k = data.draw(st.sampled_from([0, 2]))
    kept = data.draw(st.integers(0, len(batch)))  # leading dimensions that the context lacks
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    options = {
        "hidden_features": tuple(data.draw(st.lists(st.integers(2, 6), max_size=2))),
        "activation": data.draw(st.sampled_from([None, nn.Tanh, nn.ELU])),
        "normalize": data.draw(st.booleans()),
    }
    training = data.draw(st.booleans())
    before, after = both(layer(len(mask), k, mask, **options).to(dtype).train(training))
    wide = torch.randn(*batch, 2 * len(mask), dtype=dtype)
    x = wide[..., ::2].requires_grad_()  # columns that do not lie side by side
    sizes = [data.draw(st.sampled_from([1, n])) for n in batch[kept:]]
    c = torch.randn(*sizes, k, dtype=dtype, requires_grad=True) if k else None
    close = (
        {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    for call in CALLS:
        results = []
        for m in (before, after):
            out = values(call(m(c), x))
            torch.manual_seed(1)
            weights = [torch.randn_like(t) for t in out]
            loss = sum((w * t).sum() for w, t in zip(weights, out, strict=True))
            found = ()
            if loss.requires_grad:
                inputs = [x, *m.parameters()] + ([] if c is None else [c])
                found = torch.autograd.grad(loss, inputs, allow_unused=True)
            results.append((out, found))
        torch.testing.assert_close(results[1][0], results[0][0], **close)
        for a, b in zip(results[0][1], results[1][1], strict=True):
            if a is None:
                assert b is None or not b.any()
            else:
                torch.testing.assert_close(b, a, **close)


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("call", CALLS[:2])
def test_function_transforms_and_forward_mode(call, recording):
    """Also of a transform that was made before."""
    made = [m() for m in both(layer())]
    results = []
    for m in (*both(layer()), *made):
        torch.manual_seed(0)
        one = lambda x, m=m: call(m() if isinstance(m, nn.Module) else m, x)  # noqa: E731
        with torch.set_grad_enabled(recording):
            results.append([vmap(one)(X), *(f(one)(X[0]) for f in (jacrev, jacfwd, hessian))])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[3], results[2])


def test_parameters_and_masks_swapped_by_functional_call():
    before, after = both(layer())
    results = []
    for m in (before, after):
        loss = lambda p, m=m: functional_call(m, p, ())(X).square().sum()  # noqa: E731
        results.append(grad(loss)(dict(m.named_parameters())))
    torch.testing.assert_close(*results)
    swapped = {"mask": ~before.mask}
    expected = functional_call(before, swapped, ())(X)
    torch.testing.assert_close(functional_call(after, swapped, ())(X), expected)
    torch.testing.assert_close(after()(X), before()(X))


def test_the_transform_is_one_of_zuko():
    before, after = (m() for m in both(layer()))
    assert isinstance(after, CouplingTransform)
    assert (repr(after), repr(after.inv)) == (repr(before), repr(before.inv))
    assert after.inv.inv is after
    assert (after.bijective, after.domain.event_dim, after.codomain.event_dim) == (True, 1, 1)
    assert torch.equal(after.idx_a, before.idx_a)
    assert torch.equal(after.idx_b, before.idx_b)
    sides = after.split(X)
    assert torch.equal(after.merge(*sides, X.shape), X)
    torch.testing.assert_close(after.meta(sides[0])(sides[1]), before.meta(sides[0])(sides[1]))
    for other in (copy.deepcopy(after), pickle.loads(pickle.dumps(after))):
        torch.testing.assert_close(other(X), before(X))


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_indices_are_not_looked_for_in_every_call():
    before, after = both(layer())
    after()(X)
    counts = []
    for m in (before, after):
        with Called() as called:
            m().call_and_ladj(X)
        counts.append(called.names)
    assert "nonzero" in counts[0]
    assert "nonzero" not in counts[1]
    assert len(counts[1]) < len(counts[0]) / 2


def test_after_a_first_call_in_inference_mode_it_trains():
    before, after = both(layer())
    with torch.inference_mode():
        after()(X)
    x = X.clone().requires_grad_()
    results = []
    for m in (before, after):
        inputs = [x, *m.parameters()]
        results.append(torch.autograd.grad(m()(x).sin().sum(), inputs))
        results[-1] += (jacrev(m())(X[0]),)
    torch.testing.assert_close(*results)


def test_one_shift_for_all_features():
    for net in (
        nn.Linear(3, 1),
        nn.Sequential(nn.Linear(3, 1), nn.Flatten(0), nn.Unflatten(0, (4, 1))),
    ):
        before = layer()
        before.hyper = net
        before, after = both(before)
        for call in CALLS[:4]:
            torch.testing.assert_close(call(after(), X), call(before(), X))


def test_compiling_breaks_no_more_than_before():
    counts, results = [], []
    for m in both(layer()):
        made = m()
        own_counts = []
        for f in (lambda x, m=m: m().call_and_ladj(x), lambda x, t=made: t.call_and_ladj(x)):
            torch._dynamo.reset()
            own_counts.append(torch._dynamo.explain(f)(X).graph_break_count)
            results.append(torch.compile(f, backend="eager")(X))
        counts.append(own_counts)
    assert all(b <= a for a, b in zip(*counts, strict=True)), counts
    torch.testing.assert_close(results[2:], results[:2])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"univariate": MonotonicAffineTransform, "shapes": [(), ()]}, "MonotonicAffineTransform"),
        ({"univariate": lambda shift: AdditiveTransform(-shift)}, "<lambda>"),
        ({"shapes": [(1,)]}, r"the shapes [(1,)], expected [()]"),
    ],
)
def test_what_is_not_additive_is_left_alone(options, reason):
    report = nf.accelerate(layer(**options))
    assert not report.replaced
    assert reason in report.left[0].reason
    # made directly, it does what theirs does
    settings_ = {"univariate": AdditiveTransform, "shapes": [()], **options}
    torch.manual_seed(0)
    mine = own.GeneralCouplingTransform(6, **settings_)
    torch.manual_seed(0)
    theirs = GeneralCouplingTransform(6, **settings_)
    if "shapes" not in options or len(options["shapes"]) == 2:
        torch.testing.assert_close(mine().call_and_ladj(X), theirs().call_and_ladj(X))


def test_masks_of_a_checkpoint_are_followed():
    before, after = both(layer())
    after()(X)
    other = layer(mask=[True, True, True, False, False, False])
    for m in (before, after):
        m.load_state_dict(other.state_dict())
    torch.testing.assert_close(after()(X), other()(X))
    after.mask.logical_not_()  # in place
    before.mask.logical_not_()
    torch.testing.assert_close(after()(X), before()(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_classes_in_a_flow_of_zuko(dtype):
    p = nf.Partition.alternating(6)
    flow = Flow(
        [
            own.AdditiveCoupling(p, nf.MLP(3, (8,), 3, context=2)),
            own.AdditiveCoupling(~p, nf.MLP(3, (8,), 3, context=2)),
            own.Scaling(6),
        ],
        own.Logistic(6),
    ).to(dtype)
    with torch.no_grad():
        flow.transform.transforms[2].log_scale.fill_(0.2)
    d = flow(torch.randn(4, 2, dtype=dtype))
    x, log_prob = d.rsample_and_log_prob((3,))
    assert (x.shape, x.dtype, log_prob.shape) == ((3, 4, 6), dtype, (3, 4))
    torch.testing.assert_close(d.log_prob(x), log_prob, rtol=1e-4, atol=1e-4)
    (x.square().sum() + log_prob.sum()).backward()
    assert all(q.grad is not None for q in flow.parameters())
    one = flow(torch.zeros(2, dtype=dtype)).transform
    jacobian = torch.autograd.functional.jacobian(one, X[0].to(dtype))
    ladj = one.log_abs_det_jacobian(X[0].to(dtype), None)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ladj)
    torch.testing.assert_close(one.inv(one(X.to(dtype))), X.to(dtype))


@pytest.mark.parametrize("context", [0, 2])
def test_nice(context):
    torch.manual_seed(0)
    flow = own.NICE(5, context, transforms=4, randmask=True, hidden_features=(8,))
    with torch.no_grad():
        flow.transform.transforms[-1].log_scale.normal_()
    c = torch.randn(3, context) if context else None
    d = flow(c)
    x, log_prob = d.rsample_and_log_prob((7, 3)[: 2 - bool(context)])
    torch.testing.assert_close(d.log_prob(x), log_prob, rtol=1e-4, atol=1e-4)
    one = d.transform if c is None else flow(c[0]).transform
    z = one(X[:, :5])
    by_hand = -2 * nn.functional.softplus(z.abs()).sum(-1) + z.abs().sum(-1)
    by_hand += flow.transform.transforms[-1].log_scale.sum()
    own_log_prob = flow(c if c is None else c[0]).log_prob(X[:, :5])
    torch.testing.assert_close(own_log_prob, by_hand, rtol=1e-4, atol=1e-4)
    converted = nf.convert(flow)
    assert (converted.prior_name, len(converted.couplings)) == ("logistic", 4)
    given = (X[:, :5],) if c is None else (X[:, :5], c[0].expand(4, -1))
    torch.testing.assert_close(converted.log_prob(*given), own_log_prob, rtol=1e-4, atol=1e-4)
    assert [r.reason for r in nf.accelerate(flow).left] == ["fast already"] * 4
    own_log_prob.sum().backward()
    assert all(p.grad is not None for p in flow.parameters())
    with pytest.raises(ValueError, match="features must be at least 2, got 1"):
        own.NICE(1)
