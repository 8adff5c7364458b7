"""A handful of rows by NumPy: the same numbers, whatever the rows, the flow, or the parameters."""

import copy
import warnings

import pytest
import torch

import nicefast as nf
from helpers import Operators, assert_gradients, assert_three_way, make, strided
from nicefast import philox
from nicefast.fused import calls
from nicefast.fused.arrays import MOST, product
from nicefast.fused.handful import FEW, FEW_OF_MANY_CALLS, NUMBERS, SMALL, SUMMED, Handful
from nicefast.fused.onepiece import OnePiece

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


def kind_of(model, rows, **options):
    return type(nf.choose_path(model, torch.zeros(rows, model.features, **options)).fused)


def test_who_is_served():
    narrow, wide, wider = (make(6, hidden=(width, width)) for width in (32, 256, 300))
    assert SMALL == 256**2
    for model, recorded, plain in (
        (narrow, FEW_OF_MANY_CALLS, FEW),
        (wide, FEW_OF_MANY_CALLS, FEW_OF_MANY_CALLS),
        (wider, 0, MOST),
    ):
        size = model.couplings[0].conditioner.linears[1].weight.numel()
        for few, mode in ((recorded, torch.enable_grad()), (plain, torch.no_grad())):
            with mode:
                assert kind_of(model, few // size) is Handful or few // size == 0
                assert kind_of(model, few // size + 1) is not Handful
    model = narrow.requires_grad_(False)
    assert kind_of(model, FEW // 32**2 + 1) is not Handful
    assert kind_of(model, FEW // 32**2 + 1, requires_grad=True) is Handful
    assert "by NumPy" in model.explain(1)
    deep = make(
        2, hidden=(4,), couplings=200
    )  # its activations are rebuilt, and memory is constant
    assert kind_of(deep, NUMBERS // 1000) is Handful
    assert kind_of(deep, NUMBERS // 1000 + 1) is not Handful
    tiny = make(2, hidden=(1,), couplings=1)
    assert kind_of(tiny, SUMMED) is Handful
    assert kind_of(tiny, SUMMED + 1) is OnePiece
    assert kind_of(make(6, activation="gelu"), 1) is OnePiece
    with torch.autocast("cpu", torch.bfloat16):
        assert kind_of(model, 1) is OnePiece
    with Operators() as operators:  # who counts operators sees them
        model.log_prob(torch.zeros(1, 6))
    assert len(operators.products()) == 9


def test_products_are_cut_small():
    for rows, inner, width in ((1, 600, 600), (7, 1, 5), (1000, 64, 9), (0, 3, 3), (99, 99, 99)):
        a, b = torch.randn(inner, rows).numpy(), torch.randn(width, inner).numpy()
        assert abs(product(a.T, b.T) - a.T.astype(float) @ b.T.astype(float)).max(initial=0) < 1e-3


def gradients(model, x, c, cotangent, wants):
    inputs = [x, c, *model.parameters()]
    wanted = [t.requires_grad_() for t, w in zip(inputs, wants, strict=True) if w]
    log_prob = model.log_prob(x, c)
    return [log_prob, *torch.autograd.grad(log_prob, wanted, cotangent)]


@pytest.mark.parametrize("wants", ["everything", "parameters", "x", "context", "some"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 33, 200])
def test_gradients(options, rows, wants):
    model = make(6, **options)
    x, c = torch.randn(rows, 6), torch.randn(rows, 3) if model.context else None
    cotangent, count = torch.randn(rows), len(list(model.parameters()))
    wants = {
        "everything": [True, c is not None] + count * [True],
        "parameters": [False, False] + count * [True],
        "x": [True, False] + count * [False],
        "context": [c is None, c is not None] + count * [False],
        "some": [False, False] + [i % 3 == 0 for i in range(count)],
    }[wants]
    for p, want in zip(model.parameters(), wants[2:], strict=True):
        p.requires_grad_(want)
    assert kind_of(model, rows, requires_grad=True) is Handful or c is not None
    got = gradients(model, x.clone(), c, cotangent, wants)
    again = gradients(model, x.clone(), c, cotangent, wants)
    assert all(map(torch.equal, got, again))
    with nf.set_backend("reference"):
        plain = gradients(model, x.clone(), c, cotangent, wants)
    wide = (t if t is None else t.detach().double() for t in (x, c, cotangent))
    exact = gradients(copy.deepcopy(model).double(), *wide, wants)
    assert_gradients(got, plain, exact)


def test_gradients_of_gradients():
    model, x = make(4, activation="tanh", hidden=(8,)), torch.randn(3, 4, requires_grad=True)
    assert type(nf.choose_path(model, x).fused) is Handful

    def twice():
        (grad,) = torch.autograd.grad(model.log_prob(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *model.parameters()])

    got = twice()
    with nf.set_backend("reference"):
        for g, w in zip(got, twice(), strict=True):
            assert torch.allclose(g, w, atol=1e-4, rtol=1e-3)


def test_a_parameter_written_to_before_its_gradient_is_an_error():
    model, x = make(6), torch.randn(3, 6)
    log_prob = model.log_prob(x)
    with torch.no_grad():
        model.couplings[1].conditioner.linears[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        log_prob.sum().backward()
    kept = x.clone()
    log_prob = model.log_prob(kept)
    kept.zero_()
    with pytest.raises(RuntimeError, match="modified"):
        log_prob.sum().backward()


def test_a_parameter_replaced_before_its_gradient_is_another_one():
    """As in plain PyTorch, the gradient is that of the value."""
    model, x = make(6), torch.randn(3, 6)
    weights = [model.couplings[i].conditioner.linears[-1].weight for i in range(2)]
    want = torch.autograd.grad(model.log_prob(x).sum(), weights)
    log_prob = model.log_prob(x)
    for p in model.parameters():
        p.data = torch.randn_like(p)
    assert all(map(torch.equal, torch.autograd.grad(log_prob.sum(), weights), want))


def _shared(model):
    model.share_memory()


def _resized(model):
    for p in model.parameters():
        kept, storage = p.detach().clone(), p.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        p.data.copy_(kept)


@pytest.mark.parametrize("change", [_shared, _resized])
def test_the_memory_of_parameters_may_be_exchanged_before_their_gradient(change):
    model, x = make(6), torch.randn(3, 6)
    want = torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters()))
    value = model.log_prob(x).sum()
    change(model)
    others = [torch.full((8, 8), torch.nan) for _ in range(200)]  # where parameters were
    got = torch.autograd.grad(value, list(model.parameters()))
    assert all(map(torch.equal, got, want))
    assert len(others) == 200


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "silu", "elu"])
def test_gradients_of_what_is_not_finite_say_so(activation):
    """Row 1 spoils the parameters' gradients, and no other row's."""
    model, x = make(6, activation=activation), torch.randn(4, 6)
    x[1, 2] = torch.nan

    def grads():
        rows = x.clone().requires_grad_()
        return torch.autograd.grad(model.log_prob(rows).sum(), [rows, *model.parameters()])

    got = grads()
    with nf.set_backend("reference"):
        want = grads()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.isfinite(), w.isfinite())
    assert torch.allclose(got[0][[0, 2, 3]], want[0][[0, 2, 3]], atol=1e-4, rtol=1e-4)


def test_an_infinite_gradient_through_a_unit_that_is_off_is_nothing():
    model, x = make(2, hidden=(2,), partition="half", couplings=1), torch.tensor([[1.0, 0.0]])
    first, last = model.couplings[0].conditioner.linears
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[1.0, 3e38]]))  # the second unit is off
    cotangent = torch.tensor([1e3])
    (grad,) = torch.autograd.grad(model.log_prob(x), first.weight, cotangent)
    with nf.set_backend("reference"):
        (want,) = torch.autograd.grad(model.log_prob(x), first.weight, cotangent)
    assert want[1] == 0
    assert torch.allclose(grad, want)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples(options):
    model, seeded = make(6, **options), torch.Generator().manual_seed
    c = torch.randn(2, 3) if model.context else None
    got = model.sample(5, c, generator=seeded(1))
    parts = model.sample(5, c, batch_size=2, generator=seeded(1))
    with nf.set_backend("reference"):
        want = model.sample(5, c, generator=seeded(1))
    assert got.shape == want.shape == (*(() if c is None else (2,)), 5, 6)
    assert torch.allclose(got, want, atol=1e-4)
    assert torch.allclose(got, parts, atol=1e-4)
    many = philox.FEW_QUADS // 2 + 1
    tiny = make(6, hidden=(2,), couplings=1)
    with torch.no_grad():
        assert kind_of(tiny, many) is Handful
    assert torch.allclose(
        tiny.sample(many, generator=seeded(2))[:5], tiny.sample(5, generator=seeded(2)), atol=1e-5
    )


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
    with torch.enable_grad():
        x.requires_grad_()
        model.log_prob(x).sum().backward()
    assert x.grad.resize_(1000).shape == (1000,)
    memory = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(memory) == len(list(model.parameters()))  # each its own


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
    log_prob = calls.flow_log_prob(fused, x, None, model.scaling.log_scale)
    got = torch.autograd.grad(log_prob.sum(), [x, *model.parameters()])
    with nf.set_backend("reference"):
        wanted = torch.autograd.grad(model.log_prob(x).sum(), [x, *model.parameters()])
    for g, w in zip(got, wanted, strict=True):
        assert torch.allclose(g, w, atol=1e-4, rtol=1e-4)


def test_zeros_without_memory():
    model, none = make(), torch._efficientzerotensor(5, 6)
    assert torch.equal(model.log_prob(none), model.log_prob(torch.zeros(5, 6)))
    log_prob = model.log_prob(torch.randn(5, 6))
    grads = torch.autograd.grad(log_prob, list(model.parameters()), torch._efficientzerotensor(5))
    assert not any(g.any() for g in grads)
