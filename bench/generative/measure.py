"""What is measured of a fitted model: likelihoods, bounds, rates, samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nicefast.evaluation import evaluate
from nicefast.preprocessing import bits_per_dim

from .models import Fitted, Task
from .quality import Judge
from .vae import VAE, bound

WEIGHTS = (1, 64, 1000)  # importance samples of the bounds
ELBO_SAMPLES = 16  # of the ELBO with its divergence in closed form
TIMED_ROWS = {"sample": 4096, "density": 4096, 1: 4096, 64: 512, 1000: 64}

Record = dict[str, Any]


def measure(fitted: Fitted, task: Task, judge: Judge, seed: int, draws: int) -> Record:
    """One model and seed, as JSON holds it; log-likelihoods are mean nats on the scale of x."""
    spent = fitted.spent
    record: Record = {
        "parameters": fitted.parameters,
        "steps": spent.steps,
        "seconds": spent.seconds,
        "cpu_seconds": spent.cpu,
        "train_rate": spent.rows / spent.seconds,
        "choice": fitted.choice,
    }
    generator = torch.Generator().manual_seed(seed)
    made = fitted.sample(len(task.test), generator)
    record |= judge(task.x(task.test, seed), made.float())._asdict()
    record["sample_rate"] = rate(lambda n: fitted.sample(n, generator), TIMED_ROWS["sample"])
    if isinstance(fitted.model, VAE):
        record |= _bounds(fitted.model, task, seed, draws)
    elif fitted.density is not None:
        found = evaluate(fitted.model, task.test, task.preprocessing, draws, seed)
        record["log_prob"] = {"exact": found.log_prob}
        record["bits_per_dim"] = {"exact": found.bits_per_dim}
        rows = _repeated(task, seed, TIMED_ROWS["density"])
        with torch.no_grad():
            record["density_rate"] = {"exact": rate(lambda n: fitted.density(rows[:n]), len(rows))}  # type: ignore[misc]
    return record


def real(task: Task, judge: Judge, seed: int) -> Record:
    """The floor: as many training rows, drawn by the seed, against the test rows."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.train), generator=generator)[: len(task.test)]
    # noise of another seed than the test rows'
    made = task.x(task.train[chosen], seed + 1_000_000)
    return judge(task.x(task.test, seed), made)._asdict()


def rate(call: Callable[[int], Any], rows: int) -> float:
    """Rows a second, the best of three calls."""
    call(min(rows, 16))
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        call(rows)
        taken.append(time.perf_counter() - started)
    return rows / min(taken)


@torch.no_grad()
def _bounds(model: VAE, task: Task, seed: int, draws: int) -> Record:
    """ELBO and IWAE_k, of the same noise as the other models' likelihoods; one set of weights."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {"ELBO": [], **{f"IWAE_{k}": [] for k in WEIGHTS}}
    rows, raw = task.test, 0.0
    for draw in range(1 if rows.is_floating_point() else draws):
        x, log_det = task.preprocessing.forward(rows, seed, draw * len(rows))
        raw = log_det.mean().item()
        for _ in range(ELBO_SAMPLES):
            found["ELBO"].append(model.elbo(x, generator))
        log_weights = model.log_weights(x, max(WEIGHTS), generator)
        for k in WEIGHTS:
            found[f"IWAE_{k}"].append(bound(log_weights, k))
    means = {name: torch.cat(values).mean().item() for name, values in found.items()}
    if not all(map(math.isfinite, means.values())):
        raise ValueError(f"a bound is not finite: {means}")
    discrete = not rows.is_floating_point()
    features = rows[0].numel()
    timed = _repeated(task, seed, TIMED_ROWS["density"])
    rates = {"ELBO": rate(lambda n: model.elbo(timed[:n], generator), len(timed))}
    for k in WEIGHTS:
        rates[f"IWAE_{k}"] = rate(
            lambda n, k=k: bound(model.log_weights(timed[:n], k, generator), k), TIMED_ROWS[k]
        )
    return {
        "log_prob": means,
        "bits_per_dim": {
            name: bits_per_dim(mean + raw, features) if discrete else None
            for name, mean in means.items()
        },
        "density_rate": rates,
    }


def _repeated(task: Task, seed: int, rows: int) -> Tensor:
    x = task.x(task.test, seed)
    return x.repeat(-(-rows // len(x)), *([1] * (x.ndim - 1)))[:rows]
