"""Fitting a flow to a data set, and scoring it on rows it has not seen."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .data import Dataset, dequantise
from .flow import NICE

SCORING_BATCH = 8192


class Density(Protocol):
    """Anything with a log-density: a flow or a baseline."""

    def log_prob(self, x: Tensor, /) -> Tensor: ...


class Evaluation(NamedTuple):
    """What :func:`evaluate` found: nats per row, and bits per dimension for k-level data."""

    log_prob: float
    standard_error: float
    bits_per_dim: float | None
    rows: int
    draws: int
    seed: int


class Epoch(NamedTuple):
    """One epoch: mean log-likelihoods in nats per row, and the seconds since fitting began.

    ``train`` is the mean over the minibatches as they went by, under the weights of the moment;
    ``validation`` is that of the averaged weights.
    """

    epoch: int
    train: float
    validation: float
    seconds: float


@dataclass(frozen=True)
class History:
    """How a fit went. ``best`` is the epoch whose averaged weights the model now has."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    stopped_early: bool


@torch.no_grad()
def init_scaling(model: NICE, x: Tensor) -> None:
    """Set ``log_scale`` to ``log(prior standard deviation / data standard deviation)``.

    With couplings that begin near the identity, latent features then begin at the prior's own
    spread, which makes training several times shorter than beginning at ``log_scale = 0``.

    Args:
        model: the flow.
        x: (N, \\*event_shape), two or more rows.

    Raises ValueError where a feature of ``x`` is constant or not finite.

    >>> model = NICE(2, hidden=(8,), prior="normal")
    >>> init_scaling(model, torch.tensor([[0.0, 10.0], [2.0, 30.0], [1.0, 20.0]]))
    >>> model.scaling.log_scale.exp()
    tensor([1.0000, 0.1000], grad_fn=<ExpBackward0>)
    """
    deviation = x.flatten(1).double().std(0)
    unusable = (~(deviation > 0) | ~deviation.isfinite()).nonzero().flatten().tolist()
    if unusable:
        raise ValueError(
            f"x must vary in every feature and be finite, but {len(unusable)} of its "
            f"{len(deviation)} features do not, the first of them feature {unusable[0]}"
        )
    log_scale = model.scaling.log_scale
    log_scale.copy_(model.prior.stddev.double().log() - deviation.log().to(log_scale.device))


def evaluate(
    model: Density, rows: Tensor, levels: int | None, draws: int = 16, seed: int = 0
) -> Evaluation:
    """Mean log-likelihood of ``rows`` in nats, its standard error, and bits per dimension.

    k-level rows are dequantised ``draws`` times with noise from ``seed`` and scaled to [0, 1); a
    row's log-likelihood is the mean of ``log p`` over its draws. The standard error is that of the
    mean over rows. ``bits/dim = -log_prob / (D ln 2) + log2(k)``. Continuous rows are scored as
    they are, once, and have no bits/dim.

    Args:
        model: a flow or a baseline.
        rows: (N, \\*event_shape), integers 0 .. k-1 or, where ``levels`` is None, real values.
        levels: k, or None.
        draws: noise draws for each row.
        seed: of the noise.

    Raises:
        ValueError: fewer than two rows or one draw, or a log-likelihood that is not finite.

    >>> from nicefast.baselines import Gaussian
    >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    >>> evaluate(Gaussian.full(x), x, levels=None).bits_per_dim is None
    True
    """
    if len(rows) < 2:
        raise ValueError(f"rows must be two or more, got {len(rows)}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    draws = 1 if levels is None else draws
    score = _row_scores(model, rows, levels, draws, seed)
    if not score.isfinite().all():
        raise ValueError(f"log_prob is not finite in {int((~score.isfinite()).sum())} rows")
    mean, error = score.mean().item(), score.std().item() / math.sqrt(len(rows))
    dims = rows[0].numel()
    bits = None if levels is None else math.log2(levels) - mean / (dims * math.log(2))
    return Evaluation(mean, error, bits, len(rows), draws, seed)


def fit(
    model: NICE,
    data: Dataset,
    *,
    epochs: int = 120,
    patience: int = 40,
    batch_size: int = 128,
    lr: float = 4e-3,
    weight_decay: float = 1.0,
    averaging: float = 0.995,
    validation_draws: int = 4,
    seed: int = 0,
    progress: Callable[[Epoch], None] | None = None,
) -> History:
    """Maximise the training rows' mean ``log_prob`` with AdamW; keep the best epoch's weights.

    Every epoch shuffles the training rows and dequantises them afresh. Validation scores an
    exponential moving average of the weights, with the same noise each time; the average of the
    best epoch is what ``model`` ends with, and after ``patience`` epochs without a better one
    training stops. The test rows are not looked at. Call :func:`init_scaling` first.

    Args:
        model: trained in place, on the device it is on.
        data: its training and validation rows.
        epochs: at most so many passes over the training rows.
        patience: epochs without a better validation score before stopping.
        batch_size: rows in a step.
        lr: Adam's learning rate.
        weight_decay: decoupled (AdamW), on weight matrices only.
        averaging: decay of the moving average for each step; 0 for none.
        validation_draws: noise draws for each validation row.
        seed: of the shuffling and all noise. On one machine, equal initial weights and seed give
            equal results.
        progress: called with every :class:`Epoch`.

    Raises:
        ValueError: an argument out of its range.
        FloatingPointError: the log-likelihood became non-finite; the message names the epoch.

    >>> from nicefast.data import load_data
    >>> data, model = load_data("digits"), NICE((1, 8, 8), hidden=(16,), couplings=2)
    >>> init_scaling(model, dequantise(data.train, data.levels))
    >>> history = fit(model, data, epochs=2)
    >>> [epoch.epoch for epoch in history.epochs]
    [1, 2]
    """
    _check("epochs", epochs, epochs >= 1, "at least 1")
    _check("patience", patience, patience >= 1, "at least 1")
    _check("batch_size", batch_size, batch_size >= 1, "at least 1")
    _check("lr", lr, 0 < lr < math.inf, "positive and finite")
    _check("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "non-negative and finite")
    _check("averaging", averaging, 0 <= averaging < 1, "in [0, 1)")
    _check("validation_draws", validation_draws, validation_draws >= 1, "at least 1")

    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others},
    ]
    optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)
    average = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    records: list[Epoch] = []
    best, step, start = None, 0, time.perf_counter()

    for number in range(1, epochs + 1):
        model.train()
        x = _real(data.train, data.levels, generator)
        x = x[torch.randperm(len(x), generator=generator)]
        total = 0.0
        for batch in _to_model(x, model, batch_size):
            log_prob = model.log_prob(batch).mean()
            optimiser.zero_grad()
            (-log_prob).backward()
            optimiser.step()
            step += 1
            # A short memory at first, or the initial weights would linger in the average.
            _average(average, model, min(averaging, step / (step + 9)) if averaging else 0.0)
            total += log_prob.item() * len(batch)
            finite = math.isfinite(total) and bool(model.scaling.log_scale.isfinite().all())
            _check_finite(finite, number, lr)

        held = _row_scores(average, data.validation, data.levels, validation_draws, seed).mean()
        _check_finite(bool(held.isfinite()), number, lr)
        record = Epoch(number, total / len(x), held.item(), time.perf_counter() - start)
        records.append(record)
        if best is None or record.validation > best.validation:
            best, state = record, copy.deepcopy(average.state_dict())
        if progress is not None:
            progress(record)
        if number - best.epoch >= patience:
            break

    assert best is not None
    model.load_state_dict(state)
    model.eval()
    return History(tuple(records), best, len(records) < epochs)


def _check(name: str, value: float, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}, got {value}")


def _check_finite(finite: bool, epoch: int, lr: float) -> None:
    if not finite:
        raise FloatingPointError(
            f"the log-likelihood ceased to be finite in epoch {epoch}: try a smaller lr than {lr:g}"
        )


@torch.no_grad()
def _row_scores(model: Density, rows: Tensor, levels: int | None, draws: int, seed: int) -> Tensor:
    """Each row's mean ``log p`` over its noise draws: (N,) float64 on the CPU."""
    draws = 1 if levels is None else draws
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for _ in range(draws):
        batches = _to_model(_real(rows, levels, generator), model)
        total += torch.cat([model.log_prob(x) for x in batches]).double().cpu()
    return total / draws


def _real(rows: Tensor, levels: int | None, generator: torch.Generator) -> Tensor:
    return rows if levels is None else dequantise(rows, levels, generator)


def _to_model(x: Tensor, model: Density, size: int = SCORING_BATCH) -> list[Tensor]:
    """``x`` in batches on the model's device and in its dtype (a baseline converts for itself)."""
    if not isinstance(model, nn.Module):
        return list(x.split(size))
    parameter = next(model.parameters())
    return [batch.to(parameter.device, parameter.dtype) for batch in x.split(size)]


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    update = get_ema_multi_avg_fn(decay)
    update(list(average.parameters()), list(model.parameters()), 0)
