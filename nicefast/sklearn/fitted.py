"""Fitted densities of rows on the raw scale, and their bytes.

Rows are float64 NumPy arrays (N, D) on the scale of ``x + spacing u`` in columns with a spacing,
which is 1 for integers; log-densities float64 (N,), in nats.
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..baselines import Gaussian
from ..checks import as_integer, check_choice, check_count, check_type, is_number
from ..data import Dataset
from ..evaluation import SCORING_ROWS
from ..flow import NICE
from ..io.checkpoint import load, save
from ..preprocessing import Preprocessing
from ..runtime.devices import usable_device
from ..runtime.precision import at_precision
from ..training import Epoch, History, Recipe, fit, initialise
from .columns import Array, dequantising, moments, standardising, with_noise

DTYPES = {"float64": torch.float64, "float32": torch.float32}
SEEDS = 2**31 - 1  # below which the estimators draw theirs
VERBOSE_EVERY = 10  # epochs to a line, with verbose=1
LEAST_SPLIT = 20  # rows: with fewer, the training rows are those of validation


class RawDensity(Protocol):
    """Anything with a log-density of raw rows."""

    def log_prob(self, rows: Array) -> Array: ...

    def state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class FittedFlow:
    """A flow and the way from raw rows to what it sees."""

    model: NICE
    columns: Preprocessing

    @torch.no_grad()
    def log_prob(self, rows: Array) -> Array:
        scale = self.model.scaling.log_scale
        found = np.empty(len(rows))
        with at_precision("float32", scale.device):
            for start in range(0, len(rows), SCORING_ROWS):
                part = slice(start, start + SCORING_ROWS)
                x, log_det = self.columns.exact(torch.from_numpy(rows[part]))
                scores = self.model.log_prob(x.to(scale.device, scale.dtype))
                found[part] = (scores.double().cpu() + log_det).numpy()
        return found

    def sample(self, n: int, seed: int) -> Array:
        generator = torch.Generator().manual_seed(seed)
        x = self.model.sample(n, batch_size=SCORING_ROWS, generator=generator)
        x = x.double().cpu()
        noisy = self.columns.noisy
        rows: Array = (self.columns.levels(x) if noisy else self.columns.inverse(x)).numpy()
        return rows

    def state(self) -> dict[str, Any]:
        """Plain values and the bytes of two safetensors files."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("model", "preprocessing")]
            save(self.model, files[0])
            self.columns.save(files[1])
            contents = [file.read_bytes() for file in files]
        return {"model": contents[0], "preprocessing": contents[1]}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device | str | None) -> FittedFlow:
        """What :meth:`state` gave; on the CPU where ``device`` is a GPU and there is none."""
        if torch.device(device or "cpu").type == "cuda" and not torch.cuda.is_available():
            device = "cpu"
        with tempfile.TemporaryDirectory() as folder:
            for name in ("model", "preprocessing"):
                Path(folder, name).write_bytes(state[name])
            model = load(Path(folder, "model"), device)
            columns = Preprocessing.load(Path(folder, "preprocessing"))
        if "noisy" in state:  # written by 0.1.0: numbers of the columns of integers
            spacing = spacings_of(state["noisy"], model.features)
            columns = Preprocessing((*dequantising(spacing).steps, *columns.steps))
        return cls(model, columns)


@dataclass(frozen=True)
class FittedGaussian:
    """A normal density in float64."""

    gaussian: Gaussian

    @classmethod
    def fit(cls, rows: Array, ridge: Array, weights: Array | None = None) -> FittedGaussian:
        """Mean and covariance by maximum likelihood, ``ridge`` (D,) added to the variances.

        A row counts as many times as its weight says. ValueError where the covariance is singular
        all the same.
        """
        mean, _ = moments(rows, weights)
        centred = rows - mean
        counted = centred if weights is None else centred * weights[:, None]
        mass = len(rows) if weights is None else weights.sum()
        covariance = torch.from_numpy(counted.T @ centred / mass + np.diag(ridge))
        scale, failed = torch.linalg.cholesky_ex(covariance)
        diagonal = scale.diagonal() ** 2  # what is left of a variance, given those before it
        if failed or bool((diagonal <= _LEAST * covariance.diagonal()).any()):
            raise ValueError(
                f"the covariance of {len(rows)} rows of {len(mean)} features is singular"
            )
        return cls(Gaussian(torch.from_numpy(mean), scale))

    def log_prob(self, rows: Array) -> Array:
        found: Array = self.gaussian.log_prob(torch.from_numpy(rows)).numpy()
        return found

    def state(self) -> dict[str, Any]:
        return {"mean": self.gaussian.mean.numpy(), "scale": self.gaussian.scale.numpy()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> FittedGaussian:
        return cls(Gaussian(*(torch.tensor(state[n], device="cpu") for n in ("mean", "scale"))))


class Trained(NamedTuple):
    """A fitted flow, how the fit went, and the numbers of the rows that it was not trained on."""

    flow: FittedFlow
    history: History
    held: Array


def fit_flow(
    rows: Array,
    spacing: Array,
    options: dict[str, Any],
    seed: int,
    name: str = "NICE",
    weights: Array | None = None,
    validation: tuple[Array, Array | None] | None = None,
) -> Trained:
    """Fit a flow to raw rows (N, D), N and D at least 2, no column constant but noisy ones.

    Args:
        rows: float64.
        spacing: (D,), width of the noise that a column gets afresh in every epoch; 0 for none.
        options: the estimators' hyperparameters, by name.
        seed: of everything random.
        name: what is being fitted, for the lines that ``verbose`` prints.
        weights: (N,), above zero, on any scale; None for equal ones.
        validation: rows that choose the epoch, and their weights; None for a share of ``rows``.

    Raises:
        ValueError, TypeError: a hyperparameter that is not what it should be, by its name.
        FloatingPointError: the likelihood ceased to be finite.
    """
    options = {key: _plain(value) for key, value in options.items()}
    share, dtype = options["validation_fraction"], options["dtype"]
    if not is_number(share) or not 0 <= share < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, got {share!r}")
    check_choice("dtype", dtype, DTYPES)
    recipe = Recipe(
        **{key: options[key] for key in ("epochs", "patience", "batch_size", "lr", "weight_decay")},
        averaging=0.995,
        validation_draws=1,
    )
    model = _model(rows.shape[1], options, seed)
    columns = dequantising(spacing)
    if options["standardise"]:
        columns = standardising(rows, spacing, weights)
    whole = torch.from_numpy(rows)
    scaled = None if weights is None else torch.from_numpy(weights / weights.mean())
    initialise(model, "data", columns.forward(whole, seed)[0], weights=scaled)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator, device="cpu")
    held = order[:0]
    if validation is None and share and len(rows) >= LEAST_SPLIT:
        held = order[: min(max(1, round(share * len(rows))), len(rows) - 1)]
    train = order[len(held) :]
    judges = held if len(held) else order
    chosen, theirs = whole[judges], None if scaled is None else scaled[judges]
    if validation is not None:
        chosen = torch.from_numpy(validation[0])
        theirs = None if validation[1] is None else torch.from_numpy(validation[1])
    both = None
    if scaled is not None or theirs is not None:
        own = _ones(len(train)) if scaled is None else scaled[train] / scaled[train].mean()
        both = (own, _ones(len(chosen)) if theirs is None else theirs)
    data = Dataset(name, None, whole[train], chosen, whole[:0], weights=both)
    level = check_verbose(options["verbose"])
    report = _printer(name, level, recipe.epochs) if level else None
    history = fit(model, data, columns, recipe, seed=seed, progress=report)
    if level:
        best = history.best
        print(
            f"[{name}] {len(history.epochs)} epochs, the best was {best.epoch}: "
            f"validation {best.validation:.4f} nats"
        )
    fitted = FittedFlow(model.to(DTYPES[dtype]).eval(), columns)
    return Trained(fitted, history, held.numpy())


def mean_log_prob(
    density: Callable[[Array], Array], rows: Array, spacing: Array, draws: int
) -> Array:
    """Mean over noise draws of ``density`` of rows with noise; one draw where none is needed."""
    draws = _plain(draws)
    draws = check_count("noise_draws", draws, 1)
    draws = draws if spacing.any() else 1
    total = density(with_noise(rows, spacing))
    for draw in range(1, draws):
        total = total + density(with_noise(rows, spacing, draw))
    return total / draws


def spacings_of(columns: Sequence[int] | Array, features: int) -> Array:
    """(features,): 1 in the ``columns`` of integers, 0 elsewhere."""
    found = np.zeros(features)
    found[list(columns)] = 1.0
    return found


def _ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64, device="cpu")


def _model(features: int, options: dict[str, Any], seed: int) -> NICE:
    names = ("couplings", "prior", "partition", "activation", "dropout")
    try:
        hidden = tuple(operator.index(width) for width in options["hidden"])
    except TypeError:
        raise TypeError(f"hidden must be integers >= 1, got {options['hidden']!r}") from None
    device = "cpu" if options["device"] is None else options["device"]
    check_type("device", device, (str, torch.device), "a device or its name")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        given = {n: options[n] for n in names}
        model = NICE(features, hidden=hidden, **given, device="cpu", dtype=torch.float32)
    return model.to(usable_device(device))


def check_verbose(verbose: Any) -> int:
    """0 for silence, 1 or 2; False is 0 and True is 1. ValueError for anything else.

    >>> check_verbose(True), check_verbose(2)
    (1, 2)
    """
    level = int(verbose) if isinstance(verbose, bool) else as_integer(verbose)
    if level is None or not 0 <= level <= 2:
        raise ValueError(f"verbose must be 0, 1 or 2, got {verbose!r}")
    return level


def _printer(name: str, level: int, last: int) -> Callable[[Epoch], None]:
    def report(epoch: Epoch) -> None:
        if level == 1 and epoch.epoch % VERBOSE_EVERY and epoch.epoch not in {1, last}:
            return
        print(
            f"[{name}] epoch {epoch.epoch}: train {epoch.train:.4f}, "
            f"validation {epoch.validation:.4f} nats, {epoch.seconds:.1f} s"
        )

    return report


def _plain(value: Any) -> Any:
    """A NumPy number, as a search over np.arange gives it, as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


_LEAST = 16 * float(np.finfo(np.float64).eps)
