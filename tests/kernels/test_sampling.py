"""The noise kernel against the plain-PyTorch Philox, and both against their distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nicefast as nf
from helpers import DTYPES, error, kolmogorov_smirnov

F, R = nf.functional, nf.reference
PRIORS = ["logistic", "normal"]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 8, 13, 130])
def test_kernel_draws_the_defined_numbers(guarded, device, dtype, d, prior):
    """The same counters on every device; only rounding differs."""
    s = torch.randn(d, dtype=dtype, device=device) * 0.3
    for seed, offset in ((0, 0), (2**63 - 1, 2**33 + 5), (12345, 7)):
        got = F.sample_prior(s, 9, prior, seed=seed, row_offset=offset)
        want = R.sample_prior(s, 9, seed, prior, offset)
        assert got.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else max(64 * torch.finfo(dtype).eps, 2e-5)
        assert error(got, want.double()) < tolerance


@pytest.mark.parametrize("prior", PRIORS)
def test_distribution(backend, device, prior):
    """Kolmogorov-Smirnov at a fixed seed: 1.95 is the 0.1 % point."""
    n, d = (20_000, 5) if backend == "reference" else (4_096, 5)
    s = torch.linspace(-1, 1, d, device=device)
    z = F.sample_prior(s, n, prior, seed=20) * s.exp()
    for column in z.unbind(1):
        assert kolmogorov_smirnov(column, prior) < 1.95
    assert kolmogorov_smirnov(z, prior) < 1.95
    correlation = torch.corrcoef(z.T.double()) - torch.eye(d, device=device)
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_statistic_notices_a_wrong_distribution():
    z = R.sample_prior(torch.zeros(5), 4_096, seed=20, prior="normal")
    assert kolmogorov_smirnov(z, "logistic") > 1.95
    assert kolmogorov_smirnov(1.05 * z, "normal") > 1.95


@pytest.mark.parametrize("prior", PRIORS)
def test_split_into_batches(backend, device, prior):
    s = torch.zeros(7, device=device)
    whole = F.sample_prior(s, 50, prior, seed=3)
    for size in (1, 7, 49):
        parts = [
            F.sample_prior(s, min(size, 50 - i), prior, seed=3, row_offset=i)
            for i in range(0, 50, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_tile_does_not_matter(triton_backend, device, monkeypatch):
    s = torch.zeros(70, device=device)
    whole = F.sample_prior(s, 5, seed=3)
    for size in (256, 1024, 65536):
        monkeypatch.setattr("nicefast.kernels.tile.TILE_BYTES", size)
        monkeypatch.setattr("nicefast.kernels.tile.MAX_COLUMNS", 16 if size < 1024 else 64)
        assert torch.equal(F.sample_prior(s, 5, seed=3), whole)


def test_seeds_and_generators(backend, device):
    s = torch.zeros(6, device=device)

    def draw(seed):
        return F.sample_prior(s, 4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(5)
    first = F.sample_prior(s, 4)
    assert not torch.equal(F.sample_prior(s, 4), first)
    torch.manual_seed(5)
    assert torch.equal(F.sample_prior(s, 4), first)


@pytest.mark.parametrize("prior", PRIORS)
def test_gradient(guarded, device, prior, monkeypatch):
    monkeypatch.setattr("nicefast.kernels.tile.REDUCTION_PROGRAMS", 2)
    s = torch.randn(13, device=device, requires_grad=True)
    h = F.sample_prior(s, 67, prior, seed=1)
    g = torch.randn(13, 67, device=device).t()
    (got,) = torch.autograd.grad(h, s, g)
    assert error(got, -(g.double() * h.double()).sum(0)) < 1e-3
    wide = torch.randn(5, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: F.sample_prior(s, 3, prior, seed=1), (wide,))


def test_known_answers_of_philox():
    """The vectors of Random123's kat_vectors for philox4x32-10."""
    words = torch.tensor

    def philox(c, k):
        rows = (
            words([c[0] | (c[1] << 32)])
            if c[1] < 1 << 31
            else words([(c[0] | (c[1] << 32)) - (1 << 64)])
        )
        out = R.philox(rows, words([c[2]]), c[3], k[0] | (k[1] << 32))
        return [f"{v & 0xFFFFFFFF:08x}" for v in out.flatten().tolist()]

    assert philox((0, 0, 0, 0), (0, 0)) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    full = 0xFFFFFFFF
    assert philox((full,) * 4, (full,) * 2) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    assert philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == [
        "d16cfe09",
        "94fdcceb",
        "5001e420",
        "24126ea1",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("prior", PRIORS)
def test_never_infinite(monkeypatch, prior, dtype):
    """The extreme words of the generator give finite, symmetric numbers."""
    words = torch.tensor([0, 1, 2**31 - 1, -(2**31), -2, -1], dtype=torch.int32)
    grid = torch.cartesian_prod(words, words, words[:2], words[:2])
    monkeypatch.setattr(R, "philox", lambda rows, quads, word, seed: grid)
    z = R.prior_noise(
        torch.zeros(len(grid)), 4, 0, prior, torch.promote_types(dtype, torch.float32)
    )
    assert z.to(dtype).isfinite().all()


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(0, 6),
    d=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 2**40),
    prior=st.sampled_from(PRIORS),
)
def test_any_counter(n, d, seed, offset, prior):
    pytest.importorskip("triton", reason="needs Triton")
    on = "cuda" if torch.cuda.is_available() else "cpu"
    s = torch.zeros(d, dtype=torch.float64, device=on)
    with nf.set_backend("triton"):
        got = F.sample_prior(s, n, prior, seed=seed, row_offset=offset)
    assert error(got, R.sample_prior(s, n, seed, prior, offset)) < 1e-12
