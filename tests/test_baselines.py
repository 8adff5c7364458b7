"""nicefast.baselines against scipy and torch, and where no maximum exists."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from nicefast.baselines import Gaussian

stats = pytest.importorskip("scipy.stats", reason="needs scipy")


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator)
    return torch.randn(300, 5, generator=generator) @ mixing + 3


def test_full_is_the_maximum_likelihood_normal(x):
    rows = x.double().numpy()
    expected = stats.multivariate_normal(rows.mean(0), np.cov(rows.T, ddof=0)).logpdf(rows)
    torch.testing.assert_close(Gaussian.full(x).log_prob(x), torch.from_numpy(expected))
    theirs = MultivariateNormal(
        x.double().mean(0), torch.from_numpy(np.cov(rows.T, ddof=0))
    ).log_prob(x.double() + 1)
    torch.testing.assert_close(Gaussian.full(x).log_prob(x + 1), theirs, rtol=1e-6, atol=1e-6)


def test_diagonal_is_the_maximum_likelihood_normal(x):
    rows = x.double()
    expected = Normal(rows.mean(0), rows.std(0, correction=0)).log_prob(rows).sum(1)
    torch.testing.assert_close(Gaussian.diagonal(x).log_prob(x), expected)


def test_mean_training_log_likelihood_has_its_closed_form(x):
    """At the maximum, the mean is ``-(log det(2 pi covariance) + D) / 2``."""
    covariance = torch.from_numpy(np.cov(x.double().numpy().T, ddof=0))
    expected = -0.5 * (torch.logdet(2 * torch.pi * covariance) + 5)
    assert Gaussian.full(x).log_prob(x).mean().item() == pytest.approx(expected.item(), abs=1e-9)
    assert Gaussian.full(x).log_prob(x).mean() > Gaussian.diagonal(x).log_prob(x).mean()


def test_event_dimensions_are_flattened_and_results_are_float64(x):
    images = x[:, :4].view(300, 1, 2, 2)
    for make in (Gaussian.full, Gaussian.diagonal):
        scores = make(images).log_prob(images)
        assert scores.dtype == torch.float64
        torch.testing.assert_close(scores, make(x[:, :4]).log_prob(x[:, :4]))


def test_full_does_not_depend_on_units(x):
    units = torch.tensor([1e-6, 1e6, 1.0, 1e3, 1e-3], dtype=torch.float64)
    scaled = x.double() * units
    expected = Gaussian.full(x).log_prob(x) - units.log().sum()
    torch.testing.assert_close(Gaussian.full(scaled).log_prob(scaled), expected)


def test_singular_covariances_are_refused(x):
    constant = x.clone()
    constant[:, 2] = 0.1
    for make in (Gaussian.full, Gaussian.diagonal):
        with pytest.raises(ValueError, match=r"singular: constant features \(index 2\)"):
            make(constant)
    dependent = torch.cat([x, x[:, :1] - 2 * x[:, 1:2]], 1).double()
    with pytest.raises(ValueError, match="singular: some features are linear functions"):
        Gaussian.full(dependent)
    with pytest.raises(ValueError, match="5 rows of 5 features is singular"):
        Gaussian.full(x[:5])


@pytest.mark.parametrize("wrong", [None, "a", [[1.0]], np.ones((3, 2))])
def test_what_is_no_tensor_is_refused(x, wrong):
    for call in (Gaussian.full, Gaussian.diagonal, Gaussian.full(x).log_prob):
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got "):
            call(wrong)


def test_unusable_rows_are_refused(x):
    with pytest.raises(ValueError, match=r"x must have shape \(N, ...\), got \(300,\)"):
        Gaussian.full(x[:, 0])
    with pytest.raises(ValueError, match="finite"):
        Gaussian.full(x.log())
    with pytest.raises(ValueError, match="two or more rows"):
        Gaussian.diagonal(x[:1])
    with pytest.raises(ValueError, match="5 features"):
        Gaussian.full(x).log_prob(x[:, :4])
