"""bench/generative: each model against what is known of it in closed form."""

import math

import numpy as np
import pytest
import torch

for package in ("matplotlib", "sklearn"):
    pytest.importorskip(package, reason=f"needs {package}")

from torch import nn

from bench.generative import gan, gaussians, models, planar, quality, table
from bench.generative.training import batches, train
from bench.generative.vae import VAE, bound
from nicefast.baselines import Gaussian
from nicefast.preprocessing import Preprocessing


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_gaussian(noise_in_encoder=0.0, features=6, latent=2, sigma=0.5):
    """x = W z + b + sigma eps with orthogonal columns: encoder, decoder and marginal are exact."""
    q, _ = torch.linalg.qr(torch.randn(features, latent, generator=seeded(1)).double())
    w = q * torch.tensor([2.0, 1.2])
    b = torch.randn(features, generator=seeded(2)).double()
    scale = w.square().sum(0) + sigma**2  # W^T W + sigma^2, diagonal
    encoder, decoder = nn.Linear(features, 2 * latent), nn.Linear(latent, 2 * features)
    with torch.no_grad():
        for linear in (encoder.double(), decoder.double()):
            linear.weight.zero_()
            linear.bias.zero_()
        encoder.weight[:latent] = w.T / scale[:, None] * (1 - noise_in_encoder)
        encoder.bias[:latent] = -(w.T @ b) / scale
        encoder.bias[latent:] = (sigma / scale.sqrt()).log() + noise_in_encoder
        decoder.weight[:features] = w
        decoder.bias[:features] = b
        decoder.bias[features:] = math.log(sigma)
    zero = torch.zeros(features).double()
    model = VAE(encoder, decoder, zero, zero + 1, "normal").eval()
    marginal = torch.distributions.MultivariateNormal(
        b, w @ w.T + sigma**2 * torch.eye(features).double()
    )
    return model, marginal


def test_a_linear_vae_with_the_true_posterior_has_the_exact_likelihood():
    model, marginal = linear_gaussian()
    x = marginal.sample((50,))
    weights = model.log_weights(x, 5, seeded())
    torch.testing.assert_close(weights, marginal.log_prob(x)[:, None].expand(-1, 5))
    with torch.no_grad():
        elbo = torch.stack([model.elbo(x, seeded(i)) for i in range(2000)]).mean(0)
    assert (elbo - marginal.log_prob(x)).abs().max() < 0.2


def test_elbo_below_iwae_below_exact():
    model, marginal = linear_gaussian(noise_in_encoder=0.3)
    x = marginal.sample((400,))
    exact = marginal.log_prob(x).mean()
    with torch.no_grad():
        elbo = torch.stack([model.elbo(x, seeded(i)) for i in range(200)]).mean()
    weights = model.log_weights(x, 1000, seeded())
    one, some, many = (bound(weights, k).mean() for k in (1, 64, 1000))
    assert elbo < some < many < exact + 0.003
    assert abs(elbo - one) < 0.02
    assert exact - elbo > 0.05 > exact - many


def test_bounds_are_safe_from_overflow():
    weights = torch.tensor([[-1e5, -1e5 + math.log(3)], [1e5, 1e5]])
    expected = torch.tensor([-1e5 + math.log(2), 1e5], dtype=torch.float64)
    torch.testing.assert_close(bound(weights.double(), 2), expected)
    with pytest.raises(ValueError, match="k must be from 1 to 2, got 3"):
        bound(weights, 3)


@pytest.mark.parametrize("observation", ["logistic", "normal"])
def test_observations_are_densities_of_x_and_samples_follow_them(observation):
    decoder = nn.Linear(1, 2)
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.bias.copy_(torch.tensor([0.4, -0.7]))
    mean, deviation = torch.tensor([3.0]), torch.tensor([2.0])
    model = VAE(nn.Linear(1, 2), decoder, mean, deviation, observation)
    x = torch.linspace(-60, 60, 200_001)[:, None]
    with torch.no_grad():
        log_p = model.log_observation(x, torch.zeros(len(x), 1))
    weights = log_p.exp() * (120 / 200_000)
    assert abs(weights.sum() - 1) < 1e-4
    samples = model.sample(100_000, seeded()).squeeze(1).double()
    assert abs(samples.mean() - (weights * x.squeeze(1)).sum()) < 0.03
    spread = (weights * (x.squeeze(1) - samples.mean()).square()).sum().sqrt()
    assert abs(samples.std() / spread - 1) < 0.02


def test_a_vae_samples_its_own_density():
    model, marginal = linear_gaussian()
    samples = model.sample(100_000, seeded())
    torch.testing.assert_close(samples.mean(0), marginal.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(samples.T.cov(), marginal.covariance_matrix, atol=0.06, rtol=0)


def test_gan_losses_at_the_optimum_of_a_discrete_game():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0]).double()
    q = torch.tensor([0.1, 0.3, 0.2, 0.4]).double()
    logits = (p.clamp(min=1e-300) / q).log()  # of D = p / (p + q)
    middle = (p + q) / 2
    divergence = sum(0.5 * torch.special.xlogy(a, a / middle).sum() for a in (p, q))
    best = gan.value(logits, logits, p, q)
    torch.testing.assert_close(best, 2 * divergence - 2 * math.log(2))
    found = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    gan.value(found, found, p, q).backward()
    torch.testing.assert_close(found.grad, p / 2 - q / 2)  # uphill from D = 1/2, where it should
    for i in range(3):
        for step in (-0.1, 0.1):
            moved = logits.clone()
            moved[i] += step
            assert gan.value(moved, moved, p, q) < best
    same = torch.zeros(4).double()
    assert gan.value(same, same, p, p).item() == pytest.approx(-2 * math.log(2))
    assert gan.generator_loss(same, p).item() == pytest.approx(math.log(2))
    some = torch.randn(5, generator=seeded())
    torch.testing.assert_close(gan.generator_loss(some), -some.sigmoid().log().mean())


def test_parameters_of_gaussians():
    assert gaussians.covariance_parameters(32 * 32 * 3) == 4_720_128
    assert gaussians.parameters(2) == 5
    assert gaussians.parameters(2, "diag") == 4
    assert gaussians.parameters(3, "full", 4) == 4 * 9 + 3


def test_gaussians_against_numpy_and_their_samplers():
    x = torch.randn(500, 4, generator=seeded()) @ torch.randn(4, 4, generator=seeded(1))
    full, rows = Gaussian.full(x), x.double().numpy()
    np.testing.assert_allclose(full.mean, rows.mean(0))
    covariance = np.cov(rows.T, bias=True)
    np.testing.assert_allclose(full.scale @ full.scale.T, covariance, rtol=1e-9, atol=1e-12)
    centred = rows - rows.mean(0)
    squares = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred)
    level = -0.5 * (squares + np.linalg.slogdet(2 * np.pi * covariance)[1])
    np.testing.assert_allclose(full.log_prob(x), level)
    drawn = gaussians.sample(full, 200_000, seeded())
    np.testing.assert_allclose(drawn.T.cov(), covariance, atol=0.03 * covariance.max())
    diagonal = Gaussian.diagonal(x)
    drawn = gaussians.sample(diagonal, 200_000, seeded())
    np.testing.assert_allclose(drawn.var(0), rows.var(0), rtol=0.03)


def test_a_mixture_is_a_density_and_samples_it():
    rows = torch.cat([torch.randn(300, 2, generator=seeded()) * 0.3 + c for c in (-2, 3)])
    mixture = gaussians.Mixture(rows, rows, 0, 60.0, 6)
    assert mixture.components >= 2
    assert mixture.spent.steps == 6
    points, area = planar.grid((-6, 7, -6, 7), 400)
    density = mixture.log_prob(points).exp()
    assert abs(density.sum() * area - 1) < 1e-3
    drawn = mixture.sample(100_000, seeded())
    mean = (density[:, None] * points).sum(0) * area
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.03, rtol=0)
    square = (density[:, None] * points.square()).sum(0) * area
    torch.testing.assert_close(drawn.square().mean(0), square, atol=0.15, rtol=0)


@pytest.mark.parametrize("name", models.NAMES)
def test_a_number_of_steps_is_a_result_and_samples_follow_the_density(name):
    task = planar.moons_task(0)
    steps = 1 if "Gaussian" in name else 6 if name == "mixture" else 30
    first, again = (models.fit(name, task, 3, 60.0, steps) for _ in range(2))
    assert first.spent.steps == steps
    assert torch.equal(first.sample(20, seeded()), again.sample(20, seeded()))
    if steps == 30:
        other = models.fit(name, task, 4, 60.0, steps)
        assert not torch.equal(first.sample(20, seeded()), other.sample(20, seeded()))
    if first.density is None:
        return
    points, area = planar.grid((-8, 8, -8, 8), 400)
    with torch.no_grad():
        density = first.density(points.float()).double().exp()
    assert abs(density.sum() * area - 1) < 2e-3
    drawn = first.sample(100_000, seeded()).double()
    square = (density[:, None] * points.square()).sum(0) * area
    torch.testing.assert_close(drawn.square().mean(0), square, atol=0.04, rtol=0.02)


def test_the_clock_ends_a_fit_and_its_steps_repeat_it():
    task = planar.moons_task(0)
    timed = models.fit("VAE", task, 0, 0.3)
    assert timed.spent.seconds >= 0.3
    again = models.fit("VAE", task, 0, 1e9, timed.spent.steps)
    assert torch.equal(timed.sample(9, seeded()), again.sample(9, seeded()))


def test_the_best_validated_average_is_kept():
    module = nn.Linear(1, 1)
    scores = iter([1.0, 3.0, 2.0])
    seen = []

    def validate(averaged):
        seen.append(averaged.weight.item())
        return next(scores)

    def step(x):
        with torch.no_grad():
            module.weight += 1

    rows = batches(torch.randn(10, 1), Preprocessing(()), 4, 0)
    spent = train(module, step, rows, 0.0, 60, validate)
    assert module.weight.item() == seen[1]
    assert spent.steps == 60
    assert spent.rows == 200


def test_precision_and_recall_of_known_sets():
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
    assert quality.covered(grid, grid + 0.1) == 1.0
    assert quality.covered(grid, grid + 100) == 0.0
    half = grid[grid[:, 0] < 3]
    assert quality.covered(grid, half) == 1.0  # precise
    assert quality.covered(half, grid) < 0.9  # but not all is found
    with pytest.raises(ValueError, match="more than 3 rows, got 3"):
        quality.covered(grid[:3], grid)


def test_mmd_against_its_definition_and_without_bias():
    x, y = torch.randn(7, 2, generator=seeded()), torch.randn(5, 2, generator=seeded(1))

    def k(a, b):
        return math.exp(-((a - b).square().sum().item()) / (2 * 1.5**2))

    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 42
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
    xy = sum(k(a, b) for a in x for b in y) / 35
    assert quality.mmd2(x, y, 1.5) == pytest.approx(xx + yy - 2 * xy)
    same = [
        quality.mmd2(*torch.randn(2, 20, 3, generator=seeded(s)).double(), 1.5) for s in range(300)
    ]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(300)


def test_bayes_rule_of_height_and_weight():
    truth = [g.log_prob for g in planar.true_classes()]
    assert [g.mean.tolist() for g in planar.true_classes()] == [[176.0, 64.86], [184.29, 91.14]]
    expected = torch.tensor(planar.COVARIANCES[1]).double()
    scale = planar.true_classes()[1].scale
    torch.testing.assert_close(scale @ scale.T, expected, atol=1e-5, rtol=0)
    points, area = planar.grid(planar.BOX, 400)
    for log_prob in truth:
        assert abs(log_prob(points).exp().sum() * area - 1) < 1e-4
    density = torch.stack([log_prob(points).exp() for log_prob in truth])
    own = planar.posterior(truth, points)
    known = density.sum(0) > 0
    torch.testing.assert_close(own[known], (density[1] / density.sum(0))[known])
    same = [truth[0], truth[0]]
    assert planar.bayes_error(same) == pytest.approx(0.5, abs=1e-4)
    found = planar.height_weight(0, 0.1, (5, 5))
    optimal = found.errors["Bayes-optimal, by quadrature"]
    assert found.errors["true densities"] == pytest.approx(optimal, abs=5e-4)
    assert found.errors["fitted Gaussians"] >= found.errors["true densities"] - 2e-4


def test_a_gan_has_no_likelihood_in_the_table():
    record = {
        "parameters": 5, "steps": 3, "seconds": 1.0, "cpu_seconds": 0.5, "train_rate": 9.0,
        "sample_rate": 8.0, "choice": "", "precision": 0.5, "recall": 0.5, "mmd2": 0.1,
    }  # fmt: skip
    exact = record | {
        "log_prob": {"exact": 1.25},
        "bits_per_dim": {"exact": None},
        "density_rate": {"exact": 7.0},
    }
    results = {
        "data": "d", "seeds": 1, "budget": 1.0, "rows": [1, 2, 3], "features": 4, "threads": 1,
        "models": {"GAN": [record], "NICE": [exact]}, "real": [record],
        "reconstruction": {"NICE": 1e-7}, "plane": {"moons": {"true": 1.0}, "errors": {"a": 0.5}},
    }  # fmt: skip
    lines = table.table(results, "COMMAND").splitlines()
    cells = [c.strip() for c in next(line for line in lines if "| GAN" in line).split("|")[1:-1]]
    assert cells[:4] == ["GAN", "none", "none", "none"]
    assert cells[table.COLUMNS.index("density rows/s")] == "none"
    nice = next(line for line in lines if "| NICE" in line)
    assert "| 1.25 | exact | - |" in nice
    assert all(line.count("|") == lines[4].count("|") for line in lines[4:9] if line[:1] == "|")


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="name must be one of diagonal Gaussian"):
        models.fit("PixelCNN", planar.moons_task(0), 0, 1.0)
