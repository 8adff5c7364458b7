"""Tensors of any strides: parameters, rows, contexts and gradients, by every way through a flow."""

import copy

import pytest
import torch

import nicefast as nf
from helpers import make, partitions


def stacked(t):
    """Every second number of its memory; the others are far off."""
    return torch.stack((t, torch.full_like(t, 5.0)), -1)[..., 0]


def cut_out(t):
    """A part of larger memory, which begins before it and ends after it."""
    last = t.shape[-1]
    return torch.nn.functional.pad(t, (3, 2), value=5.0)[..., 3 : 3 + last]


def transposed(t):
    """With the first dimension's numbers side by side; a vector is a column of a matrix."""
    if t.ndim == 1:
        return torch.stack((t, t + 5, t - 5)).t().contiguous()[:, 0]
    return t.t().contiguous().t()


def expanded(t):
    """The first entry (row) for all of them, which have no memory of their own."""
    return t[:1].clone().expand(t.shape)


def expanded_along(t):
    """The first entry of each row for all of them."""
    return t[..., :1].clone().expand(t.shape)


def negated(t):
    """Numbers that are to be read with the opposite sign of what their memory says."""
    return torch._neg_view(-t)


LAYOUTS = [stacked, cut_out, transposed, expanded, expanded_along, negated]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)

#: (features, hidden, rows, context), such that each of the ways through a flow on a CPU is taken
SIZES = {
    "few rows of a narrow flow": (6, (16, 8), 3, 0),
    "with context": (6, (16, 8), 5, 3),
    "few rows of a wide flow": (8, (300, 300), 6, 0),
    "many rows of a wide flow": (8, (300, 300), 400, 0),
    "many rows with context": (8, (300, 300), 1024, 3),
    "blocks of rows": (8, (128, 128, 128), 4500, 2),
}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def flow_of(size, **options):
    features, hidden, rows, context = size
    flow = make(features, hidden=hidden, context=context, **options)
    for p in flow.parameters():
        if p.ndim == 1 and p is not flow.scaling.log_scale:
            torch.nn.init.normal_(p, 0, 0.3)
    return flow, torch.randn(rows, features), torch.randn(rows, context) if context else None


def laid_out(flow, layout, only=""):
    """A copy of the flow whose parameters have this layout, and a dense one in float64."""
    flow = copy.deepcopy(flow)
    state = flow.state_dict()
    state = {k: layout(v.clone()) if k.endswith(only) else v for k, v in state.items()}
    flow.load_state_dict(state, assign=True)
    exact = copy.deepcopy(flow)
    dense = {k: v.clone().contiguous().resolve_neg() for k, v in state.items()}
    exact.load_state_dict(dense, assign=True)
    return flow, exact.double()


def double(t):
    return None if t is None else t.resolve_neg().contiguous().double()


def assert_close(found, exact, tolerance=2e-4):
    assert found.shape == exact.shape
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=tolerance * scale)


def check_inference(flow, exact, x, c):
    c64 = double(c)
    with torch.no_grad():
        assert_close(flow.log_prob(x, c), exact.log_prob(double(x), c64))
        z, log_det = flow(x, c)
        z64, log_det64 = exact(double(x), c64)
        assert_close(z, z64)
        assert_close(log_det, log_det64)
        assert_close(flow.inverse(x, c)[0], exact.inverse(double(x), c64)[0])


def check_gradients(flow, exact, x, c, weight=None):
    def gradients(model, x, c, weight):
        leaves = [t.detach().requires_grad_() for t in (x, c) if t is not None]
        own = model.log_prob(*leaves)
        every = [*model.parameters(), *leaves]
        return torch.autograd.grad(own, every, torch.ones_like(own) if weight is None else weight)

    found = gradients(flow, x, c, weight)
    wanted = gradients(exact, double(x), double(c), double(weight))
    for one, other in zip(found, wanted, strict=True):  # long sums, in another order
        assert_close(one, other, 1e-3)


def check_samples(flow, exact, c, batch_size=7):
    def draw(model, method, c, **options):
        c = None if c is None else c[:3]
        torch.manual_seed(3)
        return getattr(model, method)(20, c, **options)

    dense = copy.deepcopy(exact).float()
    found = draw(flow, "sample", c)
    assert_close(found, draw(dense, "sample", c))
    assert_close(draw(flow, "sample", c, batch_size=batch_size), found)
    for own, other in zip(
        draw(flow, "sample_and_log_prob", c), draw(dense, "sample_and_log_prob", c), strict=True
    ):
        assert_close(own, other)


@sizes
@layouts
def test_parameters(layout, size):
    # units that all are the same would all have relu's kink at the same place
    flow, x, c = flow_of(size, activation="silu" if layout is expanded_along else "relu")
    flow, exact = laid_out(flow, layout)
    check_inference(flow, exact, x, c)
    check_samples(flow, exact, c)
    check_gradients(flow, exact, x, c)


@layouts
@pytest.mark.parametrize("only", ["bias", "weight", "log_scale"])
def test_some_parameters(layout, only):
    flow, x, c = flow_of(SIZES["many rows of a wide flow"])
    flow, exact = laid_out(flow, layout, only)
    check_inference(flow, exact, x, c)
    check_gradients(flow, exact, x, c)


def test_a_bias_between_other_numbers():
    """oneDNN's pointwise linear reads a bias by its address: this was 29 nats off."""
    flow = nf.NICE(8, hidden=(300, 300), couplings=3)
    state = {k: v.clone() for k, v in flow.state_dict().items()}
    state = {k: stacked(v + 0.01) if k.endswith("bias") else v for k, v in state.items()}
    flow.load_state_dict(state, assign=True)
    x = torch.randn(1024, 8)
    with nf.set_backend("reference"):
        exact = flow.log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), exact, rtol=0, atol=1e-4)


@sizes
@layouts
def test_rows_and_context(layout, size):
    flow, x, c = flow_of(size)
    exact = copy.deepcopy(flow).double()
    x, c = layout(x), None if c is None else layout(c)
    check_inference(flow, exact, x, c)
    check_gradients(flow, exact, x, c)
    check_samples(flow, exact, c)


@sizes
@layouts
def test_gradients_that_come_in(layout, size):
    flow, x, c = flow_of(size)
    exact = copy.deepcopy(flow).double()
    for _ in range(2):
        check_gradients(flow, exact, x, c, layout(torch.randn(len(x))))
        check_gradients(flow, exact, x, c)


@layouts
@pytest.mark.parametrize("size", [SIZES["many rows of a wide flow"]])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_activations(layout, size, activation):
    flow, x, c = flow_of(size, activation=activation)
    flow, exact = laid_out(flow, layout)
    check_inference(flow, exact, x, c)
    check_gradients(flow, exact, x, c)


@layouts
@pytest.mark.parametrize("size", [SIZES["many rows of a wide flow"]])
def test_parameters_under_autocast(layout, size):
    """Products of bfloat16 operands: as near as those of a dense flow."""
    flow, x, c = flow_of(size)
    flow, exact = laid_out(flow, layout)
    dense = copy.deepcopy(exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = flow.log_prob(x, c), dense.log_prob(x, c)
    assert_close(found, plain)
    assert_close(found, exact.log_prob(double(x), double(c)), 0.1)


@layouts
def test_a_flow_on_a_grid(layout):
    flow, x, _ = flow_of(SIZES["few rows of a narrow flow"])
    flow, exact = laid_out(flow, layout)
    flow = flow.with_grid(2**-16)
    assert_close(flow.log_prob(layout(x)), exact.log_prob(double(layout(x))), 1e-3)
    z, _ = flow(layout(x))
    assert torch.equal(flow(flow.inverse(layout(z))[0])[0], layout(z))
    assert flow.cell_log_prob(layout(x)).isfinite().all()


@layouts
def test_kernels(layout, triton_backend, device):
    """Of a whole narrow flow, and layer by layer of a wide one; also rows alone."""
    for size in ((4, (16,), 9, 2), (4, (140,), 9, 0)):
        flow, x, c = flow_of(size)
        x, c = layout(x).to(device), None if c is None else layout(c).to(device)
        flow, exact = laid_out(flow, layout)
        flow, exact = flow.to(device), exact.to(device)
        check_inference(flow, exact, x, c)
        check_gradients(flow, exact, x, c)
        check_samples(flow, exact, c, batch_size=None)


@layouts
@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_operations(layout, backend, device, prior):
    x, log_scale = torch.randn(33, 7), torch.randn(7) / 2
    x, log_scale = layout(x).to(device), layout(log_scale).to(device)
    exact = nf.reference.scale_log_prob(double(x), double(log_scale), prior, return_z=True)
    found = nf.functional.scale_log_prob(x, log_scale, prior, return_z=True)
    for own, other in zip(found, exact, strict=True):
        assert_close(own, other, 1e-5)
    assert_close(
        nf.functional.cell_log_prob(x, log_scale, 0.5, prior),
        nf.reference.cell_log_prob(double(x), double(log_scale), 0.5, prior),
        1e-5,
    )
    weights = layout(torch.randn(33)).to(device), layout(torch.randn(33, 7)).to(device)

    def gradients(x, log_scale, weights):
        leaves = [t.detach().requires_grad_() for t in (x, log_scale)]
        own = nf.functional.scale_log_prob(*leaves, prior, return_z=True)
        return torch.autograd.grad(own[::-1], leaves, weights)

    with nf.set_backend("reference"):
        wanted = gradients(double(x), double(log_scale), tuple(map(double, weights)))
    for own, other in zip(gradients(x, log_scale, weights), wanted, strict=True):
        assert_close(own, other, 1e-5)
    noise = nf.functional.sample_prior(log_scale, 9, prior, seed=1)
    dense = log_scale.resolve_neg().contiguous()
    assert_close(noise, nf.reference.sample_prior(dense, 9, 1, prior), 1e-5)
    scale = log_scale.detach().requires_grad_()
    (own,) = torch.autograd.grad(
        nf.functional.sample_prior(scale, 33, prior, seed=1), scale, weights[1]
    )
    h = nf.reference.sample_prior(dense.double(), 33, 1, prior, dtype=torch.float32)
    assert_close(
        own, nf.reference.sample_prior_backward(double(weights[1]), h, torch.float64), 1e-4
    )


@layouts
def test_couplings(layout, backend, device):
    for partition in partitions(7)[1::2]:
        count = len(partition.shifted)
        x, shift, bias, g = (torch.randn(*s) for s in ((20, 7), (20, count), (count,), (20, 7)))
        x, shift, bias, g = (layout(t).to(device) for t in (x, shift, bias, g))
        dense = [double(t) for t in (x, shift)]
        for inverse in (False, True):
            exact = nf.reference.additive_coupling(*dense, partition, inverse, double(bias))
            found = nf.functional.additive_coupling(x, shift, partition, inverse, bias)
            assert_close(found, exact, 1e-6)
            own = x.clone(memory_format=torch.contiguous_format)
            nf.functional.additive_coupling_(own, shift, partition, inverse, bias)
            assert_close(own, exact, 1e-6)
        leaves = [t.detach().requires_grad_() for t in (x, shift, bias)]
        out = nf.functional.additive_coupling(*leaves[:2], partition, True, leaves[2])
        found = torch.autograd.grad(out, leaves, g)
        columns = double(g)[:, partition.shifted.to(device)]
        for one, other in zip(found, (double(g), -columns, -columns.sum(0)), strict=True):
            assert_close(one, other, 1e-5)
        _, x1 = nf.functional.split_features(x, partition)
        assert torch.equal(x1, x[:, partition.conditioning.to(device)])


@pytest.mark.parametrize("layout", [stacked, cut_out, transposed, negated])
def test_couplings_in_place(layout, backend, device):
    for partition in partitions(6)[::2]:
        x = layout(torch.randn(20, 6, device=device))
        shift = layout(torch.randn(20, len(partition.shifted), device=device))
        exact = nf.reference.additive_coupling(double(x), double(shift), partition)
        nf.functional.additive_coupling_(x, shift, partition)
        assert_close(x, exact, 1e-6)


@layouts
def test_layers(layout, backend, device):
    layer = nf.AdditiveCoupling(nf.Partition.random(7, 1), nf.MLP(4, (9,), 3)).to(device)
    scaling = nf.Scaling(7).to(device)
    torch.nn.init.normal_(scaling.log_scale)
    for module in (layer, scaling):
        state = {k: layout(v.clone()) for k, v in module.state_dict().items()}
        exact = copy.deepcopy(module).double()
        exact.load_state_dict({k: double(v) for k, v in state.items()}, assign=True)
        module.load_state_dict(state, assign=True)
        x = layout(torch.randn(20, 7)).to(device)
        with torch.no_grad():
            for own, other in ((module, exact), (module.inverse, exact.inverse)):
                for one, wanted in zip(own(x), other(double(x)), strict=True):
                    assert_close(one, wanted, 1e-5)
    with torch.no_grad():
        y = layout(torch.randn(20, 7)).to(device)
        dense = y.clone(memory_format=torch.contiguous_format)
        assert_close(layer.inverse_(dense), layer.inverse(y)[0], 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=lambda f: f.__name__)
def test_dequantise(layout, backend, device):
    laid = layout(torch.randint(0, 200, (20, 7)).to(device))
    found = nf.functional.dequantise(laid, 256, seed=2)
    assert torch.equal(found, nf.functional.dequantise(laid.contiguous(), 256, seed=2))
    assert torch.equal((found * 256).floor().long(), laid)
