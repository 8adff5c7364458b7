"""Dequantisation: the kernel and the blocks against the definition, and what both promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nicefast as nf
from helpers import strided

F, R = nf.functional, nf.reference
KS = (2, 3, 17, 31, 255, 256)
RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.1, 0.9), (-3.0, 1.0), (0.0, 255.0))


def draw(n, d, k, dtype=torch.int64, device="cpu"):
    return torch.randint(0, k, (n, d), device=device).to(dtype)


@pytest.mark.parametrize("low_high", [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7)])
@pytest.mark.parametrize("k", [2, 17, 256, 65536])
@pytest.mark.parametrize("d", [1, 3, 4, 13, 130])
def test_kernel_is_the_definition_bit_for_bit(guarded, device, d, k, low_high):
    dtype = torch.uint8 if k <= 256 else torch.int32
    levels = draw(9, d, k, dtype, device)
    for seed, offset in ((0, 0), (2**63 - 1, 2**33 + 5)):
        options = dict(zip(("low", "high"), low_high, strict=True))
        got = F.dequantise(levels, k, seed=seed, row_offset=offset, **options)
        assert torch.equal(got, R.dequantise(levels, k, seed, offset, *low_high))


@pytest.mark.parametrize("d", [1, 5, 130])
def test_integers_of_any_sign(backend, device, d):
    levels = torch.randint(-(2**24), 2**24 + 1, (9, d), device=device)
    levels[0, 0], levels[-1, -1] = -1, 0
    x = F.dequantise(levels, None, seed=4, row_offset=11)
    assert torch.equal(x, R.dequantise(levels, None, 4, 11))
    assert torch.equal(x.floor().long(), levels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["dense", "rows", "columns", "expanded"])
def test_dtypes_and_strides(backend, device, dtype, layout):
    dense = draw(11, 13, 100, dtype, device)
    apart = torch.cat((dense, dense), 1)[:, :13]
    levels = apart if layout == "rows" else strided(dense, layout)
    kept = levels.clone()
    x = F.dequantise(levels, 100, seed=5)
    assert x.is_contiguous()
    assert torch.equal(x, R.dequantise(levels.long().contiguous(), 100, 5))
    assert torch.equal(levels, kept)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2, 3, 4), (0, 1, 2, 2), (3, 1, 2, 2)])
def test_shapes(backend, device, shape):
    levels = torch.randint(0, 17, shape, device=device)
    x = F.dequantise(levels, 17, seed=2)
    assert (x.shape, x.dtype, x.device) == (levels.shape, torch.float32, levels.device)
    assert torch.equal(x.flatten(1), R.dequantise(levels.flatten(1), 17, 2))
    assert torch.equal(R.dequantise(levels, 17, 2), x)


def test_split_into_batches(backend, device):
    levels = draw(50, 7, 17, device=device)
    for k in (17, None):
        whole = F.dequantise(levels, k, seed=3, row_offset=6)
        for size in (1, 7, 49):
            parts = [
                F.dequantise(levels[i : i + size], k, seed=3, row_offset=6 + i)
                for i in range(0, 50, size)
            ]
            assert torch.equal(torch.cat(parts), whole)


def test_blocks_and_tiles_do_not_matter(device, monkeypatch):
    levels = draw(300, 70, 256, torch.uint8, device)
    whole = R.dequantise(levels, 256, 1)
    for size in (1, 100, 1000):
        monkeypatch.setattr("nicefast.reference.NOISE_ELEMENTS", size)
        assert torch.equal(R.dequantise(levels, 256, 1), whole)


def test_tile_does_not_matter(triton_backend, device, monkeypatch):
    levels = draw(5, 70, 256, torch.uint8, device)
    whole = F.dequantise(levels, 256, seed=3)
    for size in (256, 1024, 65536):
        monkeypatch.setattr("nicefast.kernels.tile.TILE_BYTES", size)
        monkeypatch.setattr("nicefast.kernels.tile.MAX_COLUMNS", 16 if size < 1024 else 64)
        assert torch.equal(F.dequantise(levels, 256, seed=3), whole)


def test_noise_is_that_of_the_prior():
    """The same words: what sample_prior takes for its uniform numbers, cut to 13 bits."""
    words = R.philox(torch.arange(5) + 7, torch.arange(2), 0, 99)[:, :6]
    u = (((words >> 19) & 0x1FFF).float() + 0.5) * 2.0**-13
    x = F.dequantise(torch.zeros(5, 6, dtype=torch.uint8), 256, seed=99, row_offset=7)
    assert torch.equal(x * 256, u)


def test_seeds_differ(backend, device):
    levels = torch.zeros(4, 6, dtype=torch.uint8, device=device)
    assert torch.equal(F.dequantise(levels, 2, seed=1), F.dequantise(levels, 2, seed=1))
    assert not torch.equal(F.dequantise(levels, 2, seed=1), F.dequantise(levels, 2, seed=2))


def every_value(k, low, high):
    """x of every level with every value of the noise, and the levels: a row each."""
    bits, low32, scale, top = R._grid(k, low, high)
    steps = torch.arange(k << bits, dtype=torch.int32).view(k, -1)
    x = (steps + 0.5).mul_(scale)
    return (x.add_(low32) if low32 else x).clamp_(max=top), steps >> bits


@pytest.mark.parametrize("low_high", RANGES)
@pytest.mark.parametrize("k", KS)
def test_floor_recovers_every_level_whatever_the_noise(k, low_high):
    low, high = low_high
    x, levels = every_value(k, low, high)
    end = torch.tensor([low, high])
    assert (x >= end[0]).all()
    assert (x < end[1]).all()
    assert torch.equal(((x - low) / (high - low) * k).floor().int(), levels)
    u = (x.double() - low) / (high - low) * k - levels
    assert u.mean().item() == pytest.approx(0.5, abs=1e-4)
    assert u.var(1, correction=0).sub(1 / 12).abs().max() < 1e-4


@pytest.mark.parametrize("k", [257, 1000, 32767, 65535, 65536])
def test_floor_recovers_every_level_of_many(k):
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        x, levels = every_value(k, low, high)
        assert torch.equal(((x - low) / (high - low) * k).floor().int(), levels)


def test_every_value_is_what_is_drawn():
    levels = draw(1000, 20, 17)
    values, _ = every_value(17, -1.0, 1.0)
    x = F.dequantise(levels, 17, seed=8, low=-1.0, high=1.0)
    assert torch.isin(x, values).all()


@pytest.mark.parametrize("k", [2, 256, 65536, None])
def test_noise_is_uniform(backend, device, k):
    """Kolmogorov-Smirnov at a fixed seed: 1.95 is the 0.1 % point."""
    n, d = (20_000, 5) if backend == "reference" else (4_096, 5)
    levels = draw(n, d, k or 100, device=device)
    x = F.dequantise(levels, k, seed=20).double().cpu() * (k or 1)
    u = x - levels.cpu()
    assert (u >= 0).all()
    assert (u < 1).all()
    for column in (*u.unbind(1), u.flatten()):
        # half a step, for noise that has few values
        step = 2.0 ** -(21 - (k - 1).bit_length()) / 2 if k else 0.0
        cdf, _ = column.sort()
        grid = torch.arange(len(column), dtype=torch.float64) / len(column)
        distance = torch.maximum((cdf - grid).abs(), (grid + 1 / len(column) - cdf).abs()).max()
        assert (distance - step) * math.sqrt(len(column)) < 1.95
    correlation = torch.corrcoef(u.T) - torch.eye(d)
    assert correlation.abs().max() < 5 / math.sqrt(n)
    lagged = torch.corrcoef(torch.stack((u[1:, 0], u[:-1, 0])))[0, 1]
    assert abs(lagged) < 5 / math.sqrt(n)


def test_largest_noise_stays_below_the_next_level(monkeypatch):
    for word in (0, 0xFFFFFFFF - (1 << 32)):
        monkeypatch.setattr(
            R,
            "philox",
            lambda rows, quads, word, seed, w=word: torch.full(
                (len(rows), 4 * len(quads)), w, dtype=torch.int32
            ),
        )
        for k in (2, 17, 256, 1000, 65536):
            levels = torch.tensor([[0, k // 2, k - 1]])
            for low, high in RANGES:
                x = R.dequantise(levels, k, 0, 0, low, high)
                assert torch.equal(((x - low) / (high - low) * k).floor().long(), levels)
        levels = torch.tensor([[-(2**24), -5, -1, 0, 1, 4, 255, 2**23 - 1, 2**24]])
        assert torch.equal(R.dequantise(levels, None).floor().long(), levels)


def test_range_is_never_left(backend, device):
    """Where the range has few floats of its own, high itself would come of rounding."""
    levels = torch.full((400, 3), 255, dtype=torch.uint8, device=device)
    x = F.dequantise(levels, 256, low=1000.0, high=1000.5)
    assert (x < 1000.5).all()
    assert (x == torch.nextafter(torch.tensor(1000.5), torch.tensor(0.0)).item()).any()
    assert (F.dequantise(levels, 256, low=-1.0, high=0.0) < 0).all()


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(0, 6),
    d=st.integers(1, 40),
    k=st.one_of(st.none(), st.integers(2, 65536)),
    seed=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 2**40),
)
def test_any_counter(n, d, k, seed, offset):
    pytest.importorskip("triton", reason="needs Triton")
    on = "cuda" if torch.cuda.is_available() else "cpu"
    levels = draw(n, d, k or 1000, device=on)
    with nf.set_backend("triton"):
        got = F.dequantise(levels, k, seed=seed, row_offset=offset)
    assert torch.equal(got, R.dequantise(levels, k, seed, offset))
    assert torch.equal((got * (k or 1)).floor().long(), levels)


def test_opcheck_and_compiled_graphs(backend, device):
    levels = draw(5, 6, 17, device=device)
    operation = torch.ops.nicefast.dequantise
    torch.library.opcheck(operation.default, (levels, 17, 3, 1, -1.0, 1.0))
    torch.library.opcheck(operation.default, (levels, None, 3, 1, 0.0, 1.0))
    compiled = torch.compile(
        lambda t: F.dequantise(t, 17, seed=4, low=-1.0) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(levels), F.dequantise(levels, 17, seed=4, low=-1.0) + 1)


U = torch.zeros(3, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.dequantise(U.float(), 2), TypeError, "levels must be uint8, .*float32"),
        (lambda: F.dequantise(U.bool(), 2), TypeError, "levels must be uint8, .*bool"),
        (lambda: F.dequantise([[1]], 2), TypeError, "levels must be a torch.Tensor, got list"),
        (
            lambda: F.dequantise(U[0], 2),
            ValueError,
            r"must have shape \(N, \.\.\.\).*\(4,\)",
        ),
        (lambda: F.dequantise(U[:, :0], 2), ValueError, "at least one feature"),
        (lambda: F.dequantise(U + 2, 2), ValueError, "levels must lie in 0 .. 1, got .* 2 to 2"),
        (lambda: F.dequantise(U.int() - 1, 256), ValueError, "0 .. 255, got values from -1 to -1"),
        (lambda: F.dequantise(U.long() + 2**31, 256), ValueError, "got values from 2147483648"),
        (lambda: F.dequantise(U.int() + 2**24 + 1, None), ValueError, "that float32 holds"),
        (lambda: F.dequantise(U, 1), ValueError, "k must be an integer from 2 to 65536.*got 1"),
        (lambda: F.dequantise(U, 2.0), ValueError, "k must be an integer"),
        (lambda: F.dequantise(U, True), ValueError, "k must be an integer"),
        (lambda: F.dequantise(U, 65537), ValueError, "k must be an integer"),
        (lambda: F.dequantise(U, 2, seed=-1), ValueError, "seed must be at least 0"),
        (lambda: F.dequantise(U, 2, seed=1.5), TypeError, "seed must be an integer, got 1.5"),
        (lambda: F.dequantise(U, 2, seed="a"), TypeError, "seed must be an integer, got 'a'"),
        (lambda: F.dequantise(U, 2, seed=None), TypeError, "seed must be an integer, got None"),
        (lambda: F.dequantise(U, 2, seed=2**63), ValueError, "seed must be at least 0 and below"),
        (lambda: F.dequantise(U, 2, row_offset=-1), ValueError, "row_offset must be an integer"),
        (lambda: F.dequantise(U, 2, low=1.0, high=1.0), ValueError, "low must be below high"),
        (lambda: F.dequantise(U, 2, low=1.0, high=1.0 + 1e-9), ValueError, "for float32 to tell"),
        (lambda: F.dequantise(U, 2, low=math.nan), ValueError, "low must be below high"),
        (lambda: F.dequantise(U, 2, high=math.inf), ValueError, "low must be below high"),
        (lambda: F.dequantise(U, 2, low="a"), TypeError, "low must be a number, got 'a'"),
        (lambda: F.dequantise(U, 2, high=None), TypeError, "high must be a number, got None"),
        (lambda: F.dequantise(U, None, low=-1.0), ValueError, "low and high need k"),
    ],
)
def test_bad_input(backend, call, error, says):
    with pytest.raises(error, match=says):
        call()
