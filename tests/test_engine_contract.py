"""What every engine promises, and the layer path and frozen flows with them: one test for all.

``way`` is each of them in turn, see :class:`ways.Way`. Here are values, rows and gradients;
engine/test_modes.py has modes, threads and memory, engine/test_changes.py changes of the flow.
"""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import nicefast as nf
from helpers import Operators, make, partitions, strided
from ways import Definition, assert_as_exact, check, data, gradients, leaves, results, ways

# values and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "context", "prior"),
    [
        ("relu", 0, "logistic"),
        ("leaky_relu", 2, "normal"),
        ("tanh", 2, "logistic"),
        ("gelu", 0, "normal"),
        ("silu", 2, "logistic"),
        ("elu", 0, "normal"),
    ],
)
def test_values_and_gradients_are_those_of_float64(way, device, activation, context, prior):
    options = {"activation": activation, "context": context, "prior": prior}
    check(way, make(7, device=device, couplings=2, **options))


@pytest.mark.parametrize("partition", partitions(6)[::2], ids=str)
def test_every_partition(way, device, partition):
    check(way, make(6, device=device, partition=partition, couplings=2, activation="tanh"))


@pytest.mark.parametrize("sides", ["0", "0110", "10110"])
def test_couplings_in_any_order(way, device, sides):
    half = nf.Partition.half(5)
    own = [half if side == "0" else ~half for side in sides]
    options = {"couplings": len(own), "hidden": (9,), "activation": "silu"}
    check(way, make(5, device=device, partition=own, **options), rows=24)


@pytest.mark.parametrize("hidden", [(), (1,), (40, 24, 8)])
def test_any_hidden_layers(way, device, hidden):
    if way.name == "kernel" and not hidden:
        pytest.skip("no kernel without a hidden layer")
    check(way, make(6, device=device, hidden=hidden, couplings=2, activation="gelu"))


@pytest.mark.parametrize(("features", "width"), [(2, 64), (7, 16), (150, 64), (16, 500)])
def test_small_shifts_are_added_with_all_their_digits(way, device, features, width):
    if way.name == "kernel" and (width > 64 or features > 16):
        pytest.skip("too wide for the kernel")
    model = nf.NICE(features, hidden=(width,), couplings=3).to(device)
    for coupling in model.couplings:
        for p in coupling.conditioner.linears[-1].parameters():
            torch.nn.init.normal_(p, 0, 0.02)
    check(way, model, rows=60)


@pytest.mark.parametrize("activation", ["elu", "tanh", "silu", "gelu"])
def test_gradients_through_saturated_units(way, device, activation):
    """exp(-10) is not what 1 has lost beside it."""
    level = 3.0 if activation == "tanh" else -9.0  # 1 - y^2 it is in PyTorch, too
    model = make(4, device=device, hidden=(8, 8), couplings=2, activation=activation)
    with torch.no_grad():
        for coupling in model.couplings:
            coupling.conditioner.linears[0].bias.add_(level)
    check(way, model, rows=64)


# rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "activation"), [(torch.nan, "relu"), (torch.inf, "tanh"), (-torch.inf, "relu")]
)
def test_what_is_no_number_stays_in_its_row(way, device, value, activation):
    model = make(6, device=device, activation=activation, couplings=2, context=2)
    flow, (x, c) = way.of(model), data(model, 17)
    broken, own, rows = x.clone(), c.clone(), torch.arange(8) * 2 + 1
    broken[rows[:6], range(6)] = value
    own[rows[6:], range(2)] = value
    with torch.no_grad():
        for f, e in zip(results(flow, broken, own), results(flow, x, c), strict=True):
            assert torch.equal(f[::2], e[::2])
            lost = ~f[rows].isfinite()
            assert lost[:6].view(6, -1).any(1).all()
            assert value == value or lost.view(8, -1).any(1).all()
    if way.name != "frozen":
        grads = []
        for given, also in ((x.requires_grad_(), c), (broken.requires_grad_(), own)):
            grads += torch.autograd.grad(flow.log_prob(given, also).sum(), given)
        assert torch.equal(grads[1][::2], grads[0][::2])


@pytest.mark.parametrize(
    ("name", "value"), [("weight", torch.nan), ("bias", torch.inf), ("weight", 1e38)]
)
def test_parameters_that_are_no_numbers_show(way, device, name, value):
    model = make(6, device=device, hidden=(24, 16, 20), couplings=2)
    with torch.no_grad():
        p = getattr(model.couplings[0].conditioner.linears[1], name)
        p[1] = value
        if name == "weight":
            p[2] = -value
        x, _ = data(model, 9)
        found = results(way.of(model), x)
        with nf.set_backend("reference"):
            expected = results(model, x)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f.isfinite(), e.isfinite())


@pytest.mark.parametrize("kind", ["rows", "columns", "expanded"])
def test_rows_and_cotangents_lie_in_any_way(way, device, kind):
    model = make(6, device=device, couplings=2, context=2)
    flow, (x, c) = way.of(model), data(model, 40)
    x, c = strided(x, kind), strided(c, kind)
    with torch.no_grad():
        found = results(flow, x, c)
        for f, e in zip(found, results(flow, x.clone(), c.clone()), strict=True):
            torch.testing.assert_close(f, e)
    if way.name != "frozen":
        x.requires_grad_()
        g = strided(torch.randn(40, 6, device=device), kind)
        ends = x, *model.parameters()
        for method in ("forward", "inverse"):
            value = getattr(flow, method)(x, c)[0]
            grads = [
                torch.autograd.grad(value, ends, own, retain_graph=True, allow_unused=True)
                for own in (g, g.clone(memory_format=torch.contiguous_format))
            ]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def apart(p):
    """The parameter with NaN between its numbers."""
    gaps = torch.full((*p.shape, 2), torch.nan, device=p.device)
    gaps[..., 0] = p.detach()
    return torch.nn.Parameter(gaps[..., 0])


def turned(p):
    """A weight whose outputs are next to each other."""
    return torch.nn.Parameter(p.detach().t().contiguous().t())


def expanded(p):
    """One number for all outputs."""
    return torch.nn.Parameter(p.detach()[:1].expand(p.shape))


@pytest.mark.parametrize("layout", [apart, turned, expanded])
def test_parameters_lie_in_any_way(way, device, layout):
    model = make(6, device=device, couplings=2, activation="tanh")
    for linear in (linear for own in model.couplings for linear in own.conditioner.linears):
        for name in ("weight", "bias"):
            p = getattr(linear, name)
            if p.ndim == 2 or layout is not turned:
                setattr(linear, name, layout(p))
    if layout is apart:
        model.scaling.log_scale = apart(model.scaling.log_scale)
    check(way, model)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("context", [0, 2])
def test_no_row_and_one(way, device, rows, context):
    model = make((2, 3), device=device, context=context)
    flow, (x, c) = way.of(model), data(model, rows, requires_grad=way.name != "frozen")
    with nf.set_backend("reference"):
        expected = results(model, x, c)
    for f, e in zip(results(flow, x, c), expected, strict=True):
        torch.testing.assert_close(f, e, atol=1e-5, rtol=1e-5, check_stride=False)
    if way.name != "frozen":
        for g in gradients(flow, x, c):
            assert g.isfinite().all()
            assert rows or not g.any()


def test_leading_dimensions_narrow_rows_and_contexts_that_broadcast(way, device):
    model = make((2, 3), device=device, couplings=2, context=2)
    flow = way.of(model)
    x, _ = data(model, 5, batch=(3,))
    wide, narrow = torch.float32, torch.float16
    for shape, dtype in (((5, 2), wide), ((2,), narrow), ((3, 1, 2), narrow), ((3, 5, 2), wide)):
        own, rows = torch.randn(shape, device=device).to(dtype), x.to(dtype, copy=True)
        with torch.no_grad():
            found = flow.log_prob(rows, own)
            with nf.set_backend("reference"):
                expected = model.log_prob(rows, own)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        if way.name != "frozen":
            ends, atol = (rows.requires_grad_(), own.requires_grad_()), 200 * torch.finfo(dtype).eps
            grads = torch.autograd.grad(flow.log_prob(*ends).sum(), ends)
            with nf.set_backend("reference"):
                known = torch.autograd.grad(model.log_prob(*ends).sum(), ends)
            for g, e in zip(grads, known, strict=True):
                torch.testing.assert_close(g, e, atol=atol / 10, rtol=1e-2)


# gradients --------------------------------------------------------------------------------------


@ways("rows", "recompute", "kernel", "gemm", "layers")
@pytest.mark.parametrize("method", ["log_prob", "forward", "inverse"])
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # that they are not float64
def test_gradients_of_gradients_and_of_many_at_once(way, device, method):
    model = make(4, device=device, hidden=(5,), couplings=2, activation="tanh", context=1)
    flow, (x, c) = way.of(model), data(model, 3, requires_grad=True)
    weight = model.couplings[0].conditioner.linears[0].weight

    def call(x, c, log_scale, weight):
        found = getattr(flow, method)(x, c)
        return found if method == "log_prob" else found[0]

    ends = x, c, model.scaling.log_scale, weight
    options = {"eps": 1e-2, "atol": 5e-2, "rtol": 5e-2}
    assert gradcheck(call, ends, check_batched_grad=True, **options)
    assert gradgradcheck(call, ends, check_batched_grad=True, **options)


@ways("rows", "kernel", "gemm", "layers")
def test_second_derivatives_are_those_of_float64(way, device):
    model = make(4, device=device, activation="silu")
    define = Definition(model)
    x, _ = data(model, 20, requires_grad=True)

    def twice(flow, x):
        (grad,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves(flow, x))

    assert_as_exact(twice(way.of(model), x), *define(twice, x), pooled=True)


@ways("rows", "blocks", "recompute", "kernel", "gemm", "layers")
def test_backward_twice_and_in_parts(way, device):
    """A graph that is kept gives the same again; one that is not is refused, as PyTorch does."""
    model = make(6, device=device)
    flow, (x, _) = way.of(model), data(model, 20, requires_grad=True)
    value, ends = flow.log_prob(x).sum(), leaves(model, x)
    first = torch.autograd.grad(value, ends, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(value, ends, retain_graph=True), strict=True):
        assert torch.equal(a, b)
    for a, end in zip(first, ends, strict=True):
        (b,) = torch.autograd.grad(value, end, retain_graph=True)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@ways("rows", "recompute", "kernel", "gemm", "layers")
@pytest.mark.parametrize("change", [lambda p: p.add_(1), lambda p: p[:1].zero_()])
@pytest.mark.parametrize(
    "name",
    [
        "couplings.0.conditioner.linears.0.weight",
        "couplings.2.conditioner.linears.1.bias",
        "scaling.log_scale",
    ],
)
def test_a_parameter_changed_before_its_gradient_is_an_error(way, device, change, name):
    if way.name == "layers" and name.endswith("bias"):
        pytest.skip("the gradient of a plain linear layer needs no bias")
    model = make(6, device=device)
    flow, (x, _) = way.of(model), data(model, 5, requires_grad=True)
    value = flow.log_prob(x).sum()
    with torch.no_grad():
        change(model.get_parameter(name))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@ways("rows", "blocks", "recompute", "kernel", "gemm", "layers")
def test_nothing_is_computed_for_what_needs_no_gradient(way, device):
    model = make(6, device=device, hidden=(16, 8), couplings=3)
    flow, (x, _) = way.of(model), data(model, 8)
    model.requires_grad_(False)
    *_, first, last = (c.conditioner.linears for c in model.couplings)
    for wanted, products in (
        (last[2].bias, 0),
        (last[2].weight, 1),
        (last[0].weight, 3),
        (first[2].weight, 4),
    ):
        wanted.requires_grad_(True)
        value = flow.log_prob(x).sum()
        with Operators() as operators:
            value.backward()
        wanted.requires_grad_(False)
        assert [
            n for n, p in model.named_parameters() if p.grad is not None and p is not wanted
        ] == []
        found = len(operators.products())
        again = 9 if way.name == "recompute" else 0
        if way.name not in ("blocks", "recompute"):
            assert found == products, wanted.shape
        assert found >= again
        wanted.grad = None
    assert not flow.log_prob(x).requires_grad


@ways("rows", "blocks", "kernel", "gemm", "layers", "frozen")
def test_tied_layers_and_couplings(way, device):
    model = make(6, device=device, couplings=4, activation="tanh")
    model.couplings[2].conditioner = model.couplings[0].conditioner
    model.couplings[3].conditioner.linears[1] = model.couplings[1].conditioner.linears[1]
    model.couplings[3].conditioner.linears[0].bias = model.couplings[1].conditioner.linears[0].bias
    check(way, model)
