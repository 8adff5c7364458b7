"""Every way on the CPU is as exact as plain PyTorch, also where shifts are small beside what they
are added to and where units are saturated: by the root of the mean square, with nothing allowed."""

import copy

import pytest
import torch

import nicefast as nf
from nicefast import path
from nicefast.fused.few import FewFlow
from nicefast.fused.handful import Handful
from nicefast.fused.onepiece import OnePiece
from nicefast.fused.sideways import SidewaysFlow

RECORDING = (Handful, OnePiece, SidewaysFlow)


def usual(value, exact):
    return (value.double() - exact).square().mean().sqrt().item()


def flow(features, hidden, scale=0.02, **options):
    model = nf.NICE(features, hidden=hidden, **options)
    for coupling in model.couplings:
        last = coupling.conditioner.linears[-1]
        torch.nn.init.normal_(last.weight, 0, scale)
        torch.nn.init.normal_(last.bias, 0, scale)
    return model


@pytest.fixture
def way(monkeypatch):
    """Sends float32 calls one way."""

    def send(kind):
        def on_cpu(chain, flow, x, recorded):
            kept = kind is not SidewaysFlow
            return kind(chain.keeping if kept else chain, flow.prior_name)

        monkeypatch.setattr(path, "_on_cpu", on_cpu)

    return send


@pytest.mark.parametrize("partition", ["half", "random"])
@pytest.mark.parametrize("width", [64, 256, 500, 1100])
@pytest.mark.parametrize("features", [2, 4, 6, 7, 16])
def test_small_shifts(way, features, width, partition):
    model = flow(features, (width,), couplings=3, partition=partition)
    exact = copy.deepcopy(model).double()

    def both(model, xs):
        pairs = [(model(x)[0], model.inverse(x)[0]) for x in xs]
        return [torch.cat(found) for found in zip(*pairs, strict=True)]

    for kind, rows in ((FewFlow, 40), (FewFlow, 7), (OnePiece, 300), (SidewaysFlow, 1000)):
        xs = torch.randn(2100, features).split(rows)
        with torch.no_grad():
            way(kind)
            found = both(model, xs)
            with nf.set_backend("reference"):
                plain = both(model, xs)
            known = both(exact, [x.double() for x in xs])
        for f, p, e in zip(found, plain, known, strict=True):
            assert usual(f, e) <= 2 * usual(p, e), (kind, rows)


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("features", [4, 32])
def test_small_shares_of_a_gradient(way, features, rows):
    model = flow(features, (600,), couplings=3)
    exact = copy.deepcopy(model).double()

    def gradient(model, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model.log_prob(x).sum(), x)[0]

    xs = [torch.randn(rows, features) for _ in range(5)]
    known = torch.cat([gradient(exact, x.double()) for x in xs])
    with nf.set_backend("reference"):
        plain = torch.cat([gradient(model, x) for x in xs])
    for kind in RECORDING:
        way(kind)
        assert usual(torch.cat([gradient(model, x) for x in xs]), known) <= 2 * usual(plain, known)


@pytest.mark.parametrize("activation", ["elu", "tanh", "silu", "gelu"])
def test_gradients_through_saturated_units(way, activation):
    """exp(-10) is not what 1 has lost beside it."""
    level = 3.0 if activation == "tanh" else -9.0  # 1 - y^2 it is in PyTorch, too
    model = flow(4, (8, 8), scale=0.5, couplings=2, activation=activation)
    with torch.no_grad():
        for coupling in model.couplings:
            coupling.conditioner.linears[0].bias.add_(level)
    exact, x = copy.deepcopy(model).double(), torch.randn(64, 4)

    def gradients(model, x):
        weights = [c.conditioner.linears[0].weight for c in model.couplings]
        return torch.autograd.grad(model(x)[0].sin().sum(), weights)

    known = gradients(exact, x.double())
    with nf.set_backend("reference"):
        plain = gradients(model, x)
    for kind in RECORDING:
        if kind is Handful and activation == "gelu":
            continue  # which NumPy has not
        way(kind)
        for f, p, e in zip(gradients(model, x), plain, known, strict=True):
            assert usual(f, e) <= 2.5 * usual(p, e), kind
