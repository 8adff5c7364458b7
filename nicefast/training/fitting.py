"""Fitting a flow to a data set: what a recipe says, in one process or several, to be resumed."""

from __future__ import annotations

import copy
import hashlib
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import as_integer, check_number, check_path, check_type
from ..data import Dataset
from ..evaluation import density, mean_score
from ..flow import NICE
from ..preprocessing import Preprocessing
from ..runtime.precision import at_precision
from ..runtime.ranks import Ranks
from .epochs import Epoch, Progress
from .optimisers import average, learning_rate, make_optimiser
from .recipe import Recipe
from .snapshots import read_snapshot, write_snapshot
from .steps import Step

TRAINING_NOISE = 1 << 62  # added to the seed: no row is ever scored with noise it was trained on
CHECK_EVERY = 50  # steps from one look at the likelihood to the next, where a look makes a GPU wait

CLOSE = 1e-6  # of a preprocessing's numbers, relatively: so far may two machines be apart


@dataclass(frozen=True)
class History:
    """How a fit went. ``best`` is the epoch whose averaged weights the model now has."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    stopped_early: bool


def fit(
    model: NICE,
    data: Dataset,
    preprocessing: Preprocessing,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    progress: Callable[[Epoch], None] | None = None,
    snapshot: str | Path | None = None,
    snapshot_seconds: float = 60.0,
    resume: bool = False,
) -> History:
    """Maximise the training rows' mean ``log_prob``; ``model`` ends with the best epoch's weights.

    Where ``data`` has weights, the mean is ``sum_i w_i log p(x_i) / N``, and so is validation's.

    Every epoch shuffles the training rows and dequantises them afresh, with noise from a counter.
    Validation scores the moving average of the weights, with the same noise each time. The test
    rows are not looked at. Call :func:`initialise` or :func:`init_scaling` first.

    Within a process group of ``torch.distributed`` each rank takes its share of every batch, and
    the result is that of one process, to rounding (with dropout: another draw of it).

    Args:
        model: trained in place, on the device it is on.
        data: its training and validation rows.
        preprocessing: from raw rows to what the flow sees.
        recipe: how.
        seed: of the shuffling, dropout and all noise. On one machine, equal initial weights, seed
            and number of threads give equal results.
        progress: called with every :class:`Epoch`; on resumption, with the earlier ones first.
        snapshot: file to keep what is needed to go on after an interruption, written atomically.
        snapshot_seconds: least time from one to the next.
        resume: go on from ``snapshot``: on a CPU, with the very same results.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: no training row; weights that are negative, not finite, all zero or not one a
            row; a seed out of range; a snapshot that is missing, damaged, or of another fit.
        FloatingPointError: the log-likelihood became non-finite; names the step.

    >>> from nicefast.data import load_data
    >>> from nicefast.training import initialise
    >>> data, model = load_data("digits"), NICE((1, 8, 8), hidden=(16,), couplings=2)
    >>> steps = Preprocessing.fit(["dequantise"], data.train, data.levels)
    >>> initialise(model, "data", steps.forward(data.train)[0])
    >>> [epoch.epoch for epoch in fit(model, data, steps, Recipe(epochs=2)).epochs]
    [1, 2]
    """
    check_type("model", model, NICE, "a nicefast.NICE")
    check_type("data", data, Dataset, "a Dataset")
    check_type("preprocessing", preprocessing, Preprocessing, "a Preprocessing")
    check_type("recipe", recipe, Recipe | None, "a Recipe")
    seed = check_training_seed(seed)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function, got {type(progress).__name__}")
    if snapshot is not None:
        check_path("snapshot", snapshot)
    check_number("snapshot_seconds", snapshot_seconds, finite=False)
    run = _Fit(model, data, preprocessing, recipe or Recipe(), seed, snapshot, snapshot_seconds)
    if resume:
        run.restore()
    devices = [run.device] if run.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices, device_type="cuda"),
        at_precision(run.recipe.precision, run.device),
    ):
        if progress is not None:
            for epoch in run.records:
                progress(epoch)
        while not run.done:
            epoch = run.epoch()
            if progress is not None:
                progress(epoch)
    return run.finish()


def check_training_seed(seed: Any) -> int:
    """0 <= seed < 2^62, as Python's own integer: the noise of training begins there."""
    found = as_integer(seed)
    if found is None or not 0 <= found < TRAINING_NOISE:
        raise ValueError(f"seed must be from 0 to 2^62 - 1, got {seed!r}")
    return found


class _Fit:
    """The state of a fit: everything that a snapshot keeps."""

    def __init__(
        self,
        model: NICE,
        data: Dataset,
        preprocessing: Preprocessing,
        recipe: Recipe,
        seed: int,
        snapshot: str | Path | None,
        snapshot_seconds: float,
    ) -> None:
        if not len(data.train):
            raise ValueError("data must have training rows, got none")
        self.model, self.data, self.preprocessing = model, data, preprocessing
        self.recipe, self.seed = recipe, seed
        self.ranks = Ranks.here()
        self.device = model.scaling.log_scale.device
        self.dtype = model.scaling.log_scale.dtype
        self.check_every = 1 if self.device.type == "cpu" else CHECK_EVERY
        self.rows = _resident(data.train, self.device)
        weights, self.validation_weights = _checked_weights(data)
        self.weights = None if weights is None else weights.to(self.rows.device, self.dtype)
        self.steps_each = -(-len(data.train) // recipe.batch_size)
        self.average = copy.deepcopy(model).eval()
        self.step = Step(
            model,
            make_optimiser(
                model,
                recipe.optimiser,
                self._lr_holder(),
                0.0 if recipe.momentum_epochs else recipe.momentum,
                recipe.averaging_squares,
                recipe.eps,
                recipe.weight_decay,
            ),
            recipe.clip,
            self.ranks,
            recipe.objective,
        )
        self.snapshot = None if snapshot is None else Path(snapshot)
        self.snapshot_seconds = snapshot_seconds
        self.taken = 0  # steps
        self.records: list[Epoch] = []
        self.best: Epoch | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.before = 0.0  # seconds of earlier processes
        self.started = self.saved = time.perf_counter()

    def _lr_holder(self) -> float | Tensor:
        # where a graph is replayed, it reads the rate from the device
        if self.device.type != "cuda":
            return 1.0
        return torch.zeros((), dtype=torch.float32, device=self.device)

    @property
    def done(self) -> bool:
        number = len(self.records)
        waited = number - self.best.epoch if self.best else 0
        return number >= self.recipe.epochs or waited >= self.recipe.patience

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def epoch(self) -> Epoch:
        recipe, began = self.recipe, self.seconds
        number = len(self.records) + 1
        self.model.train()
        generator = torch.Generator().manual_seed(_mixed(self.seed, number))
        shuffled = torch.randperm(len(self.rows), generator=generator, device="cpu")
        order = shuffled.to(self.rows.device).split(recipe.batch_size)
        first = self.taken - (number - 1) * self.steps_each
        for i in range(first, self.steps_each):
            self._take(order[i])
            if self.taken % self.check_every == 0:
                self._check_finite()
                if i + 1 < self.steps_each and self.ranks.world == 1:  # sums are each rank's own
                    self._save(again=False)
        self._check_finite()
        if not recipe.averaging:
            self.average.load_state_dict(self.model.state_dict())
        held = mean_score(
            density(self.average, recipe.objective),
            self.data.validation,
            self.preprocessing,
            recipe.validation_draws if self.preprocessing.noisy else 1,
            self.seed,
            self.ranks,
            self.validation_weights,
        )
        if not math.isfinite(held):
            raise FloatingPointError(self._not_finite(f"validation after step {self.taken}"))
        train = self.step.take_total() / len(self.rows)
        done = (self.steps_each - first) * recipe.batch_size
        record = Epoch(number, train, held, self.seconds, done / (self.seconds - began))
        self.records.append(record)
        if self.best is None or held > self.best.validation:
            self.best = record
            self.best_weights = {k: v.clone() for k, v in self.average.state_dict().items()}
        self._save(again=self.done)
        return record

    def _take(self, chosen: Tensor) -> None:
        recipe = self.recipe
        lr = learning_rate(
            self.taken,
            recipe.epochs * self.steps_each,
            recipe.lr,
            recipe.schedule,
            recipe.warmup,
            recipe.lr_decay,
            recipe.lr_least,
        )
        momentum = None
        if recipe.momentum_epochs:
            low, high = recipe.momentum_epochs
            risen = (self.taken / self.steps_each - low) / (high - low)
            momentum = recipe.momentum * min(max(risen, 0.0), 1.0)
        # dropout is a function of the step: nothing random need be kept for a resumption
        torch.manual_seed(_mixed(self.seed, self.taken * self.ranks.world + self.ranks.rank))
        share = self.ranks.share(len(chosen))
        consumed = len(self.rows) * len(self.records)
        place = self.taken - len(self.records) * self.steps_each
        consumed += place * recipe.batch_size + share.start
        raw = self.rows[chosen[share]].to(self.device)
        x, _ = self.preprocessing.forward(raw, TRAINING_NOISE + self.seed, consumed)
        weights = None
        if self.weights is not None:
            weights = self.weights[chosen[share]].to(self.device)
        full = len(chosen) == recipe.batch_size
        self.step(x.to(self.dtype), lr, momentum, len(chosen), full, weights)
        self.taken += 1
        if recipe.averaging and self.taken % recipe.average_every == 0:
            # a short memory at first, or the initial weights would linger in the average
            decay = min(recipe.averaging, self.taken / (self.taken + 9))
            average(
                list(self.average.parameters()),
                list(self.model.parameters()),
                decay**recipe.average_every,
            )

    def _check_finite(self) -> None:
        if (bad := self.step.first_bad()) is not None:
            raise FloatingPointError(self._not_finite(f"step {bad + 1}"))

    def _not_finite(self, where: str) -> str:
        last = ""
        if self.snapshot is not None and self.snapshot.exists():
            last = f"; the last good state is {self.snapshot}"
        return (
            f"the log-likelihood ceased to be finite in {where} (epoch {len(self.records) + 1})"
            f"{last}: try a smaller lr than {self.recipe.lr:g}, more warmup, or clip"
        )

    def _save(self, again: bool) -> None:
        """A snapshot, where it is time for one, or ``again``."""
        if self.snapshot is None or self.ranks.rank:
            return
        if not again and time.perf_counter() - self.saved < self.snapshot_seconds:
            return
        tensors = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "best": self.best_weights,
            "step": self.step.state(),
            "preprocessing": self.preprocessing.tensors,
        }
        about = {
            "fit": self._identity(),
            "taken": self.taken,
            "records": self.records,
            "best": self.best,
            "seconds": self.seconds,
        }
        write_snapshot(self.snapshot, tensors, about)
        self.saved = time.perf_counter()

    def _identity(self) -> dict[str, Any]:
        """What a snapshot must agree on with the fit that it is resumed in."""
        return {
            "recipe": asdict(self.recipe) | {"momentum_epochs": list(self.recipe.momentum_epochs)},
            "model": self.model.configuration,
            "preprocessing": self.preprocessing.configuration,
            "data": [self.data.name, *(len(rows) for rows in self._splits())],
            "seed": self.seed,
            "digest": self.digest,
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all rows: others of the same shape are not those that the fit began with."""
        found = hashlib.sha256()
        for rows in self._splits():
            found.update(repr((str(rows.dtype), tuple(rows.shape))).encode())
            for piece in rows.split(1 << 16):
                found.update(
                    memoryview(piece.cpu().contiguous().view(-1).view(torch.uint8).numpy())
                )
        return found.hexdigest()

    def _splits(self) -> Iterator[Tensor]:
        yield from (self.data.train, self.data.validation, self.data.test)
        yield from self.data.weights or ()

    def restore(self) -> None:
        if self.snapshot is None:
            raise ValueError("resume needs the snapshot to go on from")
        tensors, about = read_snapshot(self.snapshot, self.device)
        own = self._identity()
        theirs = about.get("fit")
        if not isinstance(theirs, dict):
            raise ValueError(f"{self.snapshot} is damaged: it does not say of which fit it is")
        if "digest" not in theirs:  # as version 0.1.0 wrote it
            del own["digest"]
        for what, value in own.items():
            if theirs.get(what) == value:
                continue
            if what == "digest":
                raise self._another("the data it began with have other values")
            found, expected = _differing(theirs.get(what), value)
            raise self._another(f"its {what} is {found}, expected {expected}")
        if "digest" in theirs and not _is_close(
            tensors.get("preprocessing", {}), self.preprocessing.tensors
        ):
            raise self._another("its preprocessing was fitted to other values")
        try:
            self._restore(tensors, Progress.of(about))
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as problem:
            said = textwrap.shorten(str(problem), 300)
            raise ValueError(f"{self.snapshot} is damaged: {said}") from None

    def _another(self, why: str) -> ValueError:
        return ValueError(f"{self.snapshot} is of another fit: {why}")

    def _restore(self, tensors: dict[str, dict[str, Tensor]], progress: Progress) -> None:
        """To this state; where anything about it is wrong, nothing is changed."""
        if missing := {"model", "average", "step"} - set(tensors):
            raise ValueError(f"it has no tensors of {', '.join(sorted(missing))}")
        best = tensors.get("best", {})
        if (progress.best is None) != (not best):
            raise ValueError("it has a best epoch without its weights, or these without that")
        begun = len(progress.records) * self.steps_each
        if not begun <= progress.taken < begun + self.steps_each:
            raise ValueError(f"{progress.taken} steps in {len(progress.records)} epochs")
        trial = copy.deepcopy(self.average)
        for group in ("model", "average", "best"):
            if group in tensors:
                trial.load_state_dict(tensors[group])
                _check_weights(group, trial, tensors[group])
        self.step.restore(tensors["step"], progress.taken)
        self.model.load_state_dict(tensors["model"])
        self.average.load_state_dict(tensors["average"])
        self.best_weights = best
        self.taken, self.records = progress.taken, progress.records
        self.best, self.before = progress.best, progress.seconds

    def finish(self) -> History:
        assert self.best is not None
        self.model.load_state_dict(self.best_weights)
        self.model.eval()
        return History(tuple(self.records), self.best, len(self.records) < self.recipe.epochs)


def _differing(found: Any, expected: Any) -> tuple[str, str]:
    """Both, short enough for a line: of tables, what differs."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [k for k in {**expected, **found} if found.get(k) != expected.get(k)]
        found, expected = ({k: t[k] for k in keys if k in t} for t in (found, expected))
    return textwrap.shorten(str(found), 200), textwrap.shorten(str(expected), 200)


def _is_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether two preprocessings have the same tensors, to rounding: statistics of the same rows
    differ in their last digits from machine to machine."""
    if found.keys() != expected.keys():
        return False
    for key, own in expected.items():
        theirs = found[key].to(own.device)
        if (theirs.dtype, theirs.shape) != (own.dtype, own.shape):
            return False
        least = CLOSE * float(own.double().abs().max()) if own.numel() else 0.0
        if not torch.allclose(theirs.double(), own.double(), rtol=CLOSE, atol=least):
            return False
    return True


def _check_weights(group: str, model: NICE, given: Mapping[str, Tensor]) -> None:
    """ValueError for another dtype than the model's, and for values that are not finite."""
    for name, p in model.named_parameters(remove_duplicate=False):
        if given[name].dtype != p.dtype or not p.isfinite().all():
            raise ValueError(f"{group}.{name} is {given[name].dtype}, or not finite")


def _checked_weights(data: Dataset) -> tuple[Tensor | None, Tensor | None]:
    if data.weights is None:
        return None, None
    for weights, rows in zip(data.weights, (data.train, data.validation), strict=True):
        if weights.shape != (len(rows),):
            raise ValueError(
                f"data.weights must be one a row, ({len(rows)},), got {tuple(weights.shape)}"
            )
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
            raise ValueError("data.weights must be finite, none negative and some positive")
    return data.weights


def _mixed(seed: int, number: int) -> int:
    """A seed for each number: of shuffling by the epoch, of dropout by the step."""
    return (seed * 1_000_003 + number) % 2**63


def _resident(rows: Tensor, device: torch.device) -> Tensor:
    """The rows on the device where they take up at most half of what is free there."""
    if device.type != "cuda":
        return rows
    free, _ = torch.cuda.mem_get_info(device)
    return rows.to(device) if rows.numel() * rows.element_size() <= free // 2 else rows
