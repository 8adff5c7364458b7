"""Log-likelihoods of held-out rows: on the scale of the flow, on the raw scale, in bits/dim."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .checks import check_count, check_seed, check_type
from .exact.grid import round_to_grid
from .flow import NICE
from .preprocessing import Preprocessing
from .runtime.devices import device_of, dtype_of
from .runtime.precision import at_precision
from .runtime.ranks import Ranks

SCORING_ROWS = 8192
OBJECTIVES = ("density", "cells")


class Density(Protocol):
    """Anything with a log-density: a flow or a baseline."""

    def log_prob(self, x: Tensor, /) -> Tensor: ...


class CellDensity(nn.Module):
    """The density that is constant within each cell of a flow's grid, and integrates to its
    :meth:`nicefast.NICE.cell_log_prob`: ``log p(x) = log P(cell) - D log(grid)``.

    Cells are ``[n grid, (n + 1) grid)``, the values that level n is dequantised to: so its mean
    over the noise is the discrete likelihood of the levels, with no bound in between.

    >>> from nicefast import NICE
    >>> flow = NICE(2, hidden=(8,), grid=0.25)
    >>> x = torch.tensor([[0.3, 0.4], [0.26, 0.49]])
    >>> CellDensity(flow).log_prob(x) == flow.cell_log_prob(x.new_full((2, 2), 0.25)) + math.log(16)
    tensor([True, True])
    """

    def __init__(self, model: NICE) -> None:
        super().__init__()
        if model.grid is None:
            raise ValueError("model must have a grid: take model.with_grid(grid)")
        self.model = model

    def log_prob(self, x: Tensor) -> Tensor:
        grid = self.model.grid
        assert grid is not None
        corner = round_to_grid(x, grid, down=True)
        return self.model.cell_log_prob(corner) - self.model.features * math.log(grid)


def density(model: NICE, objective: str) -> Density:
    """What an objective of OBJECTIVES maximises: ``"density"`` the flow's, ``"cells"`` that of
    its grid's cells, both in nats. ValueError for another one, and for cells without a grid.

    >>> from nicefast import NICE
    >>> type(density(NICE(2, hidden=(8,), grid=0.25), "cells")).__name__
    'CellDensity'
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    return model if objective == "density" else CellDensity(model)


class Evaluation(NamedTuple):
    """What :func:`evaluate` found, in nats per row.

    Attributes:
        log_prob: mean log-density of the preprocessed rows, the scale that the paper reports.
        standard_error: of that mean, over rows.
        raw_log_prob: mean log-density on the raw scale: of the values as they came, of
            ``level + u`` for discrete data, of ``value + spacing u`` in columns with a spacing.
        bits_per_dim: ``-raw_log_prob / (D ln 2)`` for discrete data, otherwise None.
        draw_spread: standard deviation of the mean from one noise draw to the next; 0 for one.
        rows, draws, seed: how many rows, noise draws for each, and the seed of the noise.
    """

    log_prob: float
    standard_error: float
    raw_log_prob: float
    bits_per_dim: float | None
    draw_spread: float
    rows: int
    draws: int
    seed: int


def evaluate(
    model: Density, rows: Tensor, preprocessing: Preprocessing, draws: int = 16, seed: int = 0
) -> Evaluation:
    """Mean log-likelihood of ``rows``, in float32 or better whatever is in force.

    Rows with columns of integers or other multiples of a spacing are dequantised ``draws`` times
    with noise from ``seed``; a row's log-likelihood is the mean of ``log p`` over its draws. Rows
    of real values are scored once.

    Args:
        model: a flow or a baseline, of preprocessed rows.
        rows: (N, \\*event_shape), raw: as a data set holds them.
        preprocessing: from there to what ``model`` sees.
        draws: noise draws for each row.
        seed: of the noise.

    Raises:
        TypeError: rows are no tensor, or preprocessing is no Preprocessing.
        ValueError: fewer than two rows or one draw, or a log-likelihood that is not finite.

    >>> from nicefast.baselines import Gaussian
    >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    >>> evaluate(Gaussian.full(x), x, Preprocessing(())).bits_per_dim is None
    True
    """
    check_type("rows", rows, Tensor, "a torch.Tensor")
    check_type("preprocessing", preprocessing, Preprocessing, "a Preprocessing")
    draws = check_count("draws", draws, 1)
    seed = check_seed(seed)
    if rows.ndim < 1 or len(rows) < 2:
        raise ValueError(f"rows must be two or more, got shape {tuple(rows.shape)}")
    discrete = not rows.is_floating_point()
    draws = draws if preprocessing.noisy else 1
    with at_precision("float32", device_of(model)):
        scores, raw = row_scores(model, rows, preprocessing, draws, seed)
    mean = scores.mean(0)
    if not mean.isfinite().all():
        raise ValueError(f"log_prob is not finite in {int((~mean.isfinite()).sum())} rows")
    per_draw = scores.mean(1)
    in_raw = raw.mean().item()
    return Evaluation(
        log_prob=mean.mean().item(),
        standard_error=mean.std().item() / math.sqrt(len(rows)),
        raw_log_prob=in_raw,
        bits_per_dim=-in_raw / (rows[0].numel() * math.log(2)) if discrete else None,
        draw_spread=per_draw.std().item() if draws > 1 else 0.0,
        rows=len(rows),
        draws=draws,
        seed=seed,
    )


@torch.no_grad()
def row_scores(
    model: Density,
    rows: Tensor,
    preprocessing: Preprocessing,
    draws: int,
    seed: int,
    own: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """``log p`` of rows ``own`` (all) in every draw, (draws, N), on the flow's and the raw scale.

    float64, on the CPU; row i of N has in draw d the noise of row ``d * N + i`` of the seed's
    stream, whatever rows are asked for.
    """
    todo = range(len(rows))[own or slice(None)]
    device, dtype = device_of(model), dtype_of(model)
    found, raw = [], []
    for draw in range(draws):
        for start in range(todo.start, todo.stop, SCORING_ROWS):
            batch = rows[start : min(start + SCORING_ROWS, todo.stop)].to(device)
            x, log_det = preprocessing.forward(batch, seed, draw * len(rows) + start)
            scores = model.log_prob(x.to(dtype)).double()
            found.append(scores.cpu())
            raw.append((scores + log_det).cpu())
    shape = (draws, len(todo))
    if not found:
        return (torch.empty(shape, dtype=torch.float64, device="cpu"),) * 2
    return torch.cat(found).view(shape), torch.cat(raw).view(shape)


def mean_score(
    model: Density,
    rows: Tensor,
    preprocessing: Preprocessing,
    draws: int,
    seed: int,
    ranks: Ranks,
    weights: Tensor | None = None,
) -> float:
    """Mean ``log p`` over draws and rows, by the rows' weights (N,); each rank scores its share."""
    own = ranks.share(len(rows))
    scores, _ = row_scores(model, rows, preprocessing, draws, seed, own)
    mass: float = len(rows)
    if weights is not None:
        weights = weights.double().cpu()
        scores, mass = scores * weights[own], weights.sum().item()
    total = ranks.sum(scores.sum().to(device_of(model)))
    return total.item() / (draws * mass)
