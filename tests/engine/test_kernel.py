"""The kernel engine: one launch for a call, few for packing, the same bits in every batch."""

from unittest import mock

import pytest
import torch

import nicefast as nf
from helpers import Operators, make

pytest.importorskip("triton", reason="needs Triton")

from nicefast.engine import kernel
from nicefast.kernels import INTERPRETED, flow, flow_resident
from nicefast.runtime import backend

pytestmark = pytest.mark.usefixtures("triton_backend")
KERNELS = ("flow_fwd_kernel", "flow_inv_kernel", "flow_sample_kernel")


def same(a, b):
    """The same bits; NumPy's products, which the interpreter takes, depend on a row's place."""
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5) if INTERPRETED else torch.equal(a, b)


def test_a_row_has_the_same_bits_in_every_batch(device):
    model = make(8, device=device, hidden=(32, 32), couplings=2)
    x = torch.randn(300, 8, device=device)
    with torch.no_grad():
        assert model.plan(x).name == "kernel"
        whole = model.log_prob(x), model(x)[0], model.inverse(x)[0]
        for rows in (slice(0, 1), slice(100, 107), slice(100, 229)):
            part = model.log_prob(x[rows]), model(x[rows])[0], model.inverse(x[rows])[0]
            for a, b in zip(whole, part, strict=True):
                assert same(a[rows], b)


def test_a_sample_does_not_depend_on_its_batches(device):
    model = make(6, device=device)

    def sample(batch_size=None):
        return model.sample(150, batch_size=batch_size, generator=torch.Generator().manual_seed(3))

    everything = sample()
    assert same(sample(70), everything)
    with nf.set_backend("reference"):
        assert torch.allclose(sample(), everything, atol=1e-4)


def test_one_launch_for_each_call_of_a_frozen_flow(device):
    model = make(6, device=device).frozen()
    x = torch.randn(5, 6, device=device)
    calls = {
        "flow_fwd_kernel": [lambda: model.log_prob(x), lambda: model.forward(x)],
        "flow_inv_kernel": [lambda: model.inverse(x)],
        "flow_sample_kernel": [lambda: model.sample(5)],
    }
    with torch.no_grad():
        for name, functions in calls.items():
            for function in functions:
                others = {k: mock.DEFAULT for k in KERNELS if k != name}
                with (
                    mock.patch.object(flow, name) as launches,
                    mock.patch.multiple(flow, **others) as untouched,
                    Operators() as operators,
                ):
                    function()
                assert launches.__getitem__.return_value.call_count == 1
                assert not any(m.mock_calls for m in untouched.values())
                others = {"mm", "addmm", "cat", "index_select", "add", "exp"}  # but isfinite
                assert not others & set(operators.seen)


def test_layouts_are_shared_by_flows_of_one_architecture(device):
    one, other = make(6, device=device), make(6, device=device)
    x = torch.randn(5, 6, device=device)
    engines = [m.plan(x).engine for m in (one, other, make(6, device=device, partition="half"))]
    for engine in engines:
        assert len(engine.packed) > 1
    layouts = [kernel._layout(e.stack, e.shape, e.tile) for e in engines]
    assert layouts[0] is layouts[1]
    assert layouts[2] is not layouts[0]


def test_what_a_capture_computes_is_not_kept(device, monkeypatch):
    """It is there in the capture's replays alone."""
    x = torch.randn(5, 6, device=device)
    model = make(6, device=device, partition=nf.Partition.random(6, seed=1234))
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "is_capturing", lambda _: True)
        before = set(kernel._layouts)
        assert len(model.plan(x).engine.packed) > 1
        assert set(kernel._layouts) == before
    assert len(model.plan(x).engine.packed) > 1
    assert len(kernel._layouts) == len(before) + 1


def test_training_saves_nothing_for_each_coupling_by_autograd(device):
    def saved(couplings):
        model = make(6, device=device, couplings=couplings)
        x, seen = torch.randn(50, 6, device=device), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            model.log_prob(x).sum().backward()
        return sum(t.numel() for t in seen) - sum(p.numel() for p in model.parameters())

    assert saved(2) == saved(5)


def test_explain_names_the_tile(device):
    said = make(6, device=device).explain(1000)
    assert said.startswith("kernel: ")
    assert "1000 rows in one launch, tiles of" in said
    assert "hidden layers padded to 32" in said


@pytest.mark.parametrize(
    ("precision", "products"), [("highest", "tf32x3"), ("high", "tf32"), ("medium", "bf16")]
)
def test_precision_is_the_user_s(device, precision, products):
    model, x = make(6, device=device), torch.randn(2, 6, device=device)
    torch.set_float32_matmul_precision(precision)
    try:
        chosen = model.plan(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    if INTERPRETED and products == "bf16":
        assert "interpreter" in chosen.reason
    else:
        assert chosen.engine.tile.products == products


@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
def test_a_small_flow_s_weights_stay_on_the_chip(device, partition):
    """In TF32, whatever a direction asks for, and whatever its context."""
    model = make(7, device=device, partition=partition, context=2, hidden=(12, 9), couplings=3)
    x, c = torch.randn(19, 7, device=device), torch.randn(19, 2, device=device)
    torch.set_float32_matmul_precision("high")
    try:
        assert "weights that stay on the chip, each side padded to 16" in model.explain(100)
        with torch.no_grad(), mock.patch.object(flow_resident, "run", wraps=flow_resident.run) as r:
            results = [model.log_prob(x, c), *model(x, c)[:1], *model.inverse(x, c)[:1]]
            generator = torch.Generator().manual_seed(3)
            results.append(model.sample(19, context=c, generator=generator))
        assert r.call_count == 4
    finally:
        torch.set_float32_matmul_precision("highest")
    with nf.set_backend("reference"), torch.no_grad():
        wanted = [model.log_prob(x, c), *model(x, c)[:1], *model.inverse(x, c)[:1]]
        generator = torch.Generator().manual_seed(3)
        wanted.append(model.sample(19, context=c, generator=generator))
    for got, exact in zip(results, wanted, strict=True):
        torch.testing.assert_close(got, exact, atol=2e-2, rtol=2e-2)


def test_a_scale_that_is_not_finite_is_an_error():
    """On the CPU: a GPU would have to be waited for."""
    model, x = make(6), torch.zeros(1, 6)
    with torch.no_grad(), nf.set_backend("triton" if INTERPRETED else "auto"):
        model.scaling.log_scale[2] = torch.inf
        calls = (model.log_prob, model, model.inverse, lambda x: model.sample(1))
        for call in (*calls, lambda x: model.frozen()):
            with pytest.raises(ValueError, match="log_scale must be finite, got inf at feature 2"):
                call(x)


# chips without tiles of their own ---------------------------------------------------------------


@pytest.fixture
def unknown(monkeypatch):
    """Makes this device one of an architecture that is newer than all that is known."""
    monkeypatch.setattr(backend, "architecture", lambda device: "sm_999")
    monkeypatch.setattr(kernel, "_trials", {})
    newest = backend.kernels().tiles_of("sm_999")
    return monkeypatch, newest


def test_a_newer_chip_takes_the_tiles_of_the_nearest_older_after_a_trial(unknown, device):
    monkeypatch, newest = unknown
    launches, run = [], backend.kernels().flow_fwd
    monkeypatch.setattr(
        backend.kernels(), "flow_fwd", lambda x, *rest: launches.append(len(x)) or run(x, *rest)
    )
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    found = model.plan(x)
    assert found.name == "kernel"
    assert launches == [1]
    said = f"sm_999 has no tiles of its own and takes those of {newest}, after a trial"
    assert said in found.reason
    assert said in model.explain().splitlines()[0]
    assert said in model.frozen().explain().splitlines()[0]
    assert found.engine.tile == model.plan(x).engine.tile
    with torch.no_grad():
        value = model.log_prob(x)
    assert launches == [1, 5], "one trial for each shape"
    with nf.set_backend("reference"), torch.no_grad():
        torch.testing.assert_close(value, model.log_prob(x), atol=1e-4, rtol=1e-4)
    assert make(6, device=device, hidden=(8,)).plan(x).name == "kernel"
    assert launches == [1, 5, 1]


@pytest.mark.parametrize("inverse", [False, True])
def test_a_chip_whose_trial_fails_takes_another_way_and_says_why(unknown, device, inverse):
    monkeypatch, newest = unknown
    tried = []

    def fail(*_):
        tried.append(1)
        raise RuntimeError("PTXAS error: unknown target\nand a page of assembly")

    monkeypatch.setattr(backend.kernels(), "flow_inv" if inverse else "flow_fwd", fail)
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    found = model.plan(x)
    assert found.name == ("layers" if INTERPRETED else "gemm")
    assert found.reason.endswith(
        f"sm_999 has no tiles of its own, and with those of {newest} a trial failed "
        "(RuntimeError: PTXAS error: unknown target)"
    )
    assert model.log_prob(x).isfinite().all()
    assert tried == [1]


def test_a_trial_without_memory_is_made_again(unknown, device):
    monkeypatch, _ = unknown
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(backend.kernels(), "flow_fwd", fail)
        with pytest.raises(torch.OutOfMemoryError):
            model.plan(x)
    assert model.plan(x).name == "kernel"
