"""The coupling kernels against the float64 definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nicefast as nf
from helpers import DTYPES, assert_three_way, error, partitions, strided

pytest.importorskip("triton", reason="needs Triton")
F, R = nf.functional, nf.reference

SHAPES = [(1, 2), (3, 3), (5, 8), (17, 13), (2, 130), (1, 1027)]


def draw(n, p, dtype, device):
    s = len(p.shifted)
    return (
        torch.randn(n, p.features, dtype=dtype, device=device),
        torch.randn(n, s, dtype=dtype, device=device),
        torch.randn(s, dtype=dtype, device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_out_of_place(guarded, device, dtype, n, d):
    for i, p in enumerate(partitions(d)):
        x, shift, bias = draw(n, p, dtype, device)
        bias = bias if i % 2 else None
        for inverse in (False, True):
            y = F.additive_coupling(x, shift, p, inverse, bias)
            plain = R.additive_coupling(x, shift, p, inverse, bias)
            wide = None if bias is None else bias.double()
            exact = R.additive_coupling(x.double(), shift.double(), p, inverse, wide)
            assert_three_way(y, plain, exact)
            assert torch.equal(y[:, p.mask.to(device)], x[:, p.mask.to(device)])  # bit for bit


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_strides(guarded, device, layout):
    for p in partitions(13):
        x, shift, bias = draw(7, p, torch.float32, device)
        x, shift = strided(x, layout), strided(shift, layout)
        y = F.additive_coupling(x, shift, p, bias=bias)
        exact = R.additive_coupling(x.double(), shift.double(), p, bias=bias.double())
        assert error(y, exact) < 1e-6


def test_row_strided_view_is_not_copied(guarded, device):
    parent = torch.randn(5, 20, device=device)
    F.additive_coupling(parent[:, 2:12], torch.randn(5, 5, device=device), nf.Partition.half(10))
    assert len(guarded.buffers) == 1  # the output, and nothing else


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_in_place_touches_the_shifted_features_only(triton_backend, device, dtype, n, d):
    for p in partitions(d):
        x, shift, bias = draw(n, p, dtype, device)
        exact = R.additive_coupling(x.double(), shift.double(), p, True, bias.double())
        plain = R.additive_coupling(x, shift, p, True, bias)
        conditioning = p.mask.to(device)
        memory = torch.full((n + 2, d + 4), torch.nan, dtype=dtype, device=device)
        inside = memory[1:-1, 1 : d + 1]
        inside.copy_(x)
        inside[:, conditioning] = torch.nan  # what must not be touched need not even be read
        y = F.additive_coupling_(inside, shift, p, inverse=True, bias=bias)
        assert y is inside
        shifted = p.shifted.to(device)
        assert_three_way(inside[:, shifted], plain[:, shifted], exact[:, shifted])
        assert memory.isnan().sum() == memory.numel() - n * len(p.shifted)


@pytest.mark.parametrize("programs", [2, 1024])
@pytest.mark.parametrize(("n", "d"), [(1, 2), (9, 8), (67, 13), (5, 1027)])
def test_selection_is_the_gradient(guarded, device, monkeypatch, n, d, programs):
    """Gradients of x, shift and bias, with random and expanded cotangents."""
    monkeypatch.setattr("nicefast.kernels.tile.REDUCTION_PROGRAMS", programs)
    for p in partitions(d)[:: 1 if d < 100 else 3]:
        x, shift, bias = (t.requires_grad_() for t in draw(n, p, torch.float32, device))
        for cotangent in (
            torch.randn(n, d, device=device),
            torch.randn(1, 1, device=device).expand(n, d),
            torch.randn(d, n, device=device).t(),
        ):
            for inverse in (False, True):
                y = F.additive_coupling(x, shift, p, inverse, bias)
                got = torch.autograd.grad(y, (x, shift, bias), cotangent)
                inputs = [t.detach().double().requires_grad_() for t in (x, shift, bias)]
                exact = torch.autograd.grad(
                    R.additive_coupling(inputs[0], inputs[1], p, inverse, inputs[2]),
                    inputs,
                    cotangent.double(),
                )
                assert torch.equal(got[0].double(), exact[0])
                assert torch.equal(got[1].double(), exact[1])
                assert error(got[2], exact[2]) < 1e-6 * n


def test_split_selects_and_joins_gradients(guarded, device):
    for p in partitions(13):
        x = torch.randn(5, 13, dtype=torch.float64, device=device, requires_grad=True)
        same, x1 = F.split_features(x, p)
        assert torch.equal(same, x)
        assert torch.equal(x1, x[:, p.mask.to(device)])
        a, b = torch.randn_like(same), torch.randn_like(x1)
        (got,) = torch.autograd.grad((same, x1), x, (a, b))
        exact = a.clone()
        exact[:, p.mask.to(device)] += b
        assert error(got, exact) < 1e-15


def test_gradcheck_in_float64(triton_backend, device):
    for p in partitions(7):
        x, shift, bias = (t.requires_grad_() for t in draw(2, p, torch.float64, device))
        assert torch.autograd.gradcheck(
            lambda x, s, b, p=p: F.additive_coupling(x, s, p, True, b), (x, shift, bias)
        )


@pytest.mark.parametrize("n", [0, 1])
def test_zero_and_one_row(guarded, device, n):
    for p in partitions(6):
        x, shift, bias = (t.requires_grad_() for t in draw(n, p, torch.float32, device))
        y = F.additive_coupling(x, shift, p, bias=bias)
        assert y.shape == (n, 6)
        y.sum().backward()
        assert torch.equal(bias.grad, torch.full_like(bias, n))
    guarded.buffers.append(torch.full((600,), guarded.MARK))  # zero rows allocate nothing


def test_shift_narrower_than_x_is_added_in_x_precision(guarded, device):
    """A float16 conditioner under autocast: the stream stays float32."""
    p = nf.Partition.alternating(8)
    x, shift = torch.randn(4, 8, device=device), torch.randn(4, 4, device=device).half()
    shift.requires_grad_()
    y = F.additive_coupling(x, shift, p)
    assert y.dtype == torch.float32
    assert error(y, R.additive_coupling(x.double(), shift.double(), p)) < 1e-6
    y.square().sum().backward()
    assert shift.grad.dtype == torch.float16


def test_minus_zero_survives(guarded, device):
    for p in partitions(6):
        x = torch.full((2, 6), -0.0, device=device)
        y = F.additive_coupling(x, torch.zeros(2, len(p.shifted), device=device), p)
        assert torch.signbit(y[:, p.mask.to(device)]).all()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_partition(data):
    """Any mask, any rows: kernel = definition, inverse undoes forward on representable values."""
    d = data.draw(st.integers(2, 40))
    n = data.draw(st.integers(0, 9))
    bits = data.draw(
        st.lists(st.booleans(), min_size=d, max_size=d).filter(lambda b: 0 < sum(b) < len(b))
    )
    p = nf.Partition.from_mask(torch.tensor(bits))
    on = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randint(-99, 99, (n, d), device=on).float()
    shift = torch.randint(-99, 99, (n, len(p.shifted)), device=on).float()
    with nf.set_backend("triton"):
        y = F.additive_coupling(x, shift, p)
        assert torch.equal(y, R.additive_coupling(x, shift, p))
        assert torch.equal(F.additive_coupling(y, shift, p, inverse=True), x)
        assert torch.equal(F.additive_coupling_(y, shift, p, inverse=True), x)
        assert torch.equal(F.split_features(x, p)[1], x[:, p.mask.to(on)])


@pytest.mark.usefixtures("triton_backend")
def test_a_bias_lies_as_it_likes(device):
    for p in partitions(8):
        x, shift, _ = draw(5, p, torch.float32, device)
        size = len(p.shifted)
        gaps = torch.full((size, 2), torch.nan, device=device)
        gaps[:, 0] = torch.randn(size, device=device)
        for bias in (gaps[:, 0], gaps[:1, 0].expand(size), gaps[:, 0].contiguous().flip(0)):
            expected = R.additive_coupling(x, shift, p, bias=bias)
            torch.testing.assert_close(F.additive_coupling(x, shift, p, bias=bias), expected)
            y = F.additive_coupling_(x.clone(), shift, p, bias=bias)
            torch.testing.assert_close(y, expected)
        several = torch.randn(size, 3, device=device)
        got = torch.vmap(lambda b, x=x, s=shift, p=p: F.additive_coupling(x, s, p, bias=b), 1)(
            several
        )
        for y, bias in zip(got, several.T, strict=True):
            torch.testing.assert_close(y, R.additive_coupling(x, shift, p, bias=bias))


@pytest.mark.usefixtures("triton_backend")
def test_what_is_added_may_lie_in_what_is_written(device):
    p, zeros = nf.Partition.half(8), torch.zeros(600, 4, device=device)
    for added in (lambda x: (zeros, x[0, 4:]), lambda x: (x[:1, 4:].expand(600, 4), None)):
        x = torch.randn(600, 8, device=device)
        shift, bias = added(x.clone())
        expected = R.additive_coupling(x, shift, p, bias=bias)
        shift, bias = added(x)
        torch.testing.assert_close(F.additive_coupling_(x, shift, p, bias=bias), expected)
