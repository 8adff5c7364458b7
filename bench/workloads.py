"""What is measured: flows by name, over batch sizes, and what grows with what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .providers import PEERS, PROVIDERS, Shape

FLOWS = {
    "tabular-small": Shape(8, (64, 64), 65_536),
    "tabular": Shape(64, (256, 256, 256), 16_384),
    "MNIST": Shape(784, (1000,) * 5, 512),
    "CIFAR": Shape(3072, (2000,) * 4, 128),
    "small-batch": Shape(64, (128, 128), 128, couplings=8),
}
GROWTH = {
    "growth-rows": [Shape(64, (128, 128), 4**k) for k in range(4, 10)],
    "growth-features": [Shape(2**k, (128, 128), 4_096) for k in (3, 5, 7, 9, 11)],
    "growth-hidden": [Shape(64, (2**k, 2**k), 4_096) for k in range(5, 12)],
    "growth-couplings": [Shape(8, (64, 64), 4_096, 4**k) for k in range(1, 5)],
}
ELEMENTWISE = "elementwise"
ELEMENTWISE_SIZES = ((65_536, 784), (262_144, 64))  # rows, features
CASES = (*FLOWS, *GROWTH, ELEMENTWISE)
DIRECTIONS = ("log_prob", "training", "inverse", "sample")
BATCHES = {"cpu": range(2, 9), "cuda": range(4, 11)}  # powers of four, up to 65,536 and 1,048,576
SMALL = 256  # rows: below them a frozen flow takes part, as the answer for small batches
HEAVY = 3e11  # operations of one call: more is left to --full on a CPU
HEAVY_ON_A_GPU = 1.5e12  # the same on a GPU: 50 ms at 30 TFLOP/s, a modest rate in float32


class Task(NamedTuple):
    """One table: providers timed in turn at one thing."""

    case: str
    shape: Shape
    direction: str
    precision: str
    providers: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """What its records have in common."""
        shape = self.shape
        return {
            "case": self.case,
            "title": shape.title,
            "direction": self.direction,
            "precision": self.precision,
            "rows": shape.rows,
            "features": shape.features,
            "hidden": list(shape.hidden),
            "couplings": shape.couplings,
        }


def tasks(
    level: str,
    device: str,
    cases: Sequence[str] = CASES,
    directions: Sequence[str] = DIRECTIONS,
    precisions: Sequence[str] = ("float32", "bf16"),
    providers: Sequence[str] = tuple(PROVIDERS),
) -> Iterator[Task]:
    """The flows' tables of ``level`` quick, default or full that the filters let through.

    quick: float32, log_prob and training, one batch size, nothing compiled. default: every
    direction and precision at one batch size, log_prob over batch sizes, growth of nicefast beside
    plain PyTorch. full: everything over everything.
    """
    for case, base in FLOWS.items():
        if case not in cases or (level == "quick" and case == "CIFAR"):
            continue
        for shape in _batches(base, level, device):
            at_base = level == "quick" or shape.rows == base.rows
            for direction in directions:
                if level == "quick" and direction not in ("log_prob", "training"):
                    continue
                if level != "full" and not at_base and direction != "log_prob":
                    continue
                for precision in precisions:
                    if level != "full" and precision != "float32" and not at_base:
                        continue
                    if level == "quick" and precision != "float32":
                        continue
                    task = Task(case, shape, direction, precision, tuple(providers))
                    chosen = [
                        p
                        for p in providers
                        if _can(p, task)
                        and (level == "full" or _takes(p, task, level, device, at_base))
                    ]
                    yield task._replace(providers=tuple(chosen))
    for case, shapes in GROWTH.items():
        if case not in cases or level == "quick":
            continue
        few = [p for p in providers if level == "full" or p in ("plain", "nicefast")]
        for shape in shapes:
            for direction in directions:
                if direction in ("log_prob", "training") and _fits(shape, level, device):
                    task = Task(case, shape, direction, "float32", tuple(few))
                    yield task._replace(providers=tuple(p for p in few if _can(p, task)))


def is_headline(task: Task) -> bool:
    """Whether it is what is asked for most: a flow by name, its own batch size, float32, log_prob
    or training."""
    known = FLOWS.get(task.case) == task.shape
    return known and task.precision == "float32" and task.direction in ("log_prob", "training")


def _batches(base: Shape, level: str, device: str) -> Iterator[Shape]:
    """The base's batch size first, then powers of four."""
    if level == "quick":
        yield replace(base, rows=max(base.rows // 4, 64))
        return
    yield base
    if base is FLOWS["small-batch"]:
        return
    for k in BATCHES[device]:
        shape = replace(base, rows=4**k)
        if shape != base and _fits(shape, level, device) and (level == "full" or k % 2 == 0):
            yield shape


def _fits(shape: Shape, level: str, device: str) -> bool:
    if device != "cpu":
        return level == "full" or shape.operations(False) <= HEAVY_ON_A_GPU
    return shape.operations(False) <= (HEAVY / 10 if level == "default" else 10 * HEAVY)


def _can(provider: str, task: Task) -> bool:
    """Whether a provider is made for such a task: a frozen flow is for small batches, and has no
    gradients."""
    if PROVIDERS[provider].trains:
        return True
    return task.direction != "training" and task.shape.rows < SMALL


def _takes(provider: str, task: Task, level: str, device: str, at_base: bool) -> bool:
    """Whether a provider takes part below --full."""
    if provider in ("compile", "compile-max"):
        # compiling takes half a minute on a CPU: once for what is asked for most
        asked = task.precision == "float32" and task.direction in ("log_prob", "training")
        return provider == "compile" and level == "default" and at_base and asked
    return at_base or provider not in PEERS or device != "cpu"
