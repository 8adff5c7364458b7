"""Every way through a flow, one after the other, and what is asked of each: see :class:`Way`."""

import copy
import math

import pytest
import torch

import nicefast as nf
import nicefast.flow
from nicefast.engine import Plan, rows
from nicefast.engine import linear as products
from nicefast.engine.gemm import GemmEngine
from nicefast.engine.plan import plan
from nicefast.engine.rows import RowEngine


class Way:
    """One way through a flow, whichever the plan would take by itself on the machine at hand.

    rows        the row engine in one block
    onednn      the same, every product by oneDNN
    few         the same, every product of the forward pass as W h^T
    blocks      the same in blocks of few rows
    recompute   the same in blocks of few rows, whose backward pass recomputes residuals
    kernel      the kernel engine (without a GPU: in Triton's interpreter)
    gemm        the gemm engine (as above)
    layers      module by module, element-wise operations by PyTorch
    frozen      a frozen flow, which records no gradients
    """

    NAMES = ("rows", "onednn", "few", "blocks", "recompute", "kernel", "gemm", "layers", "frozen")

    def __init__(self, name, monkeypatch):
        self.name, self.backend = name, "triton" if name == "kernel" else "auto"
        self.interpreted = name in ("kernel", "gemm") and not torch.cuda.is_available()
        # MKL adds products to what is there one by one, cuBLAS adds their sum
        self.factor = 4.0 if name == "gemm" and self.interpreted else 2.0
        if name in ("blocks", "recompute"):
            monkeypatch.setattr(rows, "BLOCK_BYTES", dict.fromkeys(("cpu", "cuda"), 1 << 9))
        if name == "onednn":
            if products._pointwise is None:
                pytest.skip("this PyTorch has no oneDNN")
            monkeypatch.setattr(products, "_forward_flops", 1)
            monkeypatch.setattr(products, "_gradient_flops", 1)
        if name == "few":
            monkeypatch.setattr(products, "_forward_flops", math.inf)
            monkeypatch.setattr(products, "_few_rows", 1000)
            monkeypatch.setattr(products, "FEW_ROWS_FLOPS", 0)
        if name not in ("kernel", "frozen"):
            monkeypatch.setattr(nicefast.flow, "plan_call", self._plan)

    def _plan(self, flow, x, context=None):
        if self.name == "layers":
            return Plan("layers", "asked for by a test")
        found = plan(flow, x, context)
        engine = found.engine
        if engine is None or nf.get_backend() != self.backend:
            return found
        kind = GemmEngine if self.name == "gemm" and engine.log_scale is not None else RowEngine
        return Plan(
            kind.name,
            found.reason,
            kind(engine.stack, engine.log_scale, engine.prior, flow.recompute),
        )

    def of(self, model):
        """The model, or the frozen flow, whose methods go this way."""
        model.recompute = self.name == "recompute"
        if self.name == "frozen":
            return model.frozen()
        x = torch.empty(1, model.features, device=model.scaling.log_scale.device)
        name = {"onednn": "rows", "few": "rows", "blocks": "rows", "recompute": "rows"}.get(
            self.name, self.name
        )
        c = torch.empty(1, model.context, device=x.device) if model.context else None
        assert model.plan(x, c).name == name
        return model


class Definition:
    """A flow's results and gradients by the definition, in float32 and in float64."""

    def __init__(self, model):
        self.model, self.exact = model, copy.deepcopy(model).double()

    def __call__(self, call, *tensors):
        """``call(flow, *tensors)``, a sequence of tensors: in float32, and in float64."""
        deep = [
            None if t is None else t.detach().double().requires_grad_(t.requires_grad)
            for t in tensors
        ]
        with nf.set_backend("reference"):
            return call(self.model, *tensors), call(self.exact, *deep)


def assert_as_exact(values, plain, exact, factor=2.0, pooled=False):
    """Each of these has at most twice the root mean square error of float32's definition, but for
    half a unit in the last place; ``pooled``: all together, each measured by its own size (the
    error of a few long sums is a matter of luck)."""
    errors = []
    for v, p, e in zip(values, plain, exact, strict=True):
        assert v.dtype == p.dtype
        assert v.shape == p.shape == e.shape
        size = e.detach().square().mean().sqrt() if e.any() else 1.0
        errors.append([((t.detach().double() - e.detach()) / size).flatten() for t in (v, p)])
    if pooled:
        errors = [[torch.cat(own) for own in zip(*errors, strict=True)]]
    for own in errors:
        found, known = (e.square().sum().div(max(1, len(e))).sqrt().item() for e in own)
        assert found <= factor * known + torch.finfo(values[0].dtype).eps / 2


def ways(*names):
    """These ways alone, where others differ in nothing that the test looks at."""
    return pytest.mark.parametrize("way", names, indirect=True)


def results(flow, x, c=None):
    """log_prob, z and x of all three methods; a log_det is tested with flows."""
    return flow.log_prob(x, c), flow.forward(x, c)[0], flow.inverse(x, c)[0]


def leaves(flow, *tensors):
    return [t for t in (*tensors, *flow.parameters()) if t is not None and t.requires_grad]


def gradients(flow, x, c=None):
    """Of all results at once, each with cotangents of its own, by each leaf."""
    values = results(flow, x, c)
    numbers = torch.Generator().manual_seed(7)
    given = [
        torch.randn(v.shape, generator=numbers, dtype=torch.float32, device="cpu").to(v)
        for v in values
    ]
    return torch.autograd.grad(values, leaves(flow, x, c), given)


def data(model, rows, requires_grad=False, batch=()):
    device = model.scaling.log_scale.device
    x = 2 * torch.randn(*batch, rows, *model.event_shape, device=device)
    c = torch.randn(*batch, rows, model.context, device=device) if model.context else None
    return [None if t is None else t.requires_grad_(requires_grad) for t in (x, c)]


def check(way, model, rows=40):
    """Values and all gradients of ``rows`` rows are as near to float64's as the definition's."""
    define, flow = Definition(model), way.of(model)
    x, c = data(model, rows)
    with torch.no_grad():
        assert_as_exact(results(flow, x, c), *define(results, x, c), way.factor)
    if way.name != "frozen":
        x, c = data(model, rows, requires_grad=True)
        assert_as_exact(gradients(flow, x, c), *define(gradients, x, c), pooled=True)
