"""Parameters that are cast once within a block of autocast: never out of date."""

import gc
import threading

import pytest
import torch

import nicefast as nf
from nicefast.fused import blockwise, casts, onepiece

X = torch.randn(40, 12)


@pytest.fixture(autouse=True)
def nothing_is_left_of_other_tests(monkeypatch):
    monkeypatch.setattr(casts, "_block", casts._Block())


def make(**options):
    model = nf.NICE(12, **{"hidden": (150, 140), "couplings": 3, **options})
    for coupling in model.couplings:
        coupling.conditioner.linears[-1].reset_parameters()
    return model


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def fresh(model, context=None):
    """In a block of its own."""
    with torch.no_grad(), autocast():
        return model.log_prob(X, context)


@pytest.mark.parametrize("options", [{}, {"context": 2}, {"hidden": (16,)}])
def test_a_block_casts_once(options):
    model = make(**options)
    context = torch.randn(40, 2) if model.context else None
    expected = fresh(model, context)
    with torch.no_grad(), autocast():
        for _ in range(4):
            assert torch.equal(model.log_prob(X, context), expected)
            z = model(X, context)[0]
            x = model.inverse(z, context)[0]
        chain = nf.choose_path(model, X, context).chain
        kept = casts.with_casts(chain)
        assert all(w.dtype == torch.bfloat16 for layers in kept.couplings for w, _ in layers)
        again = casts.with_casts(chain)
        for ours, theirs in zip(kept.couplings, again.couplings, strict=True):
            for (a, _), (b, _) in zip(ours, theirs, strict=True):
                assert a.data_ptr() == b.data_ptr()
    assert torch.allclose(x, X, atol=0.1)


def test_what_was_cast_goes_with_the_block_and_with_the_model():
    model, other = make(), make()
    with torch.no_grad(), autocast():
        model.log_prob(X)
        other.log_prob(X)
        assert len(casts._block.casts) == 2
        del other
        gc.collect()
        assert len(casts._block.casts) == 1
    with torch.no_grad():
        model.log_prob(X)
        assert not casts._block.casts


def change_in_place(model):
    with torch.no_grad():
        model.couplings[1].conditioner.linears[1].weight.mul_(1.5)


def change_state(model):
    state = {k: 1.1 * v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def change_data(model):
    linear = model.couplings[1].conditioner.linears[1]
    linear.weight.data = 1.5 * linear.weight.data


def change_parameter(model):
    linear = model.couplings[1].conditioner.linears[1]
    linear.weight = torch.nn.Parameter(1.5 * linear.weight.detach())


def step(fused):
    def change(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    return change


CHANGES = {
    "in place": change_in_place,
    "load_state_dict": change_state,
    "p.data": change_data,
    "another parameter": change_parameter,
    "a step": step(False),
    "a fused step": step(True),
}


@pytest.mark.parametrize("calls", range(4))
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_within_the_block_counts_at_once(change, calls):
    """However many calls came before it, and whatever had been cast before the first."""
    model = make()
    with torch.no_grad(), autocast():
        if calls == 0:
            model.couplings[1].conditioner(X[:, :6])  # autocast keeps this module's weights
        for _ in range(calls):
            model.log_prob(X)
        change(model)
        found = [model.log_prob(X) for _ in range(4)]
    expected = fresh(model)
    for log_prob in found:
        assert torch.equal(log_prob, expected)


def test_a_block_without_autocast_inside_leaves_what_was_cast():
    model = make()
    with torch.no_grad(), autocast():
        model.log_prob(X)
        chain = nf.choose_path(model, X).chain
        before = casts.with_casts(chain)
        with torch.autocast("cpu", enabled=False):
            model.log_prob(X)
        after = casts.with_casts(chain)
        assert after.couplings[0][0][0] is before.couplings[0][0][0]
    with torch.no_grad():
        model.log_prob(X)
    assert not len(casts._block.casts)  # outside nothing stays


def test_blocks_follow_each_other():
    model = make()
    for _ in range(5):
        with torch.no_grad(), autocast():
            found = [model.log_prob(X) for _ in range(3)]
        assert all(torch.equal(log_prob, fresh(model)) for log_prob in found)
        change_in_place(model)


def test_gradients_are_those_of_the_parameters():
    model = make()
    wanted = list(model.parameters())
    with autocast():
        expected = torch.autograd.grad(model.log_prob(X).mean(), wanted)
    with autocast():
        with torch.no_grad():
            for _ in range(3):
                model.log_prob(X)
        # what is kept must lead back to the parameters, for nicefast and for everybody else
        found = torch.autograd.grad(model.log_prob(X).mean(), wanted)
        conditioner = model.couplings[0].conditioner
        grads = torch.autograd.grad(conditioner(X[:, :6]).float().sum(), conditioner.parameters())
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
    assert all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("why", ["frozen", "inference", "no cache", "medium"])
def test_where_autocast_keeps_nothing(why):
    model = make()
    expected = fresh(model)
    if why == "frozen":
        model.requires_grad_(False)
    with (
        torch.inference_mode() if why == "inference" else torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, why != "medium", cache_enabled=why != "no cache"),
    ):
        if why == "medium":
            torch.set_float32_matmul_precision("medium")
        try:
            chain = nf.choose_path(model, X).chain
            for _ in range(3):
                assert torch.allclose(model.log_prob(X), expected, atol=0.1)
                assert casts.with_casts(chain) is chain
        finally:
            torch.set_float32_matmul_precision("highest")


def test_threads_throw_nothing_away(monkeypatch):
    """To leave a block of autocast, in any thread, is to throw away what was cast in all."""
    monkeypatch.setattr(blockwise, "LEAST_FLOPS", 0)
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", 256)
    monkeypatch.setattr(blockwise, "ROWS_PER_WIDTH", 0)
    monkeypatch.setattr(onepiece.OnePiece, "serves", lambda *_: False)
    model = make(hidden=(16,))
    with torch.no_grad(), autocast():
        before = casts._cast_of(casts._block.own)
        assert len(blockwise.cut(nf.choose_path(model, X).chain, 40, X.device)) > 1
        model.log_prob(X)
        assert casts._cast_of(casts._block.own).data_ptr() == before.data_ptr()


def held():
    return len(casts._block.casts)


@pytest.mark.parametrize("hidden", [(16,), (150, 140)])
def test_nothing_is_held_in_the_first_call_after_the_block(hidden):
    model = make(hidden=hidden)
    fresh(model)
    assert held() == 1
    model.log_prob(X).sum().backward()  # with gradients, too
    assert held() == 0


def test_parameters_can_be_swapped_after_a_block():
    model = make()
    expected = fresh(model)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
    assert torch.equal(fresh(model), expected)


def test_parameters_of_inference_mode_are_cast_each_time():
    with torch.inference_mode():
        model = make()
    expected = fresh(model)
    with torch.no_grad(), autocast():
        assert torch.equal(model.log_prob(X), expected)
        assert held() == 0


def test_a_block_is_its_own_threads():
    model, found = make(), []
    with torch.no_grad(), autocast():
        expected = model.log_prob(X)

        def without():
            with torch.no_grad():
                found.append(model.log_prob(X))

        thread = threading.Thread(target=without)
        thread.start()
        thread.join()
        assert held() == 1
        assert torch.equal(model.log_prob(X), expected)
    assert torch.equal(found[0], model.log_prob(X))
