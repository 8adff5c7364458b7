"""What every engine promises, and the layer path and frozen flows with them: one test for all.

``way`` is each of them in turn, see :class:`helpers.Way`; ``recording`` those with gradients.
"""

import gc
import multiprocessing
import sys
import threading
import weakref

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import nicefast as nf
from helpers import (
    Definition,
    Operators,
    assert_as_exact,
    make,
    partitions,
    strided,
)
from nicefast.engine import rows as rows_module

METHODS = ("log_prob", "forward", "inverse")


@pytest.fixture
def recording(way):
    if way.name == "frozen":
        pytest.skip("a frozen flow records no gradients")
    return way


@pytest.fixture
def in_threads(way):
    if way.interpreted:
        pytest.skip("Triton's interpreter is not for several threads")
    return way


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


def check(way, model, rows=40, factor=2.0):
    """Values and all gradients of ``rows`` rows are as near to float64's as the definition's."""
    define, flow = Definition(model), way.of(model)
    x, c = data(model, rows)
    with torch.no_grad():
        assert_as_exact(results(flow, x, c), *define(results, x, c), factor)
    if way.name != "frozen":
        x, c = data(model, rows, requires_grad=True)
        assert_as_exact(gradients(flow, x, c), *define(gradients, x, c), factor, pooled=True)


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
    check(way, make(7, device=device, **options))


@pytest.mark.parametrize("partition", partitions(6)[::2], ids=str)
def test_every_partition(way, device, partition):
    check(way, make(6, device=device, partition=partition, couplings=2, activation="tanh"))


@pytest.mark.parametrize("sides", ["0", "0110", "1011010"])
def test_couplings_in_any_order(way, device, sides):
    half = nf.Partition.half(5)
    own = [half if side == "0" else ~half for side in sides]
    options = {"couplings": len(own), "hidden": (9,), "activation": "silu"}
    check(way, make(5, device=device, partition=own, **options), rows=24)


@pytest.mark.parametrize("hidden", [(), (1,), (40, 24, 8)])
def test_any_hidden_layers(way, device, hidden):
    if way.name == "kernel" and not hidden:
        pytest.skip("no kernel without a hidden layer")
    check(way, make(6, device=device, hidden=hidden, activation="gelu"))


@pytest.mark.parametrize(("features", "width"), [(2, 64), (7, 16), (150, 64), (16, 500)])
def test_small_shifts_are_added_with_all_their_digits(way, device, features, width):
    if way.name == "kernel" and (width > 64 or features > 16):
        pytest.skip("too wide for the kernel")
    model = nf.NICE(features, hidden=(width,), couplings=3).to(device)
    for coupling in model.couplings:
        for p in coupling.conditioner.linears[-1].parameters():
            torch.nn.init.normal_(p, 0, 0.02)
    check(way, model, rows=100)


@pytest.mark.parametrize("activation", ["elu", "tanh", "silu", "gelu"])
def test_gradients_through_saturated_units(way, device, activation):
    """exp(-10) is not what 1 has lost beside it."""
    level = 3.0 if activation == "tanh" else -9.0  # 1 - y^2 it is in PyTorch, too
    model = make(4, device=device, hidden=(8, 8), couplings=2, activation=activation)
    with torch.no_grad():
        for coupling in model.couplings:
            coupling.conditioner.linears[0].bias.add_(level)
    check(way, model, rows=64, factor=2.5)


# rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
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


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
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
    model = make(6, device=device, context=2)
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
    model = make(6, device=device, activation="tanh")
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
    model = make((2, 3), device=device, context=2)
    flow = way.of(model)
    x, _ = data(model, 5, batch=(3,))
    for c in (torch.randn(5, 2), torch.randn(3, 1, 2), torch.randn(2), torch.randn(3, 5, 2)):
        for dtype in (torch.float32, torch.float16):
            own, rows = c.to(device, dtype), x.to(dtype)
            with torch.no_grad():
                found = flow.log_prob(rows, own)
                with nf.set_backend("reference"):
                    expected = model.log_prob(rows, own)
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            if way.name != "frozen":
                ends = rows.requires_grad_(), own.requires_grad_()
                grads = torch.autograd.grad(flow.log_prob(*ends).sum(), ends)
                with nf.set_backend("reference"):
                    known = torch.autograd.grad(model.log_prob(*ends).sum(), ends)
                for g, e in zip(grads, known, strict=True):
                    torch.testing.assert_close(
                        g, e, atol=2e-2 if g.dtype == torch.float16 else 1e-4, rtol=1e-2
                    )


# gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_gradients_and_of_many_at_once(recording, device, method):
    model = make(4, device=device, hidden=(5,), couplings=2, activation="tanh", context=1)
    flow, (x, c) = recording.of(model), data(model, 3, requires_grad=True)
    weight = model.couplings[0].conditioner.linears[0].weight

    def call(x, c, log_scale, weight):
        found = getattr(flow, method)(x, c)
        return found if method == "log_prob" else found[0]

    ends = x, c, model.scaling.log_scale, weight
    options = {"eps": 1e-2, "atol": 5e-2, "rtol": 5e-2}
    assert gradcheck(call, ends, check_batched_grad=True, **options)
    assert gradgradcheck(call, ends, check_batched_grad=True, **options)


def test_second_derivatives_are_those_of_float64(recording, device):
    model = make(4, device=device, activation="silu")
    define = Definition(model)
    x, _ = data(model, 20, requires_grad=True)

    def twice(flow, x):
        (grad,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves(flow, x))

    assert_as_exact(twice(recording.of(model), x), *define(twice, x), pooled=True)


def test_backward_twice_and_in_parts(recording, device):
    """A graph that is kept gives the same again; one that is not is refused, as PyTorch does."""
    model = make(6, device=device)
    flow, (x, _) = recording.of(model), data(model, 20, requires_grad=True)
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


@pytest.mark.parametrize("change", [lambda p: p.add_(1), lambda p: p[:1].zero_()])
@pytest.mark.parametrize(
    "name",
    [
        "couplings.0.conditioner.linears.0.weight",
        "couplings.2.conditioner.linears.1.bias",
        "scaling.log_scale",
    ],
)
def test_a_parameter_changed_before_its_gradient_is_an_error(recording, device, change, name):
    if recording.name == "layers" and name.endswith("bias"):
        pytest.skip("the gradient of a plain linear layer needs no bias")
    model = make(6, device=device)
    flow, (x, _) = recording.of(model), data(model, 5, requires_grad=True)
    value = flow.log_prob(x).sum()
    with torch.no_grad():
        change(model.get_parameter(name))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_nothing_is_computed_for_what_needs_no_gradient(recording, device):
    model = make(6, device=device, hidden=(16, 8), couplings=3)
    flow, (x, _) = recording.of(model), data(model, 8)
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
        again = 9 if recording.name == "recompute" else 0
        if recording.name not in ("blocks", "recompute"):
            assert found == products, wanted.shape
        assert found >= again
        wanted.grad = None
    assert not flow.log_prob(x).requires_grad


def test_tied_layers_and_couplings(recording, device):
    model = make(6, device=device, couplings=4, activation="tanh")
    model.couplings[2].conditioner = model.couplings[0].conditioner
    model.couplings[3].conditioner.linears[1] = model.couplings[1].conditioner.linears[1]
    model.couplings[3].conditioner.linears[0].bias = model.couplings[1].conditioner.linears[0].bias
    check(recording, model)


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


def test_inference_mode(way, device):
    model = make(6, device=device)
    x, _ = data(model, 20)
    with torch.no_grad():
        expected = results(way.of(model), x)
    with torch.inference_mode():
        inside = make(6, device=device)
        inside.load_state_dict(model.state_dict())
        for flow in (model, inside):
            for rows in (x, x.clone()):
                for f, e in zip(results(way.of(flow), rows), expected, strict=True):
                    assert torch.equal(f, e)
    if way.name != "frozen":
        assert results(way.of(model), x)[0].requires_grad


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


def test_modes_see_the_operations_and_change_no_bit(in_threads, device):
    model = make(6, device=device)
    flow, (x, _) = in_threads.of(model), data(model, 20)
    with torch.no_grad():
        expected = results(flow, x)
        with Operators() as operators:
            found = results(flow, x)
    assert len(operators.products()) >= 27
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


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


def test_eight_threads_at_once(in_threads, device):
    model = make(6, device=device, partition="random")
    flow, frozen = in_threads.of(model), in_threads.name == "frozen"
    xs = [data(model, 50 + i, requires_grad=not frozen)[0] for i in range(8)]
    call = results if frozen else gradients
    expected, found, begun = [call(flow, x) for x in xs], [None] * 8, threading.Barrier(8)

    def work(i):
        begun.wait(60)
        found[i] = [call(flow, xs[i]) for _ in range(5)]

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


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking with threads
def test_a_forked_child_computes_the_same(in_threads):
    model = make(6)
    flow, frozen = in_threads.of(model), in_threads.name == "frozen"
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
        x, _ = data(model, 6000, requires_grad=True)
        if limit == "asked for":
            model.recompute = recompute
        else:
            monkeypatch.setattr(rows_module, "RESIDUAL_BYTES", 0 if recompute else 1 << 30)
        with LiveBytes() as memory:
            value = model.log_prob(x).sum()
            kept = memory.live
            torch.autograd.grad(value, x)
        return kept, memory.peak

    few, many = peak(2, True), peak(16, True)
    assert many[0] == few[0]
    assert many[1] <= few[1] + (1 << 18)
    assert peak(16, False)[0] > 6000 * 16 * 2 * 32 * 4


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
    return found


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
