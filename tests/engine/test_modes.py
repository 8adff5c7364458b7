"""The contract of test_engine_contract.py in modes, threads and processes, and with memory."""

import gc
import multiprocessing
import sys
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nicefast as nf
from helpers import Operators, make
from nicefast.engine import rows as rows_module
from ways import Definition, assert_as_exact, data, gradients, results, ways

# modes ------------------------------------------------------------------------------------------


def test_autocast_to_bfloat16(way, device):
    if way.name == "kernel" and way.interpreted:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    model = make(6, device=device, hidden=(32, 32), activation="tanh", context=2)
    x, c = data(model, 60, requires_grad=way.name != "frozen")

    def call(flow, x, c):
        return results(flow, x, c) + (gradients(flow, x, c) if x.requires_grad else ())

    with torch.autocast(device.type, torch.bfloat16):
        found = call(way.of(model), x, c)
        plain, _ = Definition(model)(call, x, c)
    _, exact = Definition(model)(call, x, c)
    for values in (found, plain):
        assert {v.dtype for v in values} == {torch.float32}
    assert_as_exact(found, plain, exact, pooled=True)


@ways("rows", "onednn", "kernel", "gemm", "layers", "frozen")
@pytest.mark.parametrize(("level", "atol"), [("highest", 1e-5), ("high", 5e-3), ("medium", 0.3)])
def test_the_precision_of_products_is_the_user_s(way, device, level, atol):
    if way.name == "kernel" and way.interpreted and level == "medium":
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    model = make(6, device=device, hidden=(32, 32))
    x, _ = data(model, 30)
    with torch.no_grad():
        with nf.set_backend("reference"):
            expected = results(model, x)
        torch.set_float32_matmul_precision(level)
        try:
            found = results(way.of(model), x)
        finally:
            torch.set_float32_matmul_precision("highest")
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, atol=atol, rtol=atol)


@ways("rows", "blocks", "kernel", "gemm", "layers", "frozen")
def test_inference_mode(way, device):
    model = make(6, device=device)
    x, _ = data(model, 20)
    with torch.no_grad():
        expected = results(way.of(model), x)
    with torch.inference_mode():
        inside = make(6, device=device)
        inside.load_state_dict(model.state_dict())
        for flow in (model, inside):
            rows = x if flow is model else x.clone()
            for f, e in zip(results(way.of(flow), rows), expected, strict=True):
                assert torch.equal(f, e)
    if way.name != "frozen":
        assert results(way.of(model), x)[0].requires_grad


@ways("rows", "onednn", "blocks", "recompute", "kernel", "gemm", "layers", "frozen")
@pytest.mark.parametrize("call", [results, gradients])
def test_other_defaults_and_memory_that_holds_anything(way, device, call, monkeypatch):
    """Neither the default dtype or device, nor what new memory holds, is in any result."""
    if call is gradients and way.name == "frozen":
        return
    model = make(6, device=device, partition="random", context=2)
    flow, (x, c) = way.of(model), data(model, 20, requires_grad=call is gradients)
    expected = call(flow, x, c)

    def same():
        for f, e in zip(call(flow, x, c), expected, strict=True):
            assert torch.equal(f, e)

    torch.set_default_dtype(torch.float64)
    try:
        same()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        same()
    real = torch.empty

    def empty(*size, **options):
        made = real(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(77)

    monkeypatch.setattr(torch, "empty", empty)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        same()
    finally:
        torch.use_deterministic_algorithms(False)


@ways("rows", "onednn", "layers", "frozen")
def test_modes_see_the_operations_and_change_no_bit(way, device):
    model = make(6, device=device)
    flow, (x, _) = way.of(model), data(model, 20)
    with torch.no_grad():
        expected = results(flow, x)
        with Operators() as operators:
            found = results(flow, x)
    assert len(operators.products()) >= 27
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


@ways("rows", "kernel", "gemm", "frozen")
def test_transformations_and_compilers_get_layers(way, device):
    model = make(6, device=device, activation="tanh")
    flow, (x, _) = way.of(model), data(model, 5)
    with nf.set_backend("reference"), torch.no_grad():
        expected = model.log_prob(x)
    assert torch.allclose(torch.func.vmap(flow.log_prob)(x), expected, atol=1e-4)
    compiled = torch.compile(flow.log_prob, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), expected, atol=1e-4)
    value, tangent = torch.func.jvp(flow.log_prob, (x,), (torch.ones_like(x),))
    with nf.set_backend("reference"):
        own = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model.log_prob(own).sum(), own)
    assert torch.allclose(value, expected, atol=1e-4)
    assert torch.allclose(tangent, grad.sum(1), atol=1e-3, rtol=1e-3)
    if way.name != "frozen":
        each = torch.func.vmap(torch.func.grad(flow.log_prob))(x)
        assert torch.allclose(each, grad, atol=1e-3, rtol=1e-3)


# threads and memory -----------------------------------------------------------------------------


@ways("rows", "blocks", "layers", "frozen")
def test_eight_threads_at_once(way, device):
    model = make(6, device=device, partition="random")
    flow, frozen = way.of(model), way.name == "frozen"
    xs = [data(model, 50 + i, requires_grad=not frozen)[0] for i in range(8)]
    call = results if frozen else gradients
    expected, found, begun = [call(flow, x) for x in xs], [None] * 8, threading.Barrier(8)

    def work(i):
        begun.wait(60)
        found[i] = [call(flow, xs[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for own, known in zip(found, expected, strict=True):
        for values in own:
            assert all(torch.equal(f, e) for f, e in zip(values, known, strict=True))


def _in_a_child(queue, flow, x, call):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    queue.put([t.detach().tolist() for t in call(flow, x)])


@ways("rows", "layers", "frozen")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking with threads
def test_a_forked_child_computes_the_same(way):
    model = make(6)
    flow, frozen = way.of(model), way.name == "frozen"
    call = results if frozen else gradients
    x, _ = data(model, 50, requires_grad=not frozen)
    expected = call(flow, x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue, flow, x, call))
    child.start()
    try:
        for f, e in zip(queue.get(timeout=60), expected, strict=True):
            torch.testing.assert_close(torch.tensor(f), e.detach())
        child.join(60)
    finally:
        child.kill()


class LiveBytes(TorchDispatchMode):
    """The bytes of memory that operations under this mode have made and that still lives."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self._count(t.untyped_storage(), given)
        return out

    def _count(self, storage, given):
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._known.discard(key)
        self.live -= size


@pytest.mark.parametrize("limit", ["asked for", "too large"])
def test_memory_does_not_grow_with_the_number_of_couplings(device, monkeypatch, limit):
    """Where residuals are recomputed; where they are saved, the mode does see them."""
    monkeypatch.setattr(rows_module, "RECOMPUTED_BYTES", dict.fromkeys(("cpu", "cuda"), 1 << 18))

    def peak(couplings, recompute):
        model = make(6, device=device, hidden=(32, 32), couplings=couplings).requires_grad_(False)
        x, _ = data(model, 3000, requires_grad=True)
        if limit == "asked for":
            model.recompute = recompute
        else:
            monkeypatch.setattr(rows_module, "RESIDUAL_BYTES", 0 if recompute else 1 << 30)
        with LiveBytes() as memory:
            value = model.log_prob(x).sum()
            kept = memory.live
            torch.autograd.grad(value, x)
        return kept, memory.peak

    few, many = peak(2, True), peak(9, True)
    assert many[0] == few[0]
    assert many[1] <= few[1] + (1 << 18)
    assert peak(9, False)[0] > 3000 * 9 * 2 * 32 * 4


def sizes():
    """Of every collection and every cache of functions that is global in the library."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "nicefast" and ".kernels" not in name:
            for key, value in list(vars(module).items()):
                if isinstance(value, dict | list | set) and not key.startswith("__"):
                    found[name, key] = len(value)
                elif hasattr(value, "cache_info"):
                    found[name, key] = value.cache_info().currsize
    found.pop(("nicefast.engine.kernel", "_layouts"))  # constants, one table for an architecture
    found.pop(("nicefast.engine.plan", "_tile_of"))  # results of a function of widths alone
    return found


@ways("rows", "onednn", "recompute", "kernel", "gemm", "layers", "frozen")
def test_nothing_is_kept_between_calls(way, device):
    def use(features):
        model = make(features, device=device, activation="tanh")
        before = [dict(vars(m)) for m in model.modules()]
        flow = way.of(model)
        x, _ = data(model, 10, requires_grad=way.name != "frozen")
        call = results if way.name == "frozen" else gradients
        call(flow, x)
        flow.sample(3)
        for module, own in zip(model.modules(), before, strict=True):
            changed = {k for k, v in vars(module).items() if k not in own or v is not own[k]}
            assert changed <= {"recompute"}  # that the test sets
        gone = [weakref.ref(t) for t in (model, *model.parameters(), x)]
        del model, flow, x, before, call, module, own
        gc.collect()
        assert not any(ref() is not None for ref in gone)

    use(6)
    before = sizes()
    use(5)
    assert sizes() == before
