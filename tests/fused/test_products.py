"""Couplings as products: values and gradients against float64, memory, products, threads."""

import contextlib
import copy
import itertools
import multiprocessing
import os

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import nicefast as nf
from helpers import Operators, assert_gradients, assert_three_way
from nicefast import devices
from nicefast.blocks import Blocks
from nicefast.fused import blockwise, calls, handful, onednn, onepiece, products, sideways
from nicefast.reference import ACTIVATIONS


@pytest.fixture(autouse=True)
def no_batch_is_a_handful(monkeypatch):
    monkeypatch.setattr(handful.Handful, "serves", staticmethod(lambda *_: False))


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Batches of these tests in one block, or in many that several threads compute."""
    if request.param == "many blocks":
        monkeypatch.setattr(blockwise, "BLOCK_BYTES", 8192)
        monkeypatch.setattr(sideways, "BLOCK_ELEMENTS", 2048)
        for module in (blockwise, sideways):
            monkeypatch.setattr(module, "LEAST_FLOPS", 0)
        monkeypatch.setattr(blockwise, "ROWS_PER_WIDTH", 0)


@pytest.fixture(params=["one piece", "rebuilt", "rebuilt row by row", "kept"])
def activations(request, monkeypatch):
    """``rebuilt``: by a narrow flow, its rows on their side; otherwise by products of rows."""
    if request.param == "one piece":
        return
    monkeypatch.setattr(onepiece.OnePiece, "serves", lambda *_: False)
    monkeypatch.setattr("nicefast.reading.REBUILD_WIDTH", 0 if request.param == "kept" else 10**6)
    if request.param == "rebuilt row by row":
        monkeypatch.setattr("nicefast.path._on_cpu", lambda *_: None)


def onednn_takes(monkeypatch, least):
    """Products of so many operations, whatever the rows and the processor."""
    for name in (n for n in vars(onednn) if "FLOPS" in n):
        monkeypatch.setattr(onednn, name, least)
    for name in ("ROWS", "ROWS_OF_NARROW", "WEIGHT_OF_FEW", "TURNED_ROWS_PER_WIDTH"):
        monkeypatch.setattr(onednn, name, 0)


def make(features=7, device="cpu", **options):
    model = nf.NICE(features, **{"hidden": (16, 24), "couplings": 3, **options})
    with torch.no_grad():
        model.scaling.log_scale.normal_(0, 0.3)
        for coupling in model.couplings:
            coupling.conditioner.linears[-1].reset_parameters()
    return model.to(device)


def inputs(model, n):
    device = model.scaling.log_scale.device
    x = torch.randn(n, model.features, device=device)
    return x, torch.randn(n, model.context, device=device) if model.context else None


def with_gradients(model, call, x, c, cotangent):
    x = x.detach().requires_grad_()
    c = None if c is None else c.detach().requires_grad_()
    value = call(model)(x, c)
    value = value[0] if isinstance(value, tuple) else value
    wanted = [x, *([] if c is None else [c]), *(p for p in model.parameters())]
    grads = torch.autograd.grad(value, wanted, cotangent.to(value.dtype), allow_unused=True)
    return value, [
        torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)
    ]


def check(model, call, n):
    x, c = inputs(model, n)
    shape = call(model)(x, c)
    cotangent = torch.randn_like(shape[0] if isinstance(shape, tuple) else shape)
    got = with_gradients(model, call, x, c, cotangent)
    with nf.set_backend("reference"):
        plain = with_gradients(model, call, x, c, cotangent)
    wide = copy.deepcopy(model).double()
    exact = with_gradients(wide, call, x.double(), None if c is None else c.double(), cotangent)
    assert_three_way(got[0], plain[0], exact[0])
    assert_gradients(got[1], plain[1], exact[1])


CALLS = [lambda m: m.log_prob, lambda m: m.forward, lambda m: m.inverse]


@pytest.mark.parametrize("call", CALLS, ids=["log_prob", "forward", "inverse"])
@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
@pytest.mark.parametrize("context", [0, 3])
def test_values_and_gradients(blocks, activations, device, call, partition, context):
    model = make(partition=partition, context=context, activation="tanh", device=device)
    for n in (0, 1, 50, 333):
        check(model, call, n)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(blocks, activations, device, activation):
    assert products.ACTIVATIONS.keys() == ACTIVATIONS.keys()
    check(make(activation=activation, context=2, device=device), lambda m: m.log_prob, 200)


def test_trained_weights(blocks, activations, device):
    """Moons-like data: a flow that has moved away from its start obeys the same rule."""
    model = make(4, activation="tanh", device=device)
    angle = 6.3 * torch.rand(400, 1, device=device)
    x = torch.cat((angle.sin(), angle.cos(), angle, angle.square()), 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model.log_prob(x).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = -model.log_prob(x + 0.05 * torch.randn_like(x)).mean()
        loss.backward()
        optimizer.step()
    assert model.log_prob(x).mean().item() > first + 1
    check(model, lambda m: m.log_prob, 300)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_products_by_onednn(monkeypatch, activations, activation, context):
    onednn_takes(monkeypatch, 0)
    model = make(40, hidden=(150, 100), activation=activation, context=context, partition="half")
    for call in CALLS:
        check(model, call, 300)


@pytest.mark.parametrize("amd", [False, True])
def test_products_of_training_are_onednn_s_sooner_where_mkl_is_not_at_home(monkeypatch, amd):
    monkeypatch.setattr(devices, "is_amd", lambda: amd)
    model, x = make(80, hidden=(500, 500), partition="half"), torch.randn(100, 80)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model.log_prob(x).sum().backward()
    names = [e.name for e in seen.events()]
    fused = names.count("mkldnn::_linear_pointwise") + names.count(
        "mkldnn::_linear_pointwise.binary"
    )
    assert (fused > 0) == (amd and onednn.linear_pointwise is not None)
    check(model, CALLS[0], 100)


@pytest.mark.parametrize("least", [0, 1 << 62], ids=["oneDNN", "no oneDNN"])
@pytest.mark.parametrize("hidden", [(16, 24), (160, 150)], ids=["narrow", "wide"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_are_never_lost(monkeypatch, activation, hidden, least):
    """A NaN in a conditioning feature reaches every shifted one, through every activation."""
    onednn_takes(monkeypatch, least)
    model = make(6, hidden=hidden, activation=activation, partition="half", couplings=1)
    x = torch.randn(20, 6)
    x[3, 1] = torch.nan
    with torch.no_grad():
        z, _ = model(x)
        assert z[3, 3:].isnan().all()
        assert z[[0, 1, 2, *range(4, 20)]].isfinite().all()
        assert model.log_prob(x).isnan().nonzero().flatten().tolist() == [3]
        model.couplings[0].conditioner.linears[0].weight[0, 0] = torch.nan
        assert model.log_prob(x).isnan().all()


@pytest.mark.parametrize("least", [0, 1 << 62], ids=["oneDNN", "no oneDNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", ["x", "infinite x", "weight", "bias", "overflow"])
def test_nan_is_never_lost_on_the_way_to_a_gradient(monkeypatch, activations, least, dtype, poison):
    """NaN of log_prob and of every gradient are where PyTorch alone has them."""
    if poison == "overflow" and dtype == torch.bfloat16:
        pytest.skip("instructions for bfloat16 may make -inf of inf - inf")
    onednn_takes(monkeypatch, least)
    model = make(6, hidden=(32, 40), partition="half", couplings=2)
    x = torch.randn(20, 6)
    first = model.couplings[0].conditioner.linears[0]
    with torch.no_grad():
        if poison == "x":
            x[3, 1] = torch.nan
        elif poison == "infinite x":
            x[3, 1] = torch.inf
        elif poison == "overflow":  # infinity less infinity
            x[3, :2] = torch.tensor([3e38, -3e38])
            first.weight[:, :2] = 100.0
        else:
            getattr(first, poison)[5] = torch.nan
    found = []
    for backend in ("auto", "reference"):
        inputs = [x.clone().requires_grad_(), *model.parameters()]
        with nf.set_backend(backend), torch.autocast("cpu", dtype, dtype == torch.bfloat16):
            log_prob = model.log_prob(inputs[0])
        assert log_prob.isnan().any()
        grads = torch.autograd.grad(log_prob[log_prob.isnan()].sum(), inputs)
        found.append([t.isnan() for t in (log_prob, *grads)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("tied", [False, True])
def test_nan_in_a_later_bias_is_never_lost(tied):
    model, x = nf.NICE(6, hidden=(64, 64, 64), couplings=2), torch.randn(4096, 6)
    linears = model.couplings[0].conditioner.linears
    if tied:
        linears[2].weight = linears[1].weight
    with torch.no_grad():
        linears[2].bias.fill_(torch.nan)
    assert model.log_prob(x).isnan().all()


def test_a_bound_does_not_vanish():
    """Weights whose squares are 0, and what they are multiplied with."""
    model = nf.NICE(64, hidden=(64,) * 4, couplings=2)
    x = torch.full((4096, 64), 3e37)
    with torch.no_grad():
        first, *others, _ = model.couplings[0].conditioner.linears
        for linear in (first, *others):
            linear.bias.zero_()
        first.weight.fill_(1e-24)
        for linear in others[:2]:
            linear.weight.copy_(1e17 * torch.randn(64, 64).sign())
    got = model.log_prob(x)
    with nf.set_backend("reference"):
        assert torch.equal(got.isnan(), model.log_prob(x).isnan())


@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
def test_the_default_dtype_is_no_matter(partition):
    model = make(partition=partition)
    for rows in (4, 2000):
        x = torch.randn(rows, 7)
        want = [
            *model(x)[:1],
            *torch.autograd.grad(model.log_prob(x).sum(), [model.scaling.log_scale]),
        ]
        torch.set_default_dtype(torch.float64)
        try:
            got = [
                *model(x)[:1],
                *torch.autograd.grad(model.log_prob(x).sum(), [model.scaling.log_scale]),
            ]
        finally:
            torch.set_default_dtype(torch.float32)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == torch.float32
            assert torch.allclose(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_too_large_for_relu_in_the_product(monkeypatch, dtype):
    """Then its zeros are PyTorch's, and so is the rest."""
    onednn_takes(monkeypatch, 0)
    model = make(6, hidden=(160, 150), partition="half", couplings=2)
    x = torch.randn(20, 6)
    x[7, 2] = 2 * products.LARGE
    grads = []
    for backend in ("auto", "reference"):
        with nf.set_backend(backend), torch.autocast("cpu", dtype, dtype == torch.bfloat16):
            log_prob = model.log_prob(x)
        grads.append(torch.autograd.grad(log_prob[:7].sum(), list(model.parameters())))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("least", [0, 1 << 62], ids=["oneDNN", "no oneDNN"])
def test_the_gradient_is_made_of_relu_s_own_zeros(monkeypatch, least):
    """What stands for them elsewhere would make denormal numbers of an optimizer's squares."""
    onednn_takes(monkeypatch, least)
    model = make(40, hidden=(150, 150), couplings=2)
    x = torch.randn(300, 40)
    chain = nf.choose_path(model, x).chain
    activations = blockwise.Activations(blockwise.cut(chain, len(x), x.device, training=True))
    with torch.no_grad():
        blockwise.couple(chain, x, None, False, activations)
    hidden = [h for kept in activations.kept[0] for h in kept.operands[1:]]
    assert len(hidden) == 4
    assert all((h >= 0).all() and (h == 0).any() for h in hidden)


@pytest.mark.parametrize("width", [30, 300])
def test_weights_are_never_out_of_date(width):
    """However a parameter is changed, also behind autograd's back, the next result has it."""
    model, x = make(hidden=(width, width)), torch.randn(5000, 7)

    def both():
        with torch.no_grad():
            got = model.log_prob(x)
            with nf.set_backend("reference"):
                assert torch.allclose(got, model.log_prob(x), rtol=1e-4, atol=1e-4)
            return got

    seen = [both()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    (-model.log_prob(x).mean()).backward()
    optimizer.step()
    seen.append(both())
    model.load_state_dict(make(hidden=(width, width)).state_dict())
    seen.append(both())
    for p in model.parameters():
        p.data.mul_(0.5)
    seen.append(both())
    model.couplings[0].conditioner.linears[1].weight = torch.nn.Parameter(torch.zeros(width, width))
    seen.append(both())
    model.to(torch.bfloat16).to(torch.float32)  # rounds
    seen.append(both())
    for a, b in itertools.pairwise(seen):
        assert not torch.equal(a, b)


class Saved:
    """Bytes of distinct tensors that autograd stores for the backward pass."""

    def __init__(self):
        self.storages = {}

    def pack(self, t):
        storage = t.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return t

    def of(self, call):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t):
            call()
        return sum(self.storages.values())


def test_memory_of_narrow_flows_does_not_grow_with_depth(monkeypatch):
    monkeypatch.setattr(onepiece, "KEPT_ELEMENTS", 1 << 20)
    x = torch.randn(4096, 8)  # more than a small batch
    saved = {}
    for couplings in (4, 64):
        model = nf.NICE(8, hidden=(32, 32), couplings=couplings)
        loss = []
        saved[couplings] = Saved().of(lambda m=model, k=loss: k.append(m.log_prob(x).mean()))
        node = loss[0].grad_fn
        nodes = [node]
        while nodes:  # nothing is kept on the side either
            node = nodes.pop()
            assert getattr(node, "activations", None) is None
            assert getattr(getattr(node, "left", None), "kept", None) is None
            nodes += [n for n, _ in node.next_functions if n is not None]
    assert saved[4] == saved[64]
    with nf.set_backend("reference"):
        grows = [
            Saved().of(lambda c=c: nf.NICE(8, hidden=(32, 32), couplings=c).log_prob(x))
            for c in (4, 64)
        ]
    assert grows[1] > 8 * grows[0] > 8 * saved[4]


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_small_batch_keeps_no_more_than_it_may(activation):
    """However many couplings: with more of them, fewer rows are few."""
    for couplings in (4, 64):
        model = nf.NICE(8, hidden=(32, 32), couplings=couplings, activation=activation)
        most = onepiece.KEPT_ELEMENTS // nf.choose_path(model, torch.zeros(1, 8)).chain.kept
        for rows, kind in ((most, onepiece.OnePiece), (most + 1, sideways.SidewaysFlow)):
            x = torch.randn(rows, 8)
            assert type(nf.choose_path(model, x).fused) is kind
        left = model.log_prob(x[:most]).grad_fn.left
        kept = {
            t.untyped_storage().data_ptr(): t.numel()
            for own in left.kept
            for t in own.operands + own.inputs
        }
        assert 0.8 * onepiece.KEPT_ELEMENTS < sum(kept.values()) <= onepiece.KEPT_ELEMENTS


@pytest.mark.parametrize("partition", ["half", "alternating"])
@pytest.mark.parametrize("features", [64, 784])
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 129), (8, 1000), (64, 256), (64, 1000), (1024, 256), (2000, 130)]
)
def test_a_wide_log_prob_is_products_and_three_kernels(partition, rows, features, width):
    """So many operators where a mode counts them; where none does, what follows the products is
    more calls that take less time."""
    model = nf.NICE(features, hidden=(width,) * 5, couplings=4, partition=partition)
    for coupling in model.couplings:
        coupling.conditioner.linears[-1].reset_parameters()
    x = torch.randn(rows, features)
    with torch.no_grad():
        with Operators() as operators:
            found = model.log_prob(x)
        with profile(activities=[ProfilerActivity.CPU]) as calls:
            unseen = model.log_prob(x)
        with nf.set_backend("reference"):
            plain = model.log_prob(x)
        exact = copy.deepcopy(model).double().log_prob(x.double())
        assert_three_way(found, plain, exact)
        assert_three_way(unseen, plain, exact)
    counted = operators.computing()
    assert len(operators.products()) == 4 * 6
    assert len(counted) <= 4 * 6 + 3, counted
    uncounted = Operators()
    uncounted.seen = [e.name.split("::")[1] for e in calls.events() if e.cpu_parent is None]
    assert len(uncounted.products()) == 4 * 6
    assert len(uncounted.computing()) < (4 if rows <= 64 else 2) * 4 * 6, uncounted.computing()


@pytest.mark.parametrize("partition", ["half", "alternating"])
@pytest.mark.parametrize(("rows", "width"), [(20_000, 200), (10_000, 600)])
def test_many_rows_are_as_few_operators(partition, rows, width):
    """Where nobody looks they go in blocks."""
    model = nf.NICE(6, hidden=(width,) * 5, couplings=4, partition=partition)
    x = torch.randn(rows, 6)
    with torch.no_grad():
        with Operators() as operators:
            found = model.log_prob(x)
        torch.testing.assert_close(found, model.log_prob(x))
    assert len(operators.products()) == 4 * 6
    assert len(operators.computing()) <= 4 * 6 + 3


def test_a_rebuilding_step_takes_at_most_a_third_more_products(monkeypatch):
    monkeypatch.setattr(onepiece.OnePiece, "serves", lambda *_: False)
    model = nf.NICE(8, hidden=(32, 32, 32), couplings=4)
    x = torch.randn(50, 8)

    def count():
        with Operators() as operators:
            torch.autograd.grad(model.log_prob(x).mean(), list(model.parameters()))
        return len(operators.products())

    rebuilt = count()
    with nf.set_backend("reference"):
        plain = count()
    assert plain < rebuilt <= 1.34 * plain


def test_the_same_bits_every_time(blocks, activations):
    model, (x, _) = make(), inputs(make(), 500)

    def step():
        loss = model.log_prob(x).mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    assert all(map(torch.equal, step(), step()))


def test_round_trip_is_no_worse_than_the_plain_one():
    model = make(16, hidden=(64, 64), couplings=8)
    x = torch.randn(2000, 16)
    with torch.no_grad():
        error = (model.inverse(model(x)[0])[0] - x).abs().max()
        with nf.set_backend("reference"):
            plain = (model.inverse(model(x)[0])[0] - x).abs().max()
    assert error <= 2 * plain


def test_second_derivatives(activations):
    model = make(4, hidden=(8,), activation="tanh", context=2)
    x, c = torch.randn(3, 4, requires_grad=True), torch.randn(3, 2, requires_grad=True)

    def curvature():
        (g,) = torch.autograd.grad(model.log_prob(x, c).sum(), x, create_graph=True)
        wanted = [x, c, *model.couplings.parameters()]
        return torch.autograd.grad(g.square().sum(), wanted, allow_unused=True)

    got = curvature()
    with nf.set_backend("reference"):
        want = curvature()
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        assert g is None or torch.allclose(g, w, atol=1e-4)


def test_threads_and_modes_may_change_between_the_passes(blocks, activations):
    model, (x, _) = make(activation="tanh"), inputs(make(), 500)
    before = torch.get_num_threads()

    def gradients(threads_then, mode):
        loss = model.log_prob(x).mean()
        torch.set_num_threads(threads_then)
        try:
            with mode:
                return torch.autograd.grad(loss, list(model.parameters()))
        finally:
            torch.set_num_threads(before)

    expected = gradients(before, contextlib.nullcontext())
    for threads in (1, 3, 4):
        for mode in (contextlib.nullcontext(), Operators()):
            for g, e in zip(gradients(threads, mode), expected, strict=True):
                assert torch.allclose(g, e, rtol=1e-4, atol=1e-6)


def test_couple_checks_its_arguments():
    model, (x, c) = make(context=2), inputs(make(context=2), 5)
    chain = nf.choose_path(model, x, c).chain
    for arguments, error, says in (
        ((x.double(), c), TypeError, "x must be float32"),
        ((x[:, :6], c), ValueError, r"x must have shape \(N, 7\)"),
        ((x, None), ValueError, "context must have 2 features, got none"),
        ((x, c[:4]), ValueError, r"context must have shape \(5, 2\)"),
        ((x.to("meta"), c), ValueError, "x must be on cpu"),
    ):
        with pytest.raises(error, match=says):
            calls.couple(chain, *arguments)


def test_a_parameter_changed_before_backward_is_an_error():
    model = make()
    loss = model.log_prob(torch.randn(5, 7)).sum()
    with torch.no_grad():
        model.couplings[0].conditioner.linears[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        loss.backward()


def test_bfloat16_products_are_as_good_as_autocast_s(blocks, activations):
    model = make(16, hidden=(64, 64), activation="tanh")
    x = torch.randn(400, 16)
    exact = copy.deepcopy(model).double().log_prob(x.double()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = model.log_prob(x)
        with nf.set_backend("reference"):
            plain = model.log_prob(x)
    assert got.dtype == torch.float32
    assert 0 < (got - exact).abs().max() <= 2 * (plain - exact).abs().max()
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_parameters_that_need_no_gradient():
    model = make()
    for p in model.couplings[0].parameters():
        p.requires_grad_(False)
    model.log_prob(torch.randn(5, 7)).sum().backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())
    x = torch.randn(5, 7, requires_grad=True)
    model.requires_grad_(False)
    model.log_prob(x).sum().backward()
    assert x.grad.isfinite().all()


def test_inference_mode(blocks):
    model = make()
    x = torch.randn(300, 7)
    with torch.inference_mode():
        inside = model.log_prob(x)
    with torch.no_grad():
        assert torch.equal(inside, model.log_prob(x))
    assert torch.allclose(inside, model.log_prob(x), rtol=1e-5, atol=1e-5)


def test_blocks_cover_all_rows_once():
    for rows in (0, 1, 7, 100, 4097):
        for most in (1, 3, 64, 10_000):
            for least in (0, 50):
                cut = Blocks(rows, most, least, torch.device("cpu"))
                covered = [r for i in range(len(cut)) for r in range(rows)[cut[i]]]
                assert covered == list(range(rows))
                assert cut.size <= most
                shares = cut.deal(list)
                assert sorted(i for s in shares for i in s) == list(range(len(cut)))


def test_an_error_in_a_block_is_the_caller_s():
    cut = Blocks(100, 10, 0, torch.device("cpu"))

    def work(share):
        raise ArithmeticError(f"block {share[0]}")

    with pytest.raises(ArithmeticError, match="block 0"):
        cut.deal(work)


def test_default_dtype_and_device_do_not_matter(blocks, activations):
    model, x = make(hidden=(16, 16)), torch.randn(300, 7)
    expected = model.log_prob(x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = model.log_prob(x)
            got.mean().backward()
            model.explain(rows=10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_tracers_see_the_operations(blocks):
    """Work in other threads would be a constant to them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x, other = make(), torch.randn(300, 7), torch.randn(300, 7)
    with torch.no_grad():
        expected = model.log_prob(other)
        traced = make_fx(lambda rows: model.log_prob(rows).neg())(x)
        assert torch.allclose(-traced(other), expected, atol=1e-4)


def test_a_forked_process_computes_too(blocks):
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this platform")
    model, x = make(), torch.randn(300, 7)
    with torch.no_grad():
        expected = model.log_prob(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child():
        torch.set_num_threads(1)
        with torch.no_grad():
            queue.put(torch.allclose(model.log_prob(x), expected, atol=1e-4))

    process = context.Process(target=child)
    process.start()
    assert queue.get(timeout=60)
    process.join(10)


def test_gradients_of_deep_flows_do_not_drift(activations):
    """Where going back through the couplings would lose all that was there."""
    model = make(8, couplings=64, hidden=(64, 64), partition="half")
    with torch.no_grad():
        for coupling in model.couplings:
            for linear in coupling.conditioner.linears:
                linear.weight.mul_(2)
    x = torch.randn(300, 8)
    with torch.no_grad():
        assert (model.inverse(model(x)[0])[0] - x).abs().max() > 1
    wide = copy.deepcopy(model).double()

    def gradients(model, x):
        return torch.autograd.grad(model.log_prob(x).mean(), list(model.parameters()))

    got, exact = gradients(model, x), gradients(wide, x.double())
    with nf.set_backend("reference"):
        plain = gradients(model, x)
    for g, p, e in zip(got, plain, exact, strict=True):
        off, allowed = ((t.double() - e).norm() / e.norm() for t in (g, p))
        # a unit within rounding of relu's kink may fall on its other side: one row's share at most;
        # what drifts is off by a thousand
        assert off <= 2 * allowed + 1 / len(x)
