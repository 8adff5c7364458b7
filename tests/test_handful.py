"""A handful of rows by NumPy: the same numbers, whatever the rows, the flow, or the parameters."""

import copy
import warnings

import pytest
import torch

import nicefast as nf
from helpers import Operators, assert_three_way, make, strided
from nicefast.handful import MOST, Handful
from nicefast.onepiece import OnePiece

OPTIONS = [
    {},
    {"context": 3},
    {"activation": "tanh", "prior": "normal"},
    {"activation": "leaky_relu", "partition": "random"},
    {"activation": "silu"},
    {"activation": "elu"},
    {"partition": "half", "couplings": 6, "hidden": (64, 64, 64)},
]


def values(model, x, c):
    z, log_det = model(x, c)
    back, back_det = model.inverse(x, c)
    return z, log_det, back, back_det, model.log_prob(x, c)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 33])
@pytest.mark.parametrize("kind", ["dense", "rows", "columns", "expanded"])
@torch.no_grad()
def test_values(options, rows, kind):
    model, x = make(6, **options), torch.randn(rows, 6)
    x = strided(x, kind) if rows else x
    c = torch.randn(rows, 3) if model.context else None
    assert type(nf.choose_path(model, x, c).fused) is Handful
    given = x.clone()
    got = values(model, x, c)
    with nf.set_backend("reference"):
        plain = values(model, x, c)
    wide = None if c is None else c.double()
    exact = values(copy.deepcopy(model).double(), x.double(), wide)
    for g, p, e in zip(got, plain, exact, strict=True):
        assert_three_way(g, p, e)
    assert torch.equal(x, given)  # nothing is written over it


def test_who_is_served():
    model = make(6, hidden=(32, 32))
    most = MOST // 32**2
    with torch.no_grad():
        for rows, kind in ((most, Handful), (most + 1, OnePiece)):
            assert type(nf.choose_path(model, torch.zeros(rows, 6)).fused) is kind
        assert "by NumPy" in model.explain(1)
        smooth = make(6, activation="gelu")
        assert type(nf.choose_path(smooth, torch.zeros(1, 6)).fused) is OnePiece
        with torch.autocast("cpu", torch.bfloat16):
            assert type(nf.choose_path(model, torch.zeros(1, 6)).fused) is OnePiece
        with Operators() as operators:  # who counts operators sees them
            model.log_prob(torch.zeros(1, 6))
        assert len(operators.products()) == 9
    assert type(nf.choose_path(model, torch.zeros(1, 6)).fused) is OnePiece
    model.requires_grad_(False)
    assert type(nf.choose_path(model, torch.zeros(1, 6)).fused) is Handful
    assert type(nf.choose_path(model, torch.zeros(1, 6, requires_grad=True)).fused) is OnePiece


@torch.no_grad()
def test_rows_that_are_not_finite_say_so_and_nobody_warns():
    model = make(6)
    x = torch.randn(6, 6)
    x[1, 2], x[3, 0], x[4, 5] = torch.nan, torch.inf, 1e38
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, (z, _), (h, _) = model.log_prob(x), model(x), model.inverse(x)
    with nf.set_backend("reference"):
        want, (z_, _), (h_, _) = model.log_prob(x), model(x), model.inverse(x)
    for a, b in ((got, want), (z, z_), (h, h_)):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert torch.allclose(a[[0, 2, 5]], b[[0, 2, 5]], atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("error")
def test_log_scale_that_is_not_finite_is_an_error():
    model = make(6)
    for values in ([torch.nan] * 6, [torch.inf, -torch.inf, 0, 0, 0, 0]):
        model.scaling.log_scale.copy_(torch.tensor(values))
        for call in (model.log_prob, model, model.inverse):
            with pytest.raises(ValueError, match="log_scale"):
                call(torch.zeros(1, 6))
    model.scaling.log_scale.fill_(3e38)
    assert not model.log_prob(torch.ones(1, 6)).isfinite()


@torch.no_grad()
def test_log_scale_of_another_shape_is_an_error():
    model = make(6)
    model.scaling.log_scale = torch.nn.Parameter(torch.ones(1))
    for rows in (1, 5000):
        with pytest.raises(ValueError, match="log_scale must have shape"):
            model.log_prob(torch.zeros(rows, 6))


@torch.no_grad()
def test_numbers_with_a_negative_bit():
    def negative(*shape):
        return torch.randn(*shape, dtype=torch.complex64).conj().imag

    model, x, c = make(6, context=2), negative(4, 6), negative(4, 2)
    weight = model.couplings[0].conditioner.linears[1].weight
    model.log_prob(x, c)
    weight.data = torch._neg_view(weight.data)
    model.scaling.log_scale.data = negative(6)
    for _ in range(2):
        assert type(nf.choose_path(model, x, c).fused) is Handful
        got = model.log_prob(x, c)
        with nf.set_backend("reference"):
            assert torch.allclose(got, model.log_prob(x, c), atol=1e-4)
        weight.mul_(2)


@torch.no_grad()
def test_results_are_tensors_like_any():
    model, x = make(6), torch.randn(3, 6)
    for make_one in (lambda: model.log_prob(x), lambda: model(x)[0], lambda: model.sample(3)):
        assert make_one().resize_(100).shape == (100,)
        assert torch.add(torch.zeros(10), 1, out=make_one()).shape == (10,)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trace_before_dispatch_sees_every_operation():
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x, y = make(6).requires_grad_(False), torch.randn(3, 6), torch.randn(3, 6)

    def log_prob(x):
        return model.log_prob(x)

    with nf.set_backend("reference"):
        want = log_prob(y)
    for pre_dispatch in (False, True):
        try:
            traced = make_fx(log_prob, pre_dispatch=pre_dispatch)(x)
        except RuntimeError as error:  # look at log_scale's values, which a trace has not
            assert pre_dispatch and "item" in str(error)  # noqa: PT017, PT018
        else:
            assert torch.allclose(traced(y), want, atol=1e-5)


def _step(model):
    for p in model.parameters():
        p.add_(torch.randn_like(p))


def _loaded(model):
    model.load_state_dict({k: torch.randn_like(p) for k, p in model.state_dict().items()})


def _moved(model):
    for p in model.parameters():
        p.data = torch.randn_like(p)


def _transposed(model):  # the same memory, the same shape
    weight = model.couplings[0].conditioner.linears[1].weight
    weight.data = weight.data.t()


def _with_other_strides(model):
    weight = model.couplings[0].conditioner.linears[1].weight
    wide = torch.randn(16, 64)
    weight.data = wide[:, :32:2]
    model.log_prob(torch.zeros(1, 6))
    weight.data = wide[:, :48:3]


def _doubled_and_back(model):
    model.double().float()
    _step(model)


@pytest.mark.parametrize(
    "change", [_step, _loaded, _moved, _transposed, _with_other_strides, _doubled_and_back]
)
@torch.no_grad()
def test_parameters_are_never_stale(change):
    model, x = make(6, hidden=(16, 16)), torch.randn(4, 6)
    before = model.log_prob(x)
    change(model)
    assert type(nf.choose_path(model, x).fused) is Handful
    after = model.log_prob(x)
    with nf.set_backend("reference"):
        assert torch.allclose(after, model.log_prob(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, after, atol=1e-2)


def test_under_inference_mode_and_of_rows_that_want_gradients():
    model, x = make(6), torch.randn(4, 6, requires_grad=True)
    want = model.log_prob(x).detach()
    with torch.inference_mode():
        assert torch.allclose(model.log_prob(x), want, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model.log_prob(x), want, atol=1e-5)
        fused = nf.choose_path(model, x).fused
    assert type(fused) is Handful  # found for no gradient, it has one nevertheless
    log_prob = nf.functional.flow_log_prob(fused, x, None, model.scaling.log_scale)
    got = torch.autograd.grad(log_prob.sum(), [x, *model.parameters()])
    with nf.set_backend("reference"):
        wanted = torch.autograd.grad(model.log_prob(x).sum(), [x, *model.parameters()])
    for g, w in zip(got, wanted, strict=True):
        assert torch.allclose(g, w, atol=1e-4, rtol=1e-4)
