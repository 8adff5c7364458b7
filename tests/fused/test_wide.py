"""A wide flow between kernels: any partition, any order of sides, few launches."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import nicefast as nf
from helpers import Operators, assert_three_way, make, partitions, strided

pytest.importorskip("triton", reason="needs Triton")

from nicefast import backend
from nicefast.fused import blockwise
from nicefast.fused.blockwise import couple
from nicefast.fused.wide import WideFlow
from nicefast.path import choose_path
from nicefast.reading import read

KERNELS = ("enter", "add_", "leave")


def wide(model, x, bfloat16=False):
    return WideFlow(read(model.couplings, x.device, bfloat16), model.prior_name)


def layers(model, x, context=None):
    """(z, log_prob) by the definition, in ``x``'s precision."""
    h = x
    for coupling in model.couplings:
        h, _ = coupling(h, context)
    return nf.reference.scale_log_prob(h, model.scaling.log_scale, model.prior_name, True)


@pytest.mark.parametrize("partition", range(10))
@pytest.mark.parametrize("kind", ["dense", "rows", "columns", "expanded"])
def test_the_flow_and_its_inverse(guarded, device, partition, kind):
    p = partitions(7)[partition]
    model = make(7, partition=p, couplings=4, hidden=(12, 20), device=device)
    x = strided(torch.randn(33, 7, device=device), kind)
    with torch.no_grad():
        flow, log_scale = wide(model, x), model.scaling.log_scale
        z, log_prob = flow.forward(x, None, log_scale, want_z=True, want_log_prob=True)
        with nf.set_backend("reference"):
            plain_z, plain = layers(model, x)
            exact_z, exact = layers(model.double(), x.double())
            model.float()
        assert_three_way(z, plain_z, exact_z)
        assert_three_way(log_prob, plain, exact)
        none, again = flow.forward(x, None, log_scale, want_log_prob=True)
        assert torch.equal(again, log_prob)
        assert not len(none)
        assert torch.equal(flow.forward(x, None, log_scale, want_z=True)[0], z)
        given = strided(z, "rows")
        torch.testing.assert_close(flow.inverse(given, None, log_scale), x, atol=1e-4, rtol=0)
        y = flow.couple(x, None, inverse=False)
        chain = flow.chain
        torch.testing.assert_close(y, couple(chain, x, None, False), atol=1e-5, rtol=1e-5)
        back = couple(chain, y, None, True)
        torch.testing.assert_close(flow.couple(y, None, inverse=True), back, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sides", ["0", "1", "0000", "0011", "0110", "00101", "1011010"])
@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("width", [6, 1030])
def test_couplings_in_any_order(guarded, device, sides, prior, width):
    half = nf.Partition.half(width)
    own = [half if side == "0" else ~half for side in sides]
    model = make(width, partition=own, couplings=len(own), hidden=(9,), prior=prior, device=device)
    with torch.no_grad():
        for coupling in model.couplings:
            coupling.conditioner.linears[-1].bias.normal_()
        x = torch.randn(5, width, device=device)
        flow, log_scale = wide(model, x), model.scaling.log_scale
        z, log_prob = flow.forward(x, None, log_scale, want_z=True, want_log_prob=True)
        with nf.set_backend("reference"):
            plain_z, plain = layers(model, x)
            exact_z, exact = layers(model.double(), x.double())
            model.float()
        assert_three_way(z, plain_z, exact_z)
        assert_three_way(log_prob, plain, exact)
        torch.testing.assert_close(flow.inverse(z, None, log_scale), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
@pytest.mark.parametrize("inverse", [False, True])
def test_four_couplings_take_three_kernels_besides_their_products(
    monkeypatch, triton_backend, device, partition, inverse
):
    model = make(10, hidden=(16,) * 5, couplings=4, partition=partition, device=device)
    x, launches = torch.randn(8, 10, device=device), []
    for name in KERNELS:

        def counted(*arguments, run=getattr(backend.kernels(), name), name=name):
            launches.append(name)
            with _disable_current_modes():  # the interpreter's own operators
                return run(*arguments)

        monkeypatch.setattr(backend.kernels(), name, counted)
    with torch.no_grad():
        flow, log_scale = wide(model, x), model.scaling.log_scale
        with Operators() as operators:
            if inverse:
                flow.inverse(x, None, log_scale)
            else:
                flow.forward(x, None, log_scale, want_log_prob=True)
    assert launches == list(KERNELS)
    products = operators.products()
    assert len(products) == 4 * 6
    looks_at_log_scale = {"sum", "_local_scalar_dense"}  # on the CPU alone
    assert set(operators.computing()) - {"new_empty", *products} <= looks_at_log_scale


def test_context_and_bfloat16_operands(triton_backend, device):
    model = make(6, hidden=(40, 24), couplings=3, context=2, device=device)
    x, c = torch.randn(9, 6, device=device), torch.randn(9, 2, device=device)
    with torch.no_grad():
        log_scale = model.scaling.log_scale
        with nf.set_backend("reference"):
            expected, expected_log_prob = layers(model, x, c)
        for bfloat16, atol in ((False, 1e-5), (True, 0.1)):
            flow = wide(model, x, bfloat16)
            z, log_prob = flow.forward(x, c, log_scale, want_z=True, want_log_prob=True)
            assert z.dtype == log_prob.dtype == torch.float32
            torch.testing.assert_close(z, expected, atol=atol, rtol=atol)
            torch.testing.assert_close(log_prob, expected_log_prob, atol=5 * atol, rtol=atol)
            torch.testing.assert_close(flow.inverse(z, c, log_scale), x, atol=2e-5, rtol=1e-5)


def test_blocks_of_rows_and_none(monkeypatch, guarded, device):
    model = make(5, hidden=(150,), couplings=2, device=device)
    x = torch.randn(21, 5, device=device)
    with torch.no_grad():
        log_scale = model.scaling.log_scale
        whole = wide(model, x).forward(x, None, log_scale, True, True)
        for name in ("BLOCK_BYTES", "GPU_ELEMENTS"):
            monkeypatch.setattr(blockwise, name, 2400)
        monkeypatch.setattr(blockwise, "ROWS_PER_WIDTH", 0)
        flow = wide(model, x)
        assert "blocks" in flow.pieces(len(x))
        for a, b in zip(flow.forward(x, None, log_scale, True, True), whole, strict=True):
            torch.testing.assert_close(a, b)
        z, log_prob = flow.forward(x[:0], None, log_scale, True, True)
        assert z.shape == (0, 5)
        assert log_prob.shape == (0,)
        assert flow.inverse(z, None, log_scale).shape == (0, 5)


def test_signed_zeros_and_nan_stay_where_they_are(triton_backend, device):
    model = make(6, hidden=(8,), couplings=1, partition="half", device=device)
    x = torch.full((3, 6), -0.0, device=device)
    x[1, 5] = torch.nan
    with torch.no_grad():
        model.scaling.log_scale.zero_()
        y = wide(model, x).couple(x, None, inverse=False)
        assert torch.equal(y[:, :3].signbit(), torch.ones(3, 3, dtype=torch.bool, device=device))
        nan = torch.zeros(3, 6, dtype=torch.bool, device=device)
        nan[1, 5] = True
        assert torch.equal(y.isnan(), nan)
        _, log_prob = wide(model, x).forward(x, None, model.scaling.log_scale, False, True)
        assert log_prob.isnan().tolist() == [False, True, False]


def apart(p):
    """The parameter with NaN between its numbers."""
    gaps = torch.full((*p.shape, 2), torch.nan, device=p.device)
    gaps[..., 0] = p.detach()
    return torch.nn.Parameter(gaps[..., 0])


@pytest.mark.parametrize("path", ["wide", "whole"])
def test_parameters_need_not_be_dense(triton_backend, device, path):
    model, x = make(6, hidden=(8,), device=device), torch.randn(5, 6, device=device)

    def results():
        flow = wide(model, x) if path == "wide" else choose_path(model, x).fused
        log_scale = model.scaling.log_scale
        z, log_prob = flow.forward(x, None, log_scale, True, True)
        drawn = [flow.sample(4, 0, 7, None, log_scale)] if path == "whole" else []
        return z, log_prob, flow.inverse(z, None, log_scale), *drawn

    with torch.no_grad():
        expected = results()
        model.scaling.log_scale = apart(model.scaling.log_scale)
        for coupling in model.couplings:
            for linear in coupling.conditioner.linears:
                linear.weight, linear.bias = apart(linear.weight), apart(linear.bias)
        for value, dense in zip(results(), expected, strict=True):
            torch.testing.assert_close(value, dense)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [(300, 200), (1000,) * 5])
def test_a_gpu_takes_it(device, hidden):
    model = make(784, hidden=hidden, couplings=4, device=device)
    x = torch.randn(1000, 784, device=device)
    with torch.no_grad():
        path = choose_path(model, x)
        assert isinstance(path.fused, WideFlow)
        _, exact = layers(model.double(), x.double())
        model.float()
        with nf.set_backend("reference"):
            plain = model.log_prob(x)
        assert_three_way(model.log_prob(x), plain, exact)
        torch.testing.assert_close(model.inverse(model(x)[0])[0], x, atol=1e-3, rtol=1e-3)
    assert choose_path(model, x).fused is None  # a gradient needs activations
    assert model.log_prob(x).requires_grad


def test_parameters_are_cast_once_and_are_never_stale(triton_backend, device):
    model = make(6, hidden=(40, 24), couplings=3, device=device)
    x, log_scale = torch.randn(9, 6, device=device), model.scaling.log_scale

    def casts():
        flow = wide(model, x, True)
        with torch.no_grad(), Operators() as operators:
            z, _ = flow.forward(x, None, log_scale, want_z=True)
        with nf.set_backend("reference"), torch.no_grad():
            torch.testing.assert_close(z, layers(model, x)[0], atol=0.1, rtol=0.1)
        return operators.seen.count("_to_copy")

    first = casts()
    rows = first - len(list(model.couplings.parameters()))  # the operands themselves
    assert casts() == rows
    with torch.no_grad():
        model.couplings[1].conditioner.linears[0].weight.neg_().mul_(3)
    assert casts() == first
    assert casts() == rows
    with torch.inference_mode():
        casts()
    assert casts() == rows
