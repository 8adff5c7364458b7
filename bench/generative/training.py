"""One loop for all that is trained by steps, until the time is over or for a count of steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nicefast.preprocessing import Preprocessing
from nicefast.training.fitting import TRAINING_NOISE
from nicefast.training.optimisers import average

EVERY = 25  # steps from one look at the validation rows to the next
DECAY = 0.995  # of the weights' moving average


class Spent(NamedTuple):
    """What a fit took: steps (a mixture's candidates), rows, seconds by the clock and of CPU."""

    steps: int
    rows: int
    seconds: float
    cpu: float


class Watch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def spent(self, steps: int, rows: int) -> Spent:
        return Spent(steps, rows, self.seconds, time.process_time() - self._cpu)


def batches(raw: Tensor, steps: Preprocessing, size: int, seed: int) -> Iterator[Tensor]:
    """Rows shuffled and dequantised anew in every epoch, without end, as a seed gives them."""
    generator, consumed = torch.Generator().manual_seed(seed), 0
    while True:
        for chosen in torch.randperm(len(raw), generator=generator).split(size):
            yield steps.forward(raw[chosen], TRAINING_NOISE + seed, consumed)[0]
            consumed += len(chosen)


def train(
    module: nn.Module,
    step: Callable[[Tensor], None],
    rows: Iterator[Tensor],
    seconds: float,
    steps: int | None = None,
    validate: Callable[[nn.Module], float] | None = None,
) -> Spent:
    """Take steps for ``seconds``, validation included, or exactly ``steps`` of them.

    ``module`` ends with the moving average of its weights: the one that ``validate`` found best,
    or the last. What step n does depends on nothing but the seeds, so that a fit that the clock
    ended is repeated by its number of steps.
    """
    averaged, best = copy.deepcopy(module).eval(), -float("inf")
    kept = averaged.state_dict()
    taken = seen = 0

    def look() -> None:
        nonlocal best, kept
        with torch.no_grad():
            held = validate(averaged)  # type: ignore[misc]
        if held > best:
            best, kept = held, {k: v.clone() for k, v in averaged.state_dict().items()}

    module.train()
    watch = Watch()
    while taken == 0 or (watch.seconds < seconds if steps is None else taken < steps):
        x = next(rows)
        step(x)
        taken, seen = taken + 1, seen + len(x)
        decay = min(DECAY, taken / (taken + 9))
        average(list(averaged.parameters()), list(module.parameters()), decay)
        if validate is not None and taken % EVERY == 0:
            look()
    if validate is not None and taken % EVERY:
        look()
    spent = watch.spent(taken, seen)
    module.load_state_dict(kept)
    module.eval()
    return spent
