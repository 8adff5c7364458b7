"""The plane: moons, and Bayes' rule on height and weight as two Gaussians.

``p(class | x) = p(x | class) p(class) / sum over classes``; the least error that any rule can have
is the integral of the smaller of the classes' ``p(x | class) p(class)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nicefast.baselines import Gaussian
from nicefast.data import toy, toy_log_prob

from . import gaussians
from .models import Fitted, Task, fit
from .vae import VAE, bound

LogDensity = Callable[[Tensor], Tensor]
MEANS = ((176.00, 64.86), (184.29, 91.14))
COVARIANCES = (((49.67, 17.29), (17.29, 17.13)), ((29.57, 13.39), (13.39, 31.14)))
BOX = (145.0, 215.0, 45.0, 120.0)  # height and weight: all but a millionth of both classes
ROWS, TEST_ROWS, GRID = 2000, 100_000, 1000


class Bayes(NamedTuple):
    """Both classes' densities: true, fitted Gaussians, NICE; error of each rule, by its name."""

    ways: dict[str, tuple[LogDensity, LogDensity]]
    errors: dict[str, float]
    rows: tuple[Tensor, Tensor]
    fitted: tuple[Fitted, Fitted]


def true_classes() -> tuple[Gaussian, Gaussian]:
    """The two Gaussians of height (cm) and weight (kg)."""
    one, other = (
        Gaussian(
            torch.tensor(mean, dtype=torch.float64),
            torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)),
        )
        for mean, covariance in zip(MEANS, COVARIANCES, strict=True)
    )
    return one, other


@torch.no_grad()
def posterior(classes: Sequence[LogDensity], x: Tensor) -> Tensor:
    """p(class 1 | x), (N,) float64, the classes being equally likely beforehand."""
    zero, one = (log_prob(x).double() for log_prob in classes)
    return torch.sigmoid(one - zero)


def bayes_error(classes: Sequence[LogDensity], box: Sequence[float] = BOX) -> float:
    """The integral of min(p(x|0), p(x|1)) / 2, by the midpoint rule on a fine grid of the box."""
    points, area = grid(box, GRID)
    zero, one = (log_prob(points).double() for log_prob in classes)
    return torch.minimum(zero, one).exp().sum().item() * area / 2


def grid(box: Sequence[float], side: int) -> tuple[Tensor, float]:
    """Middles of ``side^2`` cells, rows upwards, (side^2, 2) float64, and the area of a cell."""
    x0, x1, y0, y1 = box
    middles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = torch.meshgrid(y0 + (y1 - y0) * middles, x0 + (x1 - x0) * middles, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1), (x1 - x0) * (y1 - y0) / side**2


def on_raw(task: Task, fitted: Fitted) -> LogDensity:
    """Log-density on the scale of the rows as they came; for a VAE IWAE_64, with a fixed seed."""

    def log_prob(rows: Tensor) -> Tensor:
        with torch.no_grad():
            x, log_det = task.preprocessing.forward(rows.float())
            if isinstance(fitted.model, VAE):
                generator = torch.Generator().manual_seed(0)
                return bound(fitted.model.log_weights(x, 64, generator), 64) + log_det
            assert fitted.density is not None
            return fitted.density(x).double() + log_det

    return log_prob


def moons_task(seed: int) -> Task:
    rows = toy("moons", 2 * ROWS, seed)
    return Task.of_plane("moons", rows[:ROWS], rows[ROWS : -ROWS // 2], rows[-ROWS // 2 :])


def moons_log_prob(x: Tensor) -> Tensor:
    return toy_log_prob("moons", x)


def height_weight(seed: int, seconds: float, steps: Sequence[int] | None) -> Bayes:
    """Learn both classes from ``ROWS`` rows each; errors are of ``TEST_ROWS`` new rows a class."""
    truth = true_classes()
    generator = torch.Generator().manual_seed(seed)
    rows = [gaussians.sample(c, 2 * ROWS, generator).float() for c in truth]
    test = [gaussians.sample(c, TEST_ROWS, generator) for c in truth]
    gaussian = [Gaussian.full(r[:ROWS]) for r in rows]
    tasks = [Task.of_plane("class", r[:ROWS], r[ROWS:], r[ROWS:]) for r in rows]
    flows = [
        fit("NICE", task, seed, seconds, None if steps is None else steps[i])
        for i, task in enumerate(tasks)
    ]
    ways = {
        "true densities": (truth[0].log_prob, truth[1].log_prob),
        "fitted Gaussians": (gaussian[0].log_prob, gaussian[1].log_prob),
        "one NICE per class": (on_raw(tasks[0], flows[0]), on_raw(tasks[1], flows[1])),
    }
    errors = {"Bayes-optimal, by quadrature": bayes_error(ways["true densities"])}
    for name, classes in ways.items():
        wrong = (posterior(classes, test[0]) > 0.5, posterior(classes, test[1]) <= 0.5)
        errors[name] = torch.stack(wrong).double().mean().item()
    return Bayes(ways, errors, (rows[0][:ROWS], rows[1][:ROWS]), (flows[0], flows[1]))
