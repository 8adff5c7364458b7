"""How a flow is trained, as plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..checks import as_integer, check_choice, is_number, plain_number
from ..evaluation import OBJECTIVES
from ..runtime.precision import MATMUL
from .optimisers import SCHEDULES

STARTS = ("data", "paper")
OPTIMISERS = ("adam", "adamw", "rmsprop")


@dataclass(frozen=True)
class Recipe:
    """How a flow is trained. All of it is recorded with a run.

    Attributes:
        epochs: at most so many passes over the training rows.
        patience: epochs without a better validation score before stopping.
        batch_size: rows in a step, over all processes.
        objective: ``"density"``: the flow's likelihood; ``"cells"``: that of the cells of its
            grid, which is what a lossless coder needs (:class:`nicefast.evaluation.CellDensity`).
        start: ``"data"``: every conditioner's last layer zero, log_scale from the data
            (:func:`init_scaling`); ``"paper"``: all weights uniform in +-0.01, log_scale zero.
        scale_limit: most that ``"data"`` sets log_scale to.
        optimiser: ``"adam"``, ``"adamw"`` or ``"rmsprop"`` (the released code's).
        lr: the learning rate, in the course that ``schedule`` gives it.
        schedule: ``"constant"``, ``"cosine"`` (to zero at the last epoch) or ``"exponential"``.
        warmup: steps in which it rises from zero.
        lr_decay: factor of each step, for ``"exponential"``.
        lr_least: what it never falls below.
        momentum: Adam's first beta, RMSProp's momentum.
        momentum_epochs: epochs between which the momentum rises from 0; () for from the start.
        averaging_squares: Adam's second beta, RMSProp's averaging.
        eps: Adam's epsilon, RMSProp's stabiliser.
        weight_decay: decoupled (adamw), on weight matrices alone.
        clip: most that the norm of the whole gradient may be; 0 for no limit.
        averaging: decay, for each step, of the weights' moving average, which is what is
            validated and kept; 0 for none. It has a short memory at first.
        average_every: steps from one update of it to the next.
        validation_draws: noise draws for each validation row.
        precision: of products in training and validation: ``"float32"``, ``"tf32"``, ``"bf16"``.

    >>> Recipe(lr=-1.0)
    Traceback (most recent call last):
        ...
    ValueError: lr must be positive and finite, got -1.0
    """

    epochs: int = 120
    patience: int = 40
    batch_size: int = 128
    objective: str = "density"
    start: str = "data"
    scale_limit: float = math.inf
    optimiser: str = "adamw"
    lr: float = 4e-3
    schedule: str = "constant"
    warmup: int = 0
    lr_decay: float = 1.0
    lr_least: float = 0.0
    momentum: float = 0.9
    momentum_epochs: tuple[int, ...] = ()
    averaging_squares: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1.0
    clip: float = 0.0
    averaging: float = 0.995
    average_every: int = 1
    validation_draws: int = 4
    precision: str = "float32"

    def __post_init__(self) -> None:
        def check(name: str, right: bool, expected: str) -> None:
            if not right:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int) and not isinstance(field.default, bool):
                check(field.name, as_integer(value) is not None, "an integer")
                object.__setattr__(self, field.name, as_integer(value))
            if isinstance(field.default, float):
                check(field.name, is_number(value), "a number")
                object.__setattr__(self, field.name, plain_number(value))
        for name in ("epochs", "patience", "batch_size", "average_every", "validation_draws"):
            check(name, getattr(self, name) >= 1, "at least 1")
        for name, known in (
            ("objective", OBJECTIVES),
            ("start", STARTS),
            ("optimiser", OPTIMISERS),
            ("schedule", SCHEDULES),
            ("precision", tuple(MATMUL)),
        ):
            check_choice(name, getattr(self, name), known)
        check("lr", 0 < self.lr < math.inf, "positive and finite")
        for name in ("eps", "warmup", "lr_least", "weight_decay", "clip"):
            check(name, 0 <= getattr(self, name) < math.inf, "non-negative and finite")
        for name in ("momentum", "averaging_squares", "averaging"):
            check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        check("lr_decay", 0 < self.lr_decay <= 1, "in (0, 1]")
        check("scale_limit", not math.isnan(self.scale_limit), "a number")
        ramp = self.momentum_epochs
        check(
            "momentum_epochs",
            isinstance(ramp, tuple | list)
            and all(map(is_number, ramp))
            and (len(ramp) == 0 or (len(ramp) == 2 and 0 <= ramp[0] < ramp[1])),
            "empty or two epochs, the first below the second",
        )
        if self.weight_decay and self.optimiser != "adamw":
            raise ValueError(f"weight_decay needs the optimiser adamw, got {self.optimiser!r}")
