"""accelerate and restore: what they touch, what they leave, and what they say."""

import copy
import importlib.metadata
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import nicefast as nf

pytest.importorskip("nflows", reason="needs nflows")

from nflows.flows import SimpleRealNVP
from nflows.transforms import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    CompositeTransform,
)


def flow():
    return SimpleRealNVP(6, 16, num_layers=3, num_blocks_per_layer=1, use_volume_preserving=True)


class Net(nn.Linear):
    def forward(self, x, context=None):
        return super().forward(x)


def layer(mask=(0, 1, 0, 1, 0, 1)):
    return AdditiveCouplingTransform(list(mask), Net)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def test_the_report_reads_well():
    model = flow()
    report = nf.accelerate(model)
    assert str(report).splitlines() == [
        "3 couplings replaced, 0 left as they are",
        *(f"  replaced  _transform._transforms.{i}: AdditiveCouplingTransform" for i in range(3)),
    ]
    again = nf.accelerate(model)
    assert not again.replaced
    assert {found.reason for found in again.left} == {"fast already"}
    assert nf.restore(model) == 3
    assert nf.restore(model) == 0


def test_the_root_itself_may_be_a_coupling():
    model = layer()
    before = model(X)[0]
    assert str(nf.accelerate(model)).splitlines()[1] == (
        "  replaced  (root): AdditiveCouplingTransform"
    )
    assert isinstance(model, AdditiveCouplingTransform)
    assert torch.equal(model(X)[0], before)


def test_modules_parameters_and_checkpoints_stay_the_same():
    model, other = flow(), flow()
    parts, parameters = list(model.modules()), list(model.parameters())
    nf.accelerate(model)
    assert all(a is b for a, b in zip(model.modules(), parts, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(other.state_dict())
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.log_prob(X), other.log_prob(X))
    other.load_state_dict(model.state_dict())


def test_masks_of_a_checkpoint_are_followed():
    first, second = layer((0, 1, 0, 1, 0, 1)), layer((1, 0, 0, 1, 1, 0))
    nf.accelerate(first)
    first(X)
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(first(X)[0], second(X)[0])


def test_copies_pickles_and_other_dtypes():
    model = flow()
    before = model.log_prob(X)
    nf.accelerate(model)
    model.log_prob(X)
    torch.testing.assert_close(copy.deepcopy(model).log_prob(X), before)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model)).log_prob(X), before)
    model.double()
    torch.testing.assert_close(model.log_prob(X.double()).float(), before)


def hooked(model):
    model._transform._transforms[2].register_forward_hook(lambda *_: None)
    return "has hooks, or a forward of its own", 1


def overridden(model):
    part = model._transform._transforms[2]
    part.forward = part.forward
    return "has hooks, or a forward of its own", 1


def subclassed(model):
    class Own(AdditiveCouplingTransform):
        pass

    model._transform._transforms[2].__class__ = Own
    return "a subclass, whose overrides would be lost", 1


def shared(model):
    model._transform._transforms.append(model._transform._transforms[2])
    return "shared: it is in the tree 2 times", 1


def shared_conditioner(model):
    parts = model._transform._transforms
    parts[0].transform_net = parts[2].transform_net
    return "shared: ", 2


def several_devices(model):
    part = model._transform._transforms[2]
    part.transform_features = part.transform_features.to("meta")
    return "on several devices: cpu, meta", 1


def method_of_its_own(model):
    part = model._transform._transforms[2]
    part._scale_and_shift = part._scale_and_shift
    return "it has a method of its own: _scale_and_shift", 1


def parametrized(model):
    part = model._transform._transforms[2]
    part.own = nn.Parameter(torch.zeros(2))
    nn.utils.parametrize.register_parametrization(part, "own", nn.Identity())
    return "a subclass, whose overrides would be lost", 1


def with_more(model):
    model._transform._transforms[2].unconditional_transform = nn.Identity()
    return "its conditioning features have a transform of their own", 1


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        overridden,
        subclassed,
        shared,
        shared_conditioner,
        several_devices,
        method_of_its_own,
        parametrized,
        with_more,
    ],
)
def test_what_would_be_lost_is_left_alone_and_said(change):
    model = flow()
    reason, count = change(model)
    kinds = [type(part) for part in model.modules()]
    report = nf.accelerate(model)
    assert len(report.replaced) == 3 - count
    assert len(report.left) == count
    assert all(reason in found.reason for found in report.left), report
    assert nf.restore(model) == 3 - count
    assert [type(part) for part in model.modules()] == kinds


def test_other_couplings_and_other_modules_are_left_alone():
    class Wide(Net):
        def __init__(self, a, b):
            super().__init__(a, b)

    model = CompositeTransform([AffineCouplingTransform([0, 1], Wide), nn.Linear(2, 2)])
    report = nf.accelerate(model)
    assert report.replaced == ()
    assert report.left == (("_transforms.0", "AffineCouplingTransform", "not additive"),)
    assert nf.accelerate(nn.Linear(2, 2)) == nf.accelerate(nn.ReLU())


def test_versions_that_are_not_known_are_left_alone(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.13.2")
    report = nf.accelerate(flow())
    assert not report.replaced
    assert "nflows 0.13.2 is not supported, from 0.14 to below 0.15 is" in str(report)


def test_a_library_without_a_version_is_left_alone(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "nflows is not installed as a package" in nf.accelerate(flow()).left[0].reason


def test_nothing_is_half_replaced(monkeypatch):
    from nicefast.compat import nflows as own

    seen, recognise = [], own.recognise

    def fails_at_the_last(part):
        seen.append(part)
        if len(seen) == 3:
            raise RuntimeError("at the last")
        return recognise(part)

    model = flow()
    kinds = [type(part) for part in model.modules()]
    monkeypatch.setattr(own, "recognise", fails_at_the_last)
    with pytest.raises(RuntimeError, match="at the last"):
        nf.accelerate(model)
    assert [type(part) for part in model.modules()] == kinds


def zuko_flow():
    zuko = pytest.importorskip("zuko", reason="needs zuko")
    options = {"univariate": zuko.transforms.AdditiveTransform, "shapes": [()]}
    return zuko.flows.NICE(6, transforms=3, hidden_features=(16,), **options)


@pytest.mark.parametrize("make", [flow, zuko_flow])
def test_an_optimiser_made_before_goes_on(make):
    log_prob = (lambda m: m.log_prob(X)) if make is flow else (lambda m: m().log_prob(X))
    first = make()
    optimizers = {}
    for when in ("never", "before", "between"):
        model = copy.deepcopy(first)
        optimizers[when] = (model, torch.optim.Adam(model.parameters(), lr=0.01))
    for step in range(6):
        for when, (model, optimizer) in optimizers.items():
            if (when, step) in (("before", 0), ("between", 3)):
                assert len(nf.accelerate(model).replaced) == 3
            optimizer.zero_grad()
            (-log_prob(model).mean()).backward()
            optimizer.step()
    expected = optimizers["never"][0].state_dict()
    for model, _ in optimizers.values():
        assert list(model.state_dict()) == list(expected)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    made = make()
    made.load_state_dict(optimizers["before"][0].state_dict())
    torch.testing.assert_close(log_prob(made), log_prob(optimizers["before"][0]))
    assert nf.restore(optimizers["before"][0]) == 3


@pytest.mark.parametrize("make", [flow, zuko_flow])
def test_the_operations_that_kernels_serve_give_the_same(make, monkeypatch):
    """Asked for as on a GPU; here their plain implementations answer."""
    from nicefast.compat import coupling

    before = make()
    after = copy.deepcopy(before)
    nf.accelerate(after)
    monkeypatch.setattr(coupling, "backend", SimpleNamespace(uses_kernels=lambda device: True))
    x, results = X.clone().requires_grad_(), []
    for model in (before, after):
        log_prob = model.log_prob(x) if make is flow else model().log_prob(x)
        inputs = [x, *model.parameters()]
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), inputs)))
    torch.testing.assert_close(*results)


def test_hooks_that_come_later_are_served():
    model = flow()
    nf.accelerate(model)
    seen = []
    part = model._transform._transforms[0]
    part.register_forward_hook(lambda *_: seen.append("coupling"))
    part.transform_net.register_forward_hook(lambda *_: seen.append("conditioner"))
    model.log_prob(X)
    assert seen == ["conditioner", "coupling"]
    assert nf.restore(model) == 3
    model.log_prob(X)
    assert len(seen) == 4


def test_only_modules_are_taken():
    for call in (nf.accelerate, nf.restore):
        with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got int"):
            call(3)


def test_compiling_breaks_no_more_than_before():
    model = flow()
    counts = []
    for fast in (False, True):
        if fast:
            nf.accelerate(model)
        torch._dynamo.reset()
        counts.append(torch._dynamo.explain(model.log_prob)(X).graph_break_count)
    assert counts[1] <= counts[0]
    before = model.log_prob(X)
    compiled = torch.compile(model.log_prob, backend="aot_eager")
    torch.testing.assert_close(compiled(X), before)
