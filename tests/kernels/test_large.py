"""Offsets beyond 2^31 elements: proven in the interpreter, run whole on a GPU."""

import pytest
import torch

import nicefast as nf

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language", reason="needs Triton")
F, R = nf.functional, nf.reference

ROW = 2**30  # row 2 begins at element 2^31


@pytest.fixture
def interpreter():
    from nicefast import kernels

    if not kernels.INTERPRETED:
        pytest.skip("needs Triton's interpreter; the GPU runs the whole case below")


def far_rows(n, d):
    """(3, d) rows 2^30 elements apart, in memory that is reserved and, but for them, untouched."""
    x = torch.empty(2 * ROW + 4096, dtype=torch.float16).as_strided((n, d), (ROW, 1))
    return x.copy_(torch.randn(n, d))


@triton.jit
def _offset_kernel(p_out, stride, WIDE: tl.constexpr):
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    tl.store(p_out + tl.program_id(0), (i * stride).to(tl.int64))


def test_the_interpreter_does_overflow(interpreter):
    """So the tests below would fail with 32-bit offsets."""
    out = torch.zeros(3, dtype=torch.int64)
    _offset_kernel[(3,)](out, ROW, WIDE=False)
    assert out[2] != 2 * ROW
    _offset_kernel[(3,)](out, ROW, WIDE=True)
    assert out[2] == 2 * ROW


@pytest.mark.parametrize("name", ["half", "alternating", "random"])
def test_strided_rows(interpreter, triton_backend, name):
    p = {"half": nf.Partition.half(8), "alternating": nf.Partition.alternating(8)}.get(
        name, nf.Partition.random(8, 0)
    )
    x, shift = far_rows(3, 8), far_rows(3, 4)
    want = R.additive_coupling(x.clone(), shift.clone(), p)
    assert torch.equal(F.additive_coupling(x, shift, p), want)
    assert torch.equal(F.split_features(x, p)[1], x[:, p.mask])
    h = x.detach().requires_grad_()
    log_prob = F.scale_log_prob(h, torch.zeros(8, dtype=torch.float16))
    assert torch.allclose(log_prob, R.scale_log_prob(x.clone(), torch.zeros(8)), atol=1e-3)
    (got,) = torch.autograd.grad(log_prob.sum(), h)
    assert torch.allclose(got, -torch.tanh(x.clone() / 2), atol=1e-3)
    F.additive_coupling_(x, shift, p)
    assert torch.equal(x.clone(), want)


def test_dense_rows_of_outputs(interpreter):
    """One program of each kernel on rows of 2^30 features reads and writes where it should."""
    from nicefast.kernels import coupling, likelihood, sampling

    def reserved(width):
        return torch.empty(2 * width + 4096, dtype=torch.float16).as_strided((3, 8), (width, 1))

    def reserved_zeros(dtype):
        x = torch.empty(ROW, dtype=dtype)  # torch.zeros would touch every page
        x[:64] = 0
        return x

    tile = {"ROWS": 4, "COLS": 8, "ACC": tl.float32}
    x, y, shift = reserved(ROW), reserved(ROW), torch.randn(3, 4).half()
    x.copy_(torch.randn(3, 8))
    coupling.couple_kernel[(1, 1)](
        x, shift, None, None, y, 3, ROW, 1, 4, 1, D=ROW, COUNT=4, START=0, STEP=1, INVERSE=False,
        HAS_BIAS=False, X_DENSE=True, SHIFT_DENSE=True, **tile,
    )  # fmt: skip
    assert torch.equal(y.clone(), R.additive_coupling(x.clone(), shift, slice(0, 4)))

    out = reserved(ROW)
    coupling.select_kernel[(1, 1)](
        x, None, out, reserved_zeros(torch.float32), 3, ROW, 1, 1, D=ROW, COUNT=ROW,
        START=0, STEP=1, NEGATE=True, COLUMN_SUMS=True, X_DENSE=True, **tile,
    )  # fmt: skip
    assert torch.equal(out.clone(), -x.clone())

    gradient = reserved(ROW)
    s = reserved_zeros(torch.float16)
    likelihood.scale_log_prob_bwd_kernel[(1, 1)](
        None, torch.ones(3), x, s, gradient, reserved_zeros(torch.float32), 3, 0, 0, 1, ROW, 1, 1,
        D=ROW, PRIOR="normal", HAS_GZ=False, GZ_DENSE=False, H_DENSE=True, **tile,
    )  # fmt: skip
    assert torch.equal(gradient.clone(), -x.clone())

    noise = reserved(ROW)
    sampling.sample_fwd_kernel[(1, 1)](
        s, noise, 3, 0, 7, D=ROW, PRIOR="normal", ACC=tl.float32, ROWS=4, QUADS=2
    )
    want = R.sample_prior(torch.zeros(8), 3, seed=7, prior="normal").half()
    assert torch.allclose(noise.clone(), want, atol=1e-3)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """Whole operations on 2^31 + elements; compared at the far end."""
    n, d = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    p = nf.Partition.alternating(d)
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    shift = torch.randn(n, d // 2, device="cuda", dtype=torch.bfloat16)
    y = F.additive_coupling(x, shift, p)
    tail = slice(n - 64, n)
    assert torch.equal(y[tail], R.additive_coupling(x[tail], shift[tail], p))
    s = torch.zeros(d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    log_prob = F.scale_log_prob(y, s)
    assert torch.allclose(log_prob[tail], R.scale_log_prob(y[tail], s), rtol=1e-4)
    del x, shift, y, log_prob
    h = F.sample_prior(s.detach(), n, seed=1)
    assert torch.equal(h[tail], F.sample_prior(s.detach(), 64, seed=1, row_offset=n - 64))
