"""nicefast.data.toys: true densities are normalised, and samples follow them."""

import functools
import itertools
import math

import pytest
import torch

pytest.importorskip("scipy", reason="needs scipy, which integrates")

from scipy import integrate, special, stats

from nicefast.data.toys import TOYS, toy, toy_log_prob


def cells(name, count):
    """Midpoints (count^2, 2) of a grid over the density's box, the box's edges, a cell's area."""
    x0, x1, y0, y1 = TOYS[name].bounds
    xs, ys = torch.linspace(x0, x1, count + 1), torch.linspace(y0, y1, count + 1)
    xs, ys = xs.double(), ys.double()
    grid = torch.cartesian_prod((xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2)
    return grid, (xs, ys), (x1 - x0) * (y1 - y0) / count**2


BINS, FINE = 22, 10


@functools.cache
def on_grid(name):
    """Log-density on the grid, and a cell's area."""
    grid, _, area = cells(name, BINS * FINE)
    return toy_log_prob(name, grid), area


@pytest.mark.parametrize("name", TOYS)
def test_density_integrates_to_one_within_its_bounds(name):
    log_p, area = on_grid(name)
    total = log_p.exp().sum().item() * area
    assert total == pytest.approx(1, abs=0.01 if name == "checkerboard" else 1e-5)


@pytest.mark.parametrize("name", TOYS)
def test_samples_follow_the_density(name):
    """Chi-square over bins whose expected counts come from a hundred points in each."""
    n = 20_000
    log_p, area = on_grid(name)
    mass = (log_p.exp() * area).view(BINS, FINE, BINS, FINE).sum((1, 3))
    _, edges, _ = cells(name, BINS)
    counts, _ = torch.histogramdd(toy(name, n, seed=1).double(), bins=[e.clone() for e in edges])
    expected = n * mass
    big = expected >= 10
    observed = torch.cat([counts[big], counts[~big].sum().view(1)])
    expected = torch.cat([expected[big], expected[~big].sum().view(1)])
    if expected[-1] < 1:  # nothing outside the big bins
        assert observed[-1] <= 5
        observed, expected = observed[:-1], expected[:-1]
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert stats.chi2.sf(chi_square, len(expected) - 1) > 1e-3


@pytest.mark.parametrize("name", TOYS)
def test_mean_log_density_of_samples_is_minus_the_entropy(name):
    log_p, area = on_grid(name)
    minus_entropy = (torch.special.xlogy(log_p.exp(), log_p.exp())).sum().item() * area
    scores = toy_log_prob(name, toy(name, 20_000, seed=2))
    assert scores.isfinite().all()
    error = scores.std().item() / math.sqrt(len(scores)) + 1e-6
    allowed = 0.02 if name == "checkerboard" else 4 * error
    assert abs(scores.mean().item() - minus_entropy) < allowed


def test_quadratures_agree_with_adaptive_integration():
    for point in ((0.3, 0.5), (-1.4, -0.2), (2.0, 1.2)):
        x, y = point

        def moon(t, x=x, y=y):
            two = ((math.cos(t) - 0.5, math.sin(t) - 0.25), (0.5 - math.cos(t), 0.25 - math.sin(t)))
            return sum(normal(x, y, c, 0.1) for c in two) / (2 * math.pi)

        def spiral(u, x=x, y=y):
            t = 3 * math.pi * math.sqrt(u)
            arm = (t / 4 * math.cos(t), t / 4 * math.sin(t))
            return sum(normal(x, y, (s * arm[0], s * arm[1]), 0.08) for s in (1, -1)) / 2

        for name, function, top in (("moons", moon, math.pi), ("spirals", spiral, 1.0)):
            pieces = [top * k / 200 for k in range(201)]
            true = sum(
                integrate.quad(function, a, b, epsabs=0, epsrel=1e-11)[0]
                for a, b in itertools.pairwise(pieces)
            )
            found = toy_log_prob(name, torch.tensor([point], dtype=torch.float64)).item()
            assert found == pytest.approx(math.log(true), abs=1e-8), (name, point)


def normal(x, y, centre, scale):
    square = (x - centre[0]) ** 2 + (y - centre[1]) ** 2
    return math.exp(-square / (2 * scale**2)) / (2 * math.pi * scale**2)


def test_rings_are_the_bessel_formula():
    r, s = 1.2, 0.08
    each = [
        special.i0e(r * R / s**2) * math.exp(-((r - R) ** 2) / (2 * s**2))
        for R in (0.5, 1.0, 1.5, 2.0)
    ]
    expected = math.log(sum(each) / 4 / (2 * math.pi * s**2))
    x = torch.tensor([[0.0, -r], [r * math.cos(1), r * math.sin(1)]], dtype=torch.float64)
    assert toy_log_prob("rings", x).tolist() == pytest.approx([expected] * 2)


def test_checkerboard_is_uniform_on_eight_squares():
    x = toy("checkerboard", 20_000)
    assert (toy_log_prob("checkerboard", x) == torch.tensor(-math.log(8))).all()
    corners = x.floor().unique(dim=0)
    assert len(corners) == 8
    outside = torch.tensor([[-2.5, 0.5], [2.0, 0.0], [0.5, -0.5]])
    assert toy_log_prob("checkerboard", outside).tolist() == [-math.inf] * 3


@pytest.mark.parametrize("name", TOYS)
def test_far_away_the_density_is_small_and_has_no_nan(name):
    log_prob = toy_log_prob(name, torch.tensor([[100.0, -100.0], [0.0, 0.0]]))
    assert log_prob[0] < -1e4
    assert not log_prob.isnan().any()


@pytest.mark.parametrize("name", TOYS)
def test_samples_follow_their_seed_and_dtypes_are_kept(name):
    x = toy(name, 100, seed=3)
    torch.manual_seed(99)
    assert torch.equal(x, toy(name, 100, seed=3))
    assert not torch.equal(x, toy(name, 100, seed=4))
    assert (x.dtype, x.shape) == (torch.float32, (100, 2))
    assert toy(name, 0).shape == (0, 2)
    assert toy_log_prob(name, x[:0]).shape == (0,)
    assert toy_log_prob(name, x).dtype == torch.float32
    assert toy_log_prob(name, x.half()).dtype == torch.float32
    assert toy_log_prob(name, x.double()).dtype == torch.float64
    x0, x1, y0, y1 = TOYS[name].bounds
    low, high = torch.tensor([x0, y0]), torch.tensor([x1, y1])
    assert ((x >= low) & (x <= high)).all()


def test_long_inputs_go_in_parts():
    x = toy("moons", 9000)
    whole, part = toy_log_prob("moons", x), toy_log_prob("moons", x[5000:5010])
    assert torch.allclose(whole[5000:5010], part)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"one of moons, rings.*got 'moon'"):
        toy("moon", 5)
    with pytest.raises(ValueError, match="one of moons"):
        toy_log_prob("circles", torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"n must be an integer >= 0, got -1"):
        toy("moons", -1)
    with pytest.raises(ValueError, match=r"shape \(N, 2\), got \(3,\)"):
        toy_log_prob("moons", torch.zeros(3))
    with pytest.raises(TypeError, match="int64"):
        toy_log_prob("moons", torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "n", "seed", "error", "says"),
    [
        (["moons"], 5, 0, ValueError, "name must be one of moons"),
        (None, 5, 0, ValueError, "name must be one of moons"),
        ("moons", 5.0, 0, ValueError, "n must be an integer >= 0, got 5.0"),
        ("moons", True, 0, ValueError, "n must be an integer >= 0, got True"),
        ("moons", 5, -1, ValueError, "seed must be at least 0"),
        ("moons", 5, "a", TypeError, "seed must be an integer, got 'a'"),
    ],
)
def test_what_is_wrong_is_named(name, n, seed, error, says):
    with pytest.raises(error, match=says):
        toy(name, n, seed)
