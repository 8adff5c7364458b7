"""Rows on their side on the CPU, at the sizes where the way changes: few rows and many, widths."""

import copy

import pytest
import torch

import nicefast as nf
from helpers import assert_gradients, assert_three_way, make, strided
from nicefast import devices
from nicefast.blocks import Blocks
from nicefast.fused import calls, handful, onepiece, sideways
from nicefast.fused.chain import NARROW, RECORDED, SIDEWAYS


@pytest.fixture(autouse=True)
def batches_of_tests_are_large(monkeypatch):
    monkeypatch.setattr(devices, "is_amd", lambda: False)
    monkeypatch.setattr(onepiece, "KEPT_ELEMENTS", 1 << 21)
    monkeypatch.setattr(handful.Handful, "serves", staticmethod(lambda *_: False))


OPTIONS = [{}, {"context": 3}, {"activation": "gelu", "prior": "normal"}, {"partition": "random"}]


def gradients(model, x, c, cotangent):
    x = x.detach().requires_grad_()
    c = None if c is None else c.detach().requires_grad_()
    value = model.log_prob(x, c)
    wanted = [x, *([] if c is None else [c]), *model.parameters()]
    return [value.detach(), *torch.autograd.grad(value, wanted, cotangent.to(value.dtype))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 700, 10_000, 60_000], ids="{} rows".format)
def test_log_prob_and_its_gradient(options, rows):
    """Few rows in one piece, more in one block and in several, one thread and several.

    Smooth ones: one row at relu's kink would decide.
    """
    model = make(6, **{"hidden": (32, 24), "activation": "tanh", **options})
    x, cotangent = torch.randn(rows, 6), torch.randn(rows)
    c = torch.randn(rows, 3) if model.context else None
    assert nf.choose_path(model, x, c).differentiable is not None
    got = gradients(model, x, c, cotangent)
    with nf.set_backend("reference"):
        plain = gradients(model, x, c, cotangent)
    wide = None if c is None else c.double()
    exact = gradients(copy.deepcopy(model).double(), x.double(), wide, cotangent)
    assert_three_way(got[0], plain[0], exact[0])
    assert_gradients(got[1:], plain[1:], exact[1:])


@pytest.mark.parametrize("rows", [1, 300])
def test_log_prob_and_its_gradient_of_rows_on_their_side(monkeypatch, rows):
    monkeypatch.setattr(onepiece.OnePiece, "serves", lambda *_: False)
    for options in (*OPTIONS, {"hidden": (NARROW + 20, 24), "context": 3}):
        test_log_prob_and_its_gradient(options, rows)


def test_the_sizes_above_take_every_way():
    model = make(6, hidden=(32, 24))
    kinds = [type(nf.choose_path(model, torch.zeros(n, 6)).fused) for n in (700, 10_000, 60_000)]
    assert kinds == [onepiece.OnePiece, onepiece.OnePiece, sideways.SidewaysFlow]
    chain = nf.choose_path(model, torch.zeros(1, 6)).chain
    assert 60_000 * chain.flops > sideways.LEAST_FLOPS


def test_a_gradient_of_rows_that_overflows_in_a_sum_is_a_number(monkeypatch):
    """The same for every row, it is a factor of a sum's, where that is a number."""
    monkeypatch.setattr(onepiece.OnePiece, "serves", lambda *_: False)
    model = nf.NICE(2, hidden=(1,), couplings=1, prior="normal")
    first, last = model.couplings[0].conditioner.linears
    with torch.no_grad():
        for p, value in zip(
            (*first.parameters(), *last.parameters()), (3e34, 0, 1e4, 0), strict=True
        ):
            p.fill_(value)
    x = torch.tensor([[1e-34, 0.0]]).repeat(3, 1).requires_grad_()
    log_prob = model.log_prob(x)
    assert isinstance(nf.choose_path(model, x).fused, sideways.SidewaysFlow)
    (grad,) = torch.autograd.grad(log_prob, x, torch.full((3,), 1e-8))
    torch.testing.assert_close(grad, torch.tensor([[-9e34, -3e-4]]).repeat(3, 1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_wider_flows_lie_on_their_side_where_no_gradient_is_asked_for(options):
    """Up to SIDEWAYS hidden units; NaN and infinity in a row stay in it."""
    hidden = (NARROW + 60, 24)
    model, x = make(6, hidden=hidden, **options), torch.randn(9_001, 6)
    c = torch.randn(len(x), 3) if model.context else None
    x[5, 2], x[6, 3] = float("nan"), float("inf")
    sound = torch.ones(len(x), dtype=torch.bool).index_fill_(0, torch.tensor([5, 6]), False)
    wide = copy.deepcopy(model).double(), x.double(), None if c is None else c.double()
    with torch.no_grad():
        assert isinstance(nf.choose_path(model, x, c).fused, sideways.SidewaysFlow)
        for call in ("log_prob", "forward", "inverse"):
            got, exact = getattr(model, call)(x, c), getattr(wide[0], call)(*wide[1:])
            with nf.set_backend("reference"):
                plain = getattr(model, call)(x, c)
            if call != "log_prob":
                got, plain, exact = got[0], plain[0], exact[0]
            assert_three_way(got[sound], plain[sound], exact[sound])
            assert not got[~sound].reshape(2, -1).isfinite().all(1).any()


def test_flows_that_are_too_wide_do_not_lie_on_their_side():
    x = torch.zeros(1, 6).expand(100_000, 6)
    for width, kind in ((RECORDED, sideways.SidewaysFlow), (RECORDED + 1, onepiece.OnePiece)):
        assert type(nf.choose_path(make(6, hidden=(width,)), x).fused) is kind
    with torch.no_grad():
        widest = nf.choose_path(make(6, hidden=(SIDEWAYS,)), x).fused
        assert isinstance(widest, sideways.SidewaysFlow)
        assert nf.choose_path(make(6, hidden=(SIDEWAYS + 1,)), x).fused is None


@pytest.mark.parametrize("rows", [3_000, 60_000])
def test_recording_changes_no_bit(rows):
    model, x = make(6, hidden=(32, 24)), torch.randn(rows, 6)
    recorded = model.log_prob(x)
    with torch.no_grad():
        assert torch.equal(recorded, model.log_prob(x))


@pytest.mark.parametrize("rows", [5, 700])
def test_forward_inverse_and_log_prob_agree(rows):
    model, x = make(6, hidden=(32, 24)), torch.randn(rows, 6)
    with torch.no_grad():
        z, log_det = model(x)
        density = model.prior.log_prob(z).sum(1) + log_det
        assert torch.allclose(model.log_prob(x), density, atol=1e-4)
        assert torch.allclose(model.inverse(z)[0], x, atol=1e-4)


@pytest.mark.parametrize("kind", ["rows", "columns", "expanded"])
@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
def test_rows_may_lie_anyhow(kind, partition):
    model, x = make(6, partition=partition), strided(torch.randn(40, 6), kind)
    with torch.no_grad():
        assert torch.equal(model.log_prob(x), model.log_prob(x.contiguous()))


def test_a_gradient_may_be_asked_for_twice():
    """Going back leaves what was kept as it was."""
    model, x = make(6), torch.randn(30, 6)
    value = model.log_prob(x).sum()
    wanted = list(model.parameters())
    first = torch.autograd.grad(value, wanted, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, wanted)))


@pytest.mark.parametrize("few", [True, False])
def test_threads_may_come_between_a_batch_and_its_gradient(monkeypatch, few):
    monkeypatch.setattr(sideways, "LEAST_FLOPS", 0)
    monkeypatch.setattr(onepiece.OnePiece, "serves", lambda *_: few)
    model, x, before = make(6, activation="tanh"), torch.randn(300, 6), torch.get_num_threads()
    wanted = list(model.parameters())
    expected = torch.autograd.grad(model.log_prob(x).mean(), wanted)
    for then, now in ((1, 3), (3, 1)):
        torch.set_num_threads(then)
        try:
            value = model.log_prob(x).mean()
            torch.set_num_threads(now)
            got = torch.autograd.grad(value, wanted)
        finally:
            torch.set_num_threads(before)
        for g, e in zip(got, expected, strict=True):
            assert torch.allclose(g, e, rtol=1e-4, atol=1e-6)


@pytest.fixture
def in_blocks(monkeypatch):
    """Narrow rows on their side, several blocks in several threads."""
    monkeypatch.setattr(onepiece.OnePiece, "serves", lambda *_: False)
    monkeypatch.setattr(sideways, "LEAST_FLOPS", 0)
    monkeypatch.setattr(sideways, "BLOCK_ELEMENTS", 1 << 10)


def is_at_once(value):
    """Whether log_prob has gone back already: whether its gradient is known."""
    return value.grad_fn.left.of_sum is not None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("width", [32, NARROW + 2])
def test_training_goes_forwards_and_back_at_once(in_blocks, width, options):
    """From the third step on; with the same bits, and only where the gradient allows it."""
    model = make(6, hidden=(width, 24), **options)
    x = torch.randn(301, 6, requires_grad=True)
    c = torch.randn(301, 3, requires_grad=True) if model.context else None
    wanted = [x, *([] if c is None else [c]), *model.parameters()]
    seen = []
    for at_once in (False, False, True, True):
        value = model.log_prob(x, c)
        assert is_at_once(value) == at_once
        assert (value.grad_fn.left.kept is not None) == (width > NARROW and not at_once)
        seen.append((value.detach(), *torch.autograd.grad(value.mean(), wanted)))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    with nf.set_backend("reference"):
        plain = torch.autograd.grad(model.log_prob(x, c).mean(), wanted)
    for g, p in zip(seen[0][1:], plain, strict=True):
        assert torch.allclose(g, p, rtol=1e-3, atol=1e-5)

    value, cotangent = model.log_prob(x, c), torch.randn(301)
    assert is_at_once(value)  # in vain: every row has another gradient
    got = torch.autograd.grad(value, wanted, cotangent, retain_graph=True)
    assert not is_at_once(model.log_prob(x, c))
    with nf.set_backend("reference"):
        plain = torch.autograd.grad(model.log_prob(x, c), wanted, cotangent)
    for g, p in zip(got, plain, strict=True):
        assert torch.allclose(g, p, rtol=1e-3, atol=1e-4)
    twice = [torch.autograd.grad(value.sum(), wanted, retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *twice))


def train(model, x, steps=2):
    for _ in range(steps):
        model.log_prob(x).sum().backward()


def test_values_that_nobody_learns_from_do_not_go_back(in_blocks):
    model, x = make(6), torch.randn(100, 6)
    train(model, x)
    assert is_at_once(model.log_prob(x))
    assert not is_at_once(model.log_prob(x))
    with torch.no_grad():
        assert model.log_prob(x).grad_fn is None
    for _ in range(3):  # one to learn from, one to look at, in turn
        value = model.log_prob(x)
        assert not is_at_once(value)
        value.sum().backward()
        assert not is_at_once(model.log_prob(x))


def test_at_once_or_not_a_parameter_must_not_change_before_its_gradient(in_blocks):
    model, x = make(6), torch.randn(100, 6)
    weight = model.couplings[0].conditioner.linears[0].weight
    for at_once in (False, True):
        value = model.log_prob(x)
        assert is_at_once(value) == at_once
        with torch.no_grad():
            weight.add_(0.1)
        with pytest.raises(RuntimeError, match="modified"):
            value.sum().backward()
        train(model, x)


def test_second_derivatives_when_training_goes_at_once(in_blocks):
    model, x = make(4, hidden=(8,), activation="tanh"), torch.randn(30, 4)
    log_scale = model.scaling.log_scale

    def curvature():
        value = model.log_prob(x)
        (g,) = torch.autograd.grad(value.sum(), log_scale, create_graph=True)
        return value, torch.autograd.grad(g.square().sum(), list(model.couplings.parameters()))

    train(model, x)
    value, got = curvature()
    assert is_at_once(value)
    with nf.set_backend("reference"):
        assert all(
            torch.allclose(*pair, atol=1e-4) for pair in zip(got, curvature()[1], strict=True)
        )


def test_a_gradient_that_is_no_factor_of_the_sum_s(in_blocks):
    """Nothing times what overflows is nothing, and little of it may still be a number."""
    model, x = make(6, prior="normal", hidden=(8,)), torch.randn(301, 6)
    wanted = list(model.parameters())
    for data, cotangent in ((x.index_fill(0, torch.tensor(0), 1e30), 0.0), (x * 1e18, 1e-6)):
        got = torch.autograd.grad(model.log_prob(data), wanted, torch.full((301,), cotangent))
        with nf.set_backend("reference"):
            want = torch.autograd.grad(model.log_prob(data), wanted, torch.full((301,), cotangent))
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g.isfinite(), w.isfinite())


def test_second_derivatives_of_log_scale():
    model, x = make(4, hidden=(8,), activation="tanh"), torch.randn(3, 4)
    log_scale = model.scaling.log_scale

    def curvature():
        (g,) = torch.autograd.grad(model.log_prob(x).sum(), log_scale, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [log_scale, *model.couplings.parameters()])

    got = curvature()
    with nf.set_backend("reference"):
        assert all(torch.allclose(g, w, atol=1e-4) for g, w in zip(got, curvature(), strict=True))


def test_a_log_scale_that_is_not_finite_is_an_error():
    model, x = make(6), torch.randn(3, 6)
    with torch.no_grad():
        model.scaling.log_scale[2] = torch.inf
    for call in (model.log_prob, model.forward, model.inverse):
        with pytest.raises(ValueError, match="log_scale must be finite, got inf at feature 2"):
            call(x)


@pytest.mark.parametrize("name", ["x", "context", "log_scale"])
def test_flow_log_prob_checks_its_arguments(name):
    model = make(6, context=2)
    given = {"x": torch.randn(5, 6), "context": torch.randn(5, 2), "log_scale": torch.zeros(6)}
    found = nf.choose_path(model, given["x"], given["context"]).fused
    assert calls.flow_log_prob(found, **given).shape == (5,)
    with pytest.raises(ValueError, match=f"^{name} must have"):
        calls.flow_log_prob(found, **{**given, name: given[name][..., :-1]})


def test_blocks_are_handed_out_once_each():
    for rows in (0, 1, 1000):
        cut, seen = Blocks(rows, 10, 0, torch.device("cpu")), []
        cut.hand_out(seen.extend)
        assert sorted(seen) == list(range(len(cut)))

    def work(blocks):
        raise ArithmeticError(f"block {next(iter(blocks))}")

    with pytest.raises(ArithmeticError, match="block"):
        Blocks(100, 10, 0, torch.device("cpu")).hand_out(work)
