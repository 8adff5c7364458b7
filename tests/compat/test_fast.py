"""Couplings of the other libraries, before and after accelerate: the same values, log-determinants,
gradients and samples."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import nicefast as nf

nflows = pytest.importorskip("nflows", reason="needs nflows")
normflows = pytest.importorskip("normflows", reason="needs normflows")
zuko = pytest.importorskip("zuko", reason="needs zuko")
pytest.importorskip("FrEIA", reason="needs FrEIA")

from FrEIA import framework, modules  # noqa: E402
from nflows.distributions import StandardNormal  # noqa: E402
from nflows.flows import Flow, SimpleRealNVP  # noqa: E402
from nflows.transforms import AdditiveCouplingTransform, CompositeTransform  # noqa: E402
from zuko.transforms import AdditiveTransform  # noqa: E402

D = 7
SIZES = st.integers(0, 5)


class Net(nn.Module):
    """A conditioner that takes a context as nflows passes one."""

    def __init__(self, a, b, context=0):
        super().__init__()
        self.first, self.last = nn.Linear(a + context, 9), nn.Linear(9, b)

    def forward(self, x, context=None):
        x = x if context is None else torch.cat((x, context), 1)
        return self.last(torch.tanh(self.first(x)))


class Conv(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv = nn.Conv2d(a, b, 3, padding=1)

    def forward(self, x, context=None):
        return torch.tanh(self.conv(x))


def masks(d, couplings=3):
    made = [torch.rand(d) for _ in range(couplings)]
    for mask in made:
        mask[0], mask[-1] = 0, 1  # both sides have a feature
    return [(mask > 0.5).int() for mask in made]


def nflows_flow(d=D, context=0):
    made = [AdditiveCouplingTransform(m, lambda a, b: Net(a, b, context)) for m in masks(d)]
    return Flow(CompositeTransform(made), StandardNormal((d,)))


def nflows_calls(x, context=None):
    return [
        lambda m: m.log_prob(x, context),
        lambda m: m._transform(x, context),
        lambda m: m._transform.inverse(x, context),
    ]


def normal_flow(flows, d=D):
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(d), flows)


def normflows_calls(x):
    return [
        lambda m: m.log_prob(x),
        lambda m: m.forward_and_log_det(x),
        lambda m: m.inverse_and_log_det(x),
    ]


def block_flow(mode, d=D):
    first = -(-d // 2) if mode == "channel" else d // 2
    sides = (first, d - first)
    made = [
        normflows.flows.AffineCouplingBlock(Net(*sides), scale=False, split_mode=mode)
        for _ in range(3)
    ]
    return normal_flow(made, d)


def halves_flow(d=D):
    """Couplings of halves that come and go apart."""
    flows = []
    for _ in range(3):
        coupling = normflows.flows.AffineCoupling(Net(-(-d // 2), d // 2), scale=False)
        flows += [normflows.flows.Split("channel"), coupling, normflows.flows.Merge("channel")]
    return normal_flow(flows, d)


def masked_flow(d=D):
    made = [normflows.flows.MaskedAffineFlow(m.float(), Net(d, d)) for m in masks(d)]
    return normal_flow(made, d)


def zuko_flow(d=D, context=0):
    options = {"univariate": AdditiveTransform, "shapes": [()], "hidden_features": (9,)}
    return zuko.flows.NICE(d, context, transforms=3, randmask=True, **options)


def zuko_calls(x, context=None):
    return [
        lambda m: m(context).log_prob(x),
        lambda m: m(context).transform.call_and_ladj(x),
        lambda m: m(context).transform.inv(x),
        lambda m: m(context).transform.log_abs_det_jacobian(x, x),
    ]


def freia_flow(d=D, context=0):
    inn = framework.SequenceINN(d)
    options = {"cond": 0, "cond_shape": (context,)} if context else {}
    for i in range(2):
        inn.append(modules.NICECouplingBlock, subnet_constructor=Net, split_len=0.3, **options)
        inn.append(modules.PermuteRandom, seed=i)
    return inn


def freia_calls(x, context=None):
    c = None if context is None else [context]
    return [lambda m: m(x, c), lambda m: m(x, c, rev=True)]


CASES = {
    "nflows": (nflows_flow, nflows_calls, 3),
    "channel": (lambda d=D: block_flow("channel", d), normflows_calls, 3),
    "channel_inv": (lambda d=D: block_flow("channel_inv", d), normflows_calls, 3),
    "checkerboard": (lambda d=D: block_flow("checkerboard", d + d % 2), normflows_calls, 3),
    "checkerboard_inv": (lambda d=D: block_flow("checkerboard_inv", d + d % 2), normflows_calls, 3),
    "halves": (halves_flow, normflows_calls, 3),
    "masked": (masked_flow, normflows_calls, 3),
    "zuko": (zuko_flow, zuko_calls, 3),
    "freia": (freia_flow, freia_calls, 2),
}


def assert_same(before, after, calls, dtype, x=None):
    """Values of every call, and gradients of x and of all parameters for random cotangents."""
    close = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    )
    for call in calls:
        with torch.no_grad():
            for a, b in zip(tree_leaves(call(before)), tree_leaves(call(after)), strict=True):
                torch.testing.assert_close(b, a, **close, equal_nan=True, check_stride=False)
        gradients = []
        for m in (before, after):
            torch.manual_seed(3)
            outs = [t for t in tree_leaves(call(m)) if torch.is_tensor(t) and t.requires_grad]
            inputs = [*m.parameters()] + ([x] if x is not None else [])
            inputs = [p for p in inputs if p.requires_grad]
            if not outs:
                gradients.append([])
                continue
            cotangents = [torch.randn_like(t) for t in outs]
            gradients.append(torch.autograd.grad(outs, inputs, cotangents, allow_unused=True))
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, **close, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6, deadline=None)
@given(
    rows=SIZES,
    d=st.integers(2, 9),
    double=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 99),
)
def test_everything_is_as_before(name, rows, d, double, training, seed):
    torch.manual_seed(seed)
    make, calls, couplings = CASES[name]
    if name == "freia":
        d = max(d, 3)
    if name.startswith("checker") or name == "zuko":
        rows += 1  # without rows, the library's own code raises an error
    dtype = torch.float64 if double else torch.float32
    before = make(d).to(dtype).train(training)
    after = copy.deepcopy(before)
    report = nf.accelerate(after)
    assert (len(report.replaced), report.left) == (couplings, ())
    width = d + d % 2 if name.startswith("checker") else d
    wide = torch.randn(rows, 2 * width, dtype=dtype)
    x = wide[:, ::2].requires_grad_()  # columns that do not lie side by side
    assert_same(before, after, calls(x), dtype, x)
    assert nf.restore(after) == couplings
    assert [type(m) for m in after.modules()] == [type(m) for m in before.modules()]
    assert_same(before, after, calls(x.detach())[:1], dtype)


@pytest.mark.parametrize("name", ["nflows", "zuko", "freia"])
def test_context(name):
    make, calls, couplings = CASES[name]
    before = make(context=3).double()
    after = copy.deepcopy(before)
    assert len(nf.accelerate(after).replaced) == couplings
    x, c = torch.randn(5, D).double(), torch.randn(5, 3).double()
    assert_same(before, after, calls(x, c), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["channel", "channel_inv", "checkerboard", "checkerboard_inv"])
def test_images_in_normflows(name, dtype):
    sides = {"channel": (3, 2), "channel_inv": (2, 3)}.get(name, (5, 5))
    before = normflows.flows.AffineCouplingBlock(Conv(*sides), scale=False, split_mode=name)
    before = before.to(dtype)
    after = copy.deepcopy(before)
    nf.accelerate(after)
    x = torch.randn(3, 5, 4, 6, dtype=dtype, requires_grad=True)
    assert_same(before, after, [lambda m: m(x), lambda m: m.inverse(x)], dtype, x)


def test_halves_that_are_scaled_are_left_alone():
    report = nf.accelerate(normflows.flows.AffineCoupling(Net(3, 6)))
    assert report.left == (("", "AffineCoupling", "not additive: it scales"),)


def test_images_elsewhere():
    x = torch.randn(3, 5, 4, 6, requires_grad=True)
    masked = normflows.flows.MaskedAffineFlow((torch.rand(5, 4, 6) > 0.5).float(), Conv(5, 5))
    by_channel = AdditiveCouplingTransform([1, -1, 1, 0, 2], Conv)
    for before in (masked, by_channel):
        after = copy.deepcopy(before)
        assert len(nf.accelerate(after).replaced) == 1
        assert_same(before, after, [lambda m: m(x), lambda m: m.inverse(x)], torch.float32, x)
    before = modules.NICECouplingBlock([(5, 4, 6)], subnet_constructor=Conv)
    after = copy.deepcopy(before)
    nf.accelerate(after)
    assert_same(before, after, [lambda m: m((x,)), lambda m: m((x,), rev=True)], torch.float32, x)


@pytest.mark.parametrize("name", CASES)
def test_samples_of_a_seed_are_the_same(name):
    make, _, _ = CASES[name]
    if name == "freia":
        pytest.skip("FrEIA has no base to sample from")
    before = make()
    after = copy.deepcopy(before)
    nf.accelerate(after)
    drawn = []
    for model in (before, after):
        torch.manual_seed(5)
        drawn.append(model().sample((6,)) if name == "zuko" else model.sample(6))
    for a, b in zip(*map(tree_leaves, drawn), strict=True):
        torch.testing.assert_close(b, a)


def test_what_is_not_finite_stays_in_its_row():
    x = torch.randn(4, D)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    for name, (make, calls, _) in CASES.items():
        if name.startswith("checker"):
            continue
        before = make()
        after = copy.deepcopy(before)
        nf.accelerate(after)
        a, b = (tree_leaves(calls(x)[0](m))[0] for m in (before, after))
        torch.testing.assert_close(b[[0, 3]], a[[0, 3]])
        assert not b[1].isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_shift_that_is_not_finite_is_nan_in_normflows_masked(value):
    class Bad(nn.Module):
        def forward(self, z):
            return torch.full_like(z, value)

    before = normflows.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0]), Bad())
    after = copy.deepcopy(before)
    nf.accelerate(after)
    for m in (before, after):
        assert m(torch.ones(2, 2))[0].isnan().all()  # also where b is 1: 0 * NaN
    z = torch.tensor([[torch.inf, 1.0], [1.0, 2.0]])
    for call in (lambda m: m(z), lambda m: m.inverse(z)):
        torch.testing.assert_close(call(after), call(before), equal_nan=True)


def test_log_determinants_may_be_added_to_in_place():
    for name in ("nflows", "channel", "masked"):
        flow = CASES[name][0]()
        nf.accelerate(flow)
        layer = (flow._transform._transforms if name == "nflows" else flow.flows)[0]
        _, log_det = layer(torch.randn(3, D))
        log_det += 1
        assert torch.equal(log_det, torch.ones(3))


@pytest.mark.parametrize("name", ["nflows", "zuko", "masked"])
def test_glue_shrinks_threefold(name):
    from bench.dropin import LIBRARIES, glue
    from bench.providers import Shape, make_weights

    provider, call = LIBRARIES[{"masked": "normflows, masked"}.get(name, name)]
    shape = Shape(784, (32,), 64)
    before = provider(shape, make_weights(shape))
    after = copy.deepcopy(before)
    names = [found.name for found in nf.accelerate(after).replaced]
    assert len(names) == shape.couplings
    x = torch.randn(64, 784)
    counts = [glue(m.get_submodule(names[0]), call, x) for m in (before, after)]
    (operators, touched), (fewer, less) = counts
    assert operators >= 3 * fewer, counts
    assert touched >= 3 * less, counts


def test_a_real_flow_trains_to_the_same_loss():
    sklearn = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    digits = torch.tensor(sklearn.load_digits().data, dtype=torch.float32)
    x = (digits + torch.rand(digits.shape, generator=torch.Generator().manual_seed(0))) / 17
    first = SimpleRealNVP(64, 32, 4, 1, use_volume_preserving=True)
    losses = []
    for fast in (False, True):
        model = copy.deepcopy(first)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if fast:
            assert len(nf.accelerate(model).replaced) == 4  # after the optimizer was made
        for step in range(200):
            rows = x[(step * 100) % 1700 :][:100]
            loss = -model.log_prob(rows).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(-model.log_prob(x).mean().item())
    assert losses[0] < -first.log_prob(x).mean().item() - 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
