"""Few rows on their side in one piece: the same numbers, for whom, and nothing of the user's is
written over."""

import copy

import pytest
import torch

import nicefast as nf
from helpers import Operators, assert_three_way, make, strided
from nicefast import devices
from nicefast.fused import handful
from nicefast.fused.few import AMD_NUMBERS, AMD_SLOW, NUMBERS, ROWS, SLOW, FewFlow
from nicefast.fused.onepiece import OnePiece

OPTIONS = [
    {},
    {"context": 3},
    {"context": 2, "partition": "random", "activation": "elu"},
    {"partition": "half", "activation": "gelu", "prior": "normal"},
    {"partition": "random", "activation": "silu", "couplings": 5},
    {"hidden": (24,), "activation": "leaky_relu"},
    {"hidden": (600, 24), "context": 1},
]


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    monkeypatch.setattr(devices, "is_amd", lambda: False)


@pytest.fixture(autouse=True)
def nobody_takes_them_by_numpy(monkeypatch):
    monkeypatch.setattr(handful.Handful, "serves", staticmethod(lambda *_: False))


def few_rows(rows, **options):
    """A model, rows that it takes on their side, and their context."""
    model, x = make(6, **options), torch.randn(rows, 6)
    c = torch.randn(rows, model.context) if model.context else None
    assert type(nf.choose_path(model, x, c).fused) is FewFlow
    return model, x, c


def values(model, x, c):
    return *model(x, c), *model.inverse(x, c), model.log_prob(x, c)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 4, 48])
@pytest.mark.parametrize("kind", ["dense", "rows", "columns", "expanded"])
@torch.no_grad()
def test_values(options, rows, kind):
    model, x, c = few_rows(rows, **options)
    x = strided(x, kind) if rows else x
    given = x.clone()
    got = values(model, x, c)
    with nf.set_backend("reference"):
        plain = values(model, x, c)
    wide = None if c is None else c.double()
    exact = values(copy.deepcopy(model).double(), x.double(), wide)
    for g, p, e in zip(got, plain, exact, strict=True):
        assert_three_way(g, p, e)
    assert all(t.stride() == torch.empty(t.shape).stride() for t in got[::2])  # no log_det
    assert torch.equal(x, given)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_a_bad_row_stays_by_itself(options):
    model, x, c = few_rows(40, **options)
    whole = values(model, x, c)
    x[5, 2], x[6, 3] = float("nan"), float("inf")
    sound = torch.ones(len(x), dtype=torch.bool).index_fill_(0, torch.tensor([5, 6]), False)
    for got, before in zip(values(model, x, c)[::2], whole[::2], strict=True):  # no log_det
        assert torch.equal(got[sound], before[sound])
        assert not got[~sound].reshape(2, -1).isfinite().all(1).any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_samples_are_the_reference_s(options):
    model, _, c = few_rows(1, **options)
    for batch_size in (None, 7):
        got = model.sample(20, c, batch_size, torch.Generator().manual_seed(3))
        with nf.set_backend("reference"):
            plain = model.sample(20, c, batch_size, torch.Generator().manual_seed(3))
        assert torch.allclose(got, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_may_lie_anyhow_and_are_never_out_of_date():
    model, x, _ = few_rows(9)
    before = model.log_prob(x)
    linear = model.couplings[0].conditioner.linears[0]
    linear.weight.data = linear.weight.data.t().contiguous().t()
    assert torch.allclose(model.log_prob(x), before)
    linear.weight.data.mul_(2)  # which no version tells of
    with nf.set_backend("reference"):
        plain = model.log_prob(x)
    assert torch.allclose(model.log_prob(x), plain, rtol=1e-5)
    assert not torch.equal(plain, before)


@torch.no_grad()
def test_a_log_scale_that_is_not_finite():
    model, x, _ = few_rows(5)
    model.scaling.log_scale[2] = float("inf")
    for call in (lambda: model.log_prob(x), lambda: model.inverse(x), lambda: model.sample(5)):
        with pytest.raises(ValueError, match="log_scale must be finite, got inf at feature 2"):
            call()


def kind_of(model, rows, **options):
    return type(nf.choose_path(model, torch.zeros(rows, 6, **options)).fused)


@pytest.mark.parametrize("amd", [False, True])
def test_who_is_served(monkeypatch, amd):
    monkeypatch.setattr(devices, "is_amd", lambda: amd)
    numbers, slow = (AMD_NUMBERS, AMD_SLOW) if amd else (NUMBERS, SLOW)
    for width, most in ((64, numbers // 64), (numbers // ROWS + 99, ROWS)):
        model = make(6, hidden=(width,))
        with torch.no_grad():
            assert kind_of(model, most) is FewFlow
            assert kind_of(model, most + 1) is not FewFlow
            assert all(kind_of(model, rows) is OnePiece for rows in slow)
        assert kind_of(model, 1) is OnePiece  # its gradient may come
    model.requires_grad_(False)
    assert kind_of(model, 1) is FewFlow
    assert kind_of(model, 1, requires_grad=True) is OnePiece
    assert "1 rows in one piece, on its side" in model.explain(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert kind_of(model, 1) is OnePiece
    with Operators():
        assert kind_of(model, 1) is OnePiece
