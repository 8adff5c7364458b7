"""Frozen flows: what they are besides a way through a flow (test_engine_contract.py, test_modes.py)
that no change reaches (test_changes.py)."""

import copy
import gc
import pickle
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.nn.utils import parametrizations, prune

import nicefast as nf
from helpers import Recorder, make
from nicefast.engine import frozen as module
from nicefast.runtime import backend
from ways import results


@pytest.fixture
def captured(monkeypatch):
    """Freezes a flow whose calls are captured, ``batch`` rows at a time."""
    recorder = Recorder.install(monkeypatch)

    return lambda model, batch: (model.frozen(batch), recorder)


def same(found, expected):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("batch", [None, 4])
def test_any_number_of_rows(captured, device, context, batch):
    model = make((2, 3), device=device, context=context)
    flow, recorder = captured(model, batch) if batch else (model.frozen(), None)
    with torch.no_grad():
        for rows in (0, 1, 4, 9, 3):
            x = torch.randn(rows, 2, 3, device=device)
            c = torch.randn(rows, context, device=device) if context else None
            same(results(flow, x, c), results(model, x, c))
        x = torch.randn(3, 5, 2, 3, device=device)
        c = torch.randn(5, context, device=device) if context else None
        same(results(flow, x, c), results(model, x, c))
    assert recorder is None or recorder.captures == 3  # of each method, once
    x[0, 0, 0] = torch.nan
    assert flow.log_prob(x, c)[0, 0].isnan()
    assert flow.log_prob(x[1:], c).isfinite().all(), "NaN of an earlier batch"


def test_an_earlier_result_of_a_captured_call_stays(captured, device):
    flow, _ = captured(make(6, device=device), 8)
    first = flow.log_prob(torch.zeros(8, 6, device=device))
    kept = first.clone()
    flow.log_prob(torch.ones(8, 6, device=device))
    assert torch.equal(first, kept)


def test_captured_calls_in_threads(captured, device):
    model = make(6, device=device)
    flow, recorder = captured(model, 16)
    xs = [torch.randn(40, 6, device=device) for _ in range(8)]
    found = [None] * 8

    def work(i):
        found[i] = flow.log_prob(xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    with torch.no_grad():
        same(found, [model.log_prob(x) for x in xs])
    assert recorder.captures == 1


def test_the_log_determinant_is_the_caller_s_own(device):
    flow, x = make(6, device=device).frozen(), torch.randn(3, 6, device=device)
    for call in (flow.forward, flow.inverse):
        expected = call(x)[1].clone()
        call(x)[1].add_(1)
        call(x[:1])[1].add_(1)
        assert torch.equal(call(x)[1], expected)


@contextmanager
def watched(name):
    """Calls ``call(x)`` where something sees or changes each operation."""
    if name == "reference":
        with nf.set_backend("reference"):
            yield lambda call, x: call(x)
    elif name == "vmap":
        yield lambda call, x: torch.vmap(call)(x[None])
    elif name == "dual":
        yield lambda call, x: torch.func.jvp(call, (x,), (x,))
    elif name == "jit":
        yield lambda call, x: torch.jit.trace(call, x, check_trace=False)
    elif name == "fx":
        from torch.fx.experimental.proxy_tensor import make_fx

        yield lambda call, x: make_fx(lambda x: call(x, None), pre_dispatch=True)(x)
    elif name == "compile":
        yield lambda call, x: torch.compile(call, backend="eager", fullgraph=True)(x)
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            yield lambda call, x: call(x)


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize(
    "name", ["reference", "vmap", "dual", "jit", "fx", "compile", "fake"]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_sees_every_operation_is_never_passed_by(captured, device, name, batch):
    model, x = make(6, device=device), torch.randn(4, 6, device=device)
    flow = captured(model, batch)[0] if batch else model.frozen()
    seen = []
    flow._plan.engine.__dict__["log_prob"] = lambda *_: seen.append(1) or x.sum(1)
    flow.log_prob(x)
    assert seen == [1]
    with watched(name) as call, torch.no_grad():
        call(flow.log_prob, x)
    assert seen == [1]


def test_gradients_are_an_error_that_says_what_to_do(device):
    model = make(6, device=device, context=2)
    flow, x, c = model.frozen(), torch.zeros(3, 6, device=device), torch.zeros(3, 2, device=device)
    assert not flow.log_prob(x, c).requires_grad
    for given in ((x.clone().requires_grad_(), c), (x, c.clone().requires_grad_())):
        for method in ("log_prob", "forward", "inverse"):
            with pytest.raises(ValueError, match="records no gradients"):
                getattr(flow, method)(*given)
        with torch.no_grad():
            assert not flow.log_prob(*given).requires_grad
    with pytest.raises(ValueError, match="batch must be an integer >= 1, got 0"):
        model.frozen(0)
    with pytest.raises(ValueError, match="x must have shape"):
        flow.log_prob(x[:, :5], c)
    with pytest.raises(ValueError, match="context"):
        flow.log_prob(x)


def test_copies_and_pickles(device):
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    flow = model.frozen()
    expected = results(flow, x)
    with torch.no_grad():
        model.scaling.log_scale.add_(1)
    for twin in (copy.deepcopy(flow), copy.copy(flow), pickle.loads(pickle.dumps(flow))):
        for f, e in zip(results(twin, x), expected, strict=True):
            assert torch.equal(f, e)
        assert twin.batch is None
        assert repr(twin) == repr(flow)
        assert twin.explain(1000) == flow.explain(1000)
    assert "frozen" in flow.explain()


def test_flows_that_no_engine_computes(device):
    """Exact, float64, hooked, pruned, unknown conditioners: as the flow itself."""
    x, seen = torch.randn(5, 6, device=device), []
    exact = make(6, device=device).with_grid(2**-10)
    same([exact.frozen().cell_log_prob(x)], [exact.cell_log_prob(x)])
    hooked = make(6, device=device)
    hooked.couplings[0].register_forward_hook(lambda *_: seen.append(1))
    unknown = make(6, device=device)
    unknown.couplings[1].conditioner = torch.nn.Linear(3, 3).to(device)
    pruned, weighted = make(6, device=device), make(6, device=device)
    prune.l1_unstructured(pruned.couplings[0].conditioner.linears[0], "weight", 0.5)
    parametrizations.weight_norm(weighted.couplings[0].conditioner.linears[0])
    for model in (exact, make(6, device=device).double(), hooked, unknown, pruned, weighted):
        found = results(model, x.to(model.dtype))  # in a pruned layer, this leaves a graph
        flow = model.frozen()
        assert flow.dtype == model.dtype
        same(results(flow, x.to(model.dtype)), [f.detach() for f in found])
    assert len(seen) == 4  # inverse has no hook
    float64 = make(6, device=device).frozen()
    assert float64.log_prob(x.double()).dtype == torch.float64


def test_samples_dropout_and_the_precision_in_force(device):
    model = make(6, device=device, dropout=0.5).train()
    flow, x = model.frozen(), torch.randn(50, 6, device=device)
    assert model.training
    assert torch.equal(flow.log_prob(x), flow.log_prob(x))
    model.eval()
    drawn = [f.sample(5, generator=torch.Generator().manual_seed(0)) for f in (flow, model)]
    same(*([d] for d in drawn))
    with torch.autocast(device.type, torch.bfloat16):
        narrow = model.frozen()
    with torch.no_grad():
        assert not torch.equal(narrow.log_prob(x), flow.log_prob(x))
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(narrow.log_prob(x), model.log_prob(x))


def test_nothing_is_read_cast_or_packed_in_a_call(device, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton")
    x = torch.randn(5, 6, device=device)
    with nf.set_backend("triton"):
        flows = make(6, device=device).frozen(), make(6, device=device, hidden=(300,)).frozen()
        expected = [f.log_prob(x) for f in flows]

        def fail(*_):
            raise AssertionError

        monkeypatch.setattr(backend.kernels(), "pack", fail)
        monkeypatch.setattr(module, "plan", fail)
        monkeypatch.setattr("nicefast.flow.plan_call", fail)
        for flow, e in zip(flows, expected, strict=True):
            assert torch.equal(flow.log_prob(x), e)


def test_a_counter_of_operations_counts_a_frozen_flows_products():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = make(6), torch.randn(50, 6)
    counts = []
    for flow in (model, model.frozen()):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            flow.log_prob(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 50 * model.plan(x).engine.stack.flops


def test_it_ends_with_its_last_reference():
    """Its weights do not wait for the garbage collector: they may be a GPU's."""
    frozen = make(6).frozen()
    weight = weakref.ref(frozen._flow.couplings[0])
    gc.disable()
    try:
        del frozen
        assert weight() is None
    finally:
        gc.enable()
