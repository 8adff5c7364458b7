"""All models behind one interface: fitted to the same rows for the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import nicefast as nf
from nicefast.baselines import Gaussian
from nicefast.data import load_data
from nicefast.preprocessing import Preprocessing
from nicefast.training import PRESETS, Recipe, initialise
from nicefast.training.optimisers import make_optimiser

from . import gaussians
from .gan import Adversaries
from .gaussians import Mixture
from .training import Spent, Watch, batches, train
from .vae import VAE

DATA = {"digits": "digits", "mnist": "mnist", "tabular": "magic-gamma"}  # choice: data set
HELD_OUT = 1000  # test rows at most, for all models: IWAE_1000 decodes each row a thousand times
STATISTICS_ROWS = 20_000  # noise is drawn for closed forms until there are so many rows
NETWORKS: dict[str, tuple[int, tuple[int, ...]]] = {  # latent features and hidden units: VAE, GAN
    "digits": (16, (256, 256)),
    "mnist": (32, (512, 512)),
    "tabular": (6, (128, 128)),
    "plane": (2, (64, 64)),
}
GAN_LR, VAE_LR = 5e-4, 2e-3
NAMES = ("diagonal Gaussian", "full Gaussian", "mixture", "VAE", "GAN", "NICE")
Sample = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Task:
    """Raw rows and the way to x; ``sizes`` names the networks, ``preset`` how NICE is trained."""

    name: str
    sizes: str
    train: Tensor
    validation: Tensor
    test: Tensor
    levels: int | None
    preprocessing: Preprocessing
    flow: Mapping[str, Any]
    recipe: Recipe

    @classmethod
    def of_data(cls, choice: str) -> Task:
        data, preset = load_data(DATA[choice]), PRESETS[choice]
        steps = Preprocessing.fit(list(preset.preprocessing), data.train, data.levels, 0)
        test = data.test[:HELD_OUT]
        rows = (data.train, data.validation[:HELD_OUT], test)
        return cls(data.name, choice, *rows, data.levels, steps, preset.model, preset.recipe)

    @classmethod
    def of_plane(cls, name: str, train: Tensor, validation: Tensor, test: Tensor) -> Task:
        """Rows in the plane, standardised."""
        flow = {"hidden": (64, 64), "couplings": 8, "prior": "normal", "partition": "alternating"}
        recipe = replace(PRESETS["digits"].recipe, lr=2e-3, weight_decay=1e-3, batch_size=256)
        steps = Preprocessing.fit(["standardise"], train)
        return cls(name, "plane", train, validation, test, None, steps, flow, recipe)

    def x(self, raw: Tensor, seed: int, draws: int = 1) -> Tensor:
        """Preprocessed rows, with so many draws of noise one after the other."""
        draws = 1 if raw.is_floating_point() else draws
        drawn = (self.preprocessing.forward(raw, seed, d * len(raw))[0] for d in range(draws))
        return torch.cat(list(drawn))


@dataclass(frozen=True)
class Fitted:
    """One model: its ``sample``, and its density where it is known exactly."""

    name: str
    model: Any
    sample: Sample
    density: Callable[[Tensor], Tensor] | None
    parameters: int
    spent: Spent
    choice: str = ""


def fit(name: str, task: Task, seed: int, seconds: float, steps: int | None = None) -> Fitted:
    """Fit one of ``NAMES`` for ``seconds``, or with exactly ``steps``; a seed gives one result.

    ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if name.endswith("Gaussian"):
            return _gaussian(name, task, seed)
        if name == "mixture":
            return _mixture(task, seed, seconds, steps)
        return {"VAE": _vae, "GAN": _gan, "NICE": _nice}[name](task, seed, seconds, steps)


def _statistics(task: Task, seed: int) -> Tensor:
    return task.x(task.train, seed, max(1, min(16, STATISTICS_ROWS // len(task.train))))


def _gaussian(name: str, task: Task, seed: int) -> Fitted:
    watch = Watch()
    x = _statistics(task, seed)
    kind = "full" if name == "full Gaussian" else "diag"
    model = Gaussian.full(x) if kind == "full" else Gaussian.diagonal(x)
    spent = watch.spent(1, len(x))
    count = gaussians.parameters(len(model.mean), kind)
    return Fitted(
        name, model, lambda n, g: gaussians.sample(model, n, g), model.log_prob, count, spent
    )


def _mixture(task: Task, seed: int, seconds: float, steps: int | None) -> Fitted:
    x, held = _statistics(task, seed), task.x(task.validation, seed)
    model = Mixture(x, held, seed, seconds, steps)
    count = gaussians.parameters(x[0].numel(), model.covariance, model.components)
    choice = f"{model.components} components, {model.covariance}"
    return Fitted("mixture", model, model.sample, model.log_prob, count, model.spent, choice)


def _vae(task: Task, seed: int, seconds: float, steps: int | None) -> Fitted:
    latent, hidden = NETWORKS[task.sizes]
    model = VAE.of_mlps(task.x(task.train, seed), latent, hidden)
    optimiser = make_optimiser(model, "adamw", VAE_LR, 0.9, 0.999, 1e-8, 0.1)

    def held(averaged: nn.Module) -> float:
        generator = torch.Generator().manual_seed(seed)
        return averaged.elbo(validation, generator).mean().item()  # type: ignore[operator]

    def step(x: Tensor) -> None:
        optimiser.zero_grad()
        (-model.elbo(x).mean()).backward()
        optimiser.step()

    validation = task.x(task.validation, seed)
    return _trained("VAE", model, step, task, seed, seconds, steps, held)


def _gan(task: Task, seed: int, seconds: float, steps: int | None) -> Fitted:
    latent, hidden = NETWORKS[task.sizes]
    game = Adversaries(task.x(task.train, seed), latent, hidden, GAN_LR)
    return _trained("GAN", game.generator, game.step, task, seed, seconds, steps, None)


def _nice(task: Task, seed: int, seconds: float, steps: int | None) -> Fitted:
    recipe, x = task.recipe, _statistics(task, seed)
    model = nf.NICE(tuple(task.train.shape[1:]), **task.flow)
    initialise(model, recipe.start, x, recipe.scale_limit)
    optimiser = make_optimiser(
        model,
        recipe.optimiser,
        recipe.lr,
        recipe.momentum,
        recipe.averaging_squares,
        recipe.eps,
        recipe.weight_decay,
    )

    def step(x: Tensor) -> None:
        optimiser.zero_grad()
        (-model.log_prob(x).mean()).backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()

    def held(averaged: nn.Module) -> float:
        return averaged.log_prob(validation).mean().item()  # type: ignore[operator]

    validation = task.x(task.validation, seed)
    return _trained("NICE", model, step, task, seed, seconds, steps, held)


def _trained(
    name: str,
    model: Any,
    step: Callable[[Tensor], None],
    task: Task,
    seed: int,
    seconds: float,
    steps: int | None,
    validate: Callable[[nn.Module], float] | None,
) -> Fitted:
    count = sum(p.numel() for p in model.parameters())
    rows = batches(task.train, task.preprocessing, task.recipe.batch_size, seed)
    spent = train(model, step, rows, seconds, steps, validate)
    if name != "NICE":
        return Fitted(name, model, model.sample, None, count, spent)

    def sample(n: int, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            return model.sample(n, generator=generator).flatten(1)

    return Fitted(name, model, sample, model.log_prob, count, spent)
