"""Run folders: a fit from its configuration to what it leaves behind, whole or resumable."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import plots
from ._version import __version__
from .baselines import Gaussian
from .data import Dataset
from .evaluation import Density, Evaluation, density, evaluate, row_scores
from .flow import NICE
from .io.checkpoint import load, save
from .io.files import naming, sync, sync_names, written
from .preprocessing import Preprocessing
from .runtime.devices import usable_device
from .runtime.ranks import Ranks
from .training import Configuration, Epoch, History, fit, initialise

NOISE_PROTOCOL = (
    "Discrete values become x = low + (level + u) / k (high - low), or level + u in tables, or "
    "value + spacing u in columns of multiples of a spacing, with u uniform on [0, 1). A row's "
    "log-likelihood is the mean of log p(x) in nats over the noise draws: log_prob on the scale "
    "that the flow sees, raw_log_prob on that of level + u or value + spacing u. The standard "
    "error is that of the mean over rows; draw_spread is the standard deviation of the mean from "
    "one draw to the next. bits/dim = -raw_log_prob / (D ln 2)."
)
GRID, POINTS = 100, 2000
STATISTICS_ROWS = 20_000  # noise is drawn for the baselines until there are so many rows
CHECKED_ROWS = 512  # that the saved model must score as the model did
CONFIG, SNAPSHOT, METRICS = "config.toml", "snapshot.safetensors", "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """A finished fit: ``held_out`` and ``validation`` evaluate each density by its name, ``NICE``
    among those of ``held_out``."""

    model: NICE
    data: Dataset
    preprocessing: Preprocessing
    history: History
    held_out: Mapping[str, Evaluation]
    validation: Mapping[str, Evaluation]
    configuration: Configuration
    notes: tuple[str, ...] = ()


class Watcher(Protocol):
    """Who is told how a fit goes on."""

    def begins(self, data: Dataset, model: NICE, preprocessing: Preprocessing) -> None: ...

    def epoch(self, epoch: Epoch) -> None: ...


@contextmanager
def run_folder(
    out: str | Path, overwrite: bool = False, resume: bool = False
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The folder ``OUT.unfinished``, and what gives it the name ``out`` when it is complete.

    Where the block raises, an unfinished folder with a snapshot stays, to be resumed; one without
    is removed. What ``out`` was before is still there until the very end.

    Raises ValueError where ``out`` exists and is not to be overwritten, or is no run folder (one
    with a result.json); where an unfinished one exists and is neither to be resumed nor
    overwritten; and where there is nothing to resume.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with run_folder(Path(place, "run")) as (folder, finish):
    ...         _ = (folder / "result.json").write_text("{}")
    ...         finish()
    ...     sorted(path.name for path in Path(place).iterdir())
    ['run']
    """
    out = Path(out).resolve()
    folder = out.with_name(f"{out.name}.unfinished")
    if out.exists() and not overwrite:
        raise ValueError(f"--out {out} exists already; give --overwrite to replace it")
    if out.exists() and not (out / "result.json").is_file():
        raise ValueError(f"--out {out} exists and is not a run folder, so it is not overwritten")
    unfinished = (folder / SNAPSHOT).is_file()
    if resume and not unfinished:
        raise ValueError(f"--resume: there is no {folder / SNAPSHOT} to go on from")
    if unfinished and not resume and not overwrite:
        raise ValueError(
            f"{folder} is there, unfinished: give --resume to go on with it, or --overwrite"
        )
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    def finish() -> None:
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        sync(folder)
        if out.exists():
            out.rename(old)
        try:
            folder.rename(out)
            sync_names(out.parent)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
        (out / SNAPSHOT).unlink(missing_ok=True)

    try:
        yield folder, finish
    except KeyboardInterrupt:
        kept = (folder / SNAPSHOT).is_file()
        raise KeyboardInterrupt(
            f", go on with --resume: {folder}" if kept else ", nothing was kept"
        ) from None
    finally:
        if folder.exists() and not (folder / SNAPSHOT).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def carry_out(
    configuration: Configuration,
    data: Dataset,
    folder: Path,
    watcher: Watcher,
    resume: bool = False,
) -> Run:
    """Fit what the configuration says to ``data`` and evaluate it; state is kept in ``folder``.

    In a process group every rank calls this; rank 0 alone writes. Errors as in
    :func:`nicefast.training.fit`.
    """
    config = configuration
    chief = Ranks.here().rank == 0
    if chief:
        _write_text(folder / CONFIG, config.toml())
    torch.manual_seed(config.seed)
    preprocessing = Preprocessing.fit(
        list(config.preprocessing), data.train, data.levels, config.seed
    )
    model = NICE(data.event_shape, **config.model, device="cpu", dtype=torch.float32)
    x = _training_rows(data, preprocessing, config)
    initialise(model, config.recipe.start, x, config.recipe.scale_limit)
    model.to(usable_device(config.device))
    watcher.begins(data, model, preprocessing)
    with open(folder / METRICS if chief else os.devnull, "w") as metrics:

        def told(epoch: Epoch) -> None:
            with naming(folder / METRICS):
                metrics.write(json.dumps(epoch._asdict()) + "\n")
                metrics.flush()
            watcher.epoch(epoch)

        history = fit(
            model,
            data,
            preprocessing,
            config.recipe,
            seed=config.seed,
            progress=told,
            snapshot=folder / SNAPSHOT,
            resume=resume,
        )
    baselines, notes = _baselines(x)
    fitted = density(model, config.recipe.objective)
    densities: dict[str, Density] = {"NICE": fitted, **baselines}

    def scores(rows: Tensor, which: Mapping[str, Density]) -> dict[str, Evaluation]:
        return {
            name: evaluate(density, rows, preprocessing, config.noise_draws, config.seed)
            for name, density in which.items()
        }

    held_out, validation = scores(data.test, densities), scores(data.validation, densities)
    return Run(model, data, preprocessing, history, held_out, validation, config, tuple(notes))


def write_run(folder: Path, run: Run) -> list[str]:
    """Write a run's files into ``folder``, and give back the names of all that are there.

    model.safetensors, preprocessing.safetensors, result.json (seeds, versions, split sizes, noise
    protocol, figures), samples.png, learning_curve.png, spectrum.png. The saved model is then
    loaded again and must score test rows exactly as ``run.model``; RuntimeError otherwise.
    """
    save(run.model, folder / "model.safetensors")
    run.preprocessing.save(folder / "preprocessing.safetensors")
    result = json.dumps(_result(run), indent=2, allow_nan=False)
    _write_text(folder / "result.json", result + "\n")
    data, seed = run.data, run.configuration.seed
    shown = GRID if plots.is_image(data.event_shape) else POINTS
    samples = run.model.sample(shown, generator=torch.Generator().manual_seed(seed)).cpu()
    real = data.train[:shown].float()
    samples = run.preprocessing.inverse(samples)
    if data.levels is not None:
        samples = samples.floor().clamp(0, data.levels - 1) / (data.levels - 1)
        real = real / (data.levels - 1)
    plots.plot_samples(real, samples, folder / "samples.png", data.name)
    others = {name: score for name, score in run.validation.items() if name != "NICE"}
    plots.plot_learning_curve(run.history, others, folder / "learning_curve.png", data.name)
    shape = data.event_shape if plots.is_image(data.event_shape) else None
    plots.plot_spectrum(run.model.scaling.log_scale.detach(), folder / "spectrum.png", shape)

    reloaded = load(folder / "model.safetensors", device=run.model.scaling.log_scale.device)
    steps = Preprocessing.load(folder / "preprocessing.safetensors")
    rows = data.test[:CHECKED_ROWS]
    before, after = (
        row_scores(model, rows, how, 1, seed)[0]
        for model, how in ((run.model, run.preprocessing), (reloaded, steps))
    )
    if not torch.equal(before, after):
        raise RuntimeError("the saved model does not score the test rows as the model did")
    return sorted(path.name for path in folder.iterdir() if path.name != SNAPSHOT)


def _write_text(path: Path, text: str) -> None:
    with written(path) as partial:
        partial.write_text(text)


def _training_rows(data: Dataset, preprocessing: Preprocessing, config: Configuration) -> Tensor:
    """Preprocessed training rows, for statistics: with several noise draws where rows are few."""
    draws = max(1, min(config.noise_draws, STATISTICS_ROWS // len(data.train)))
    draws = draws if preprocessing.noisy else 1
    return torch.cat(
        [
            preprocessing.forward(data.train, config.seed, draw * len(data.train))[0]
            for draw in range(draws)
        ]
    )


def _baselines(x: Tensor) -> tuple[dict[str, Gaussian], list[str]]:
    fitted, notes = {}, []
    for name, make in (("full Gaussian", Gaussian.full), ("diagonal Gaussian", Gaussian.diagonal)):
        try:
            fitted[name] = make(x)
        except ValueError as error:
            notes.append(f"no {name}: {error}")
    return fitted, notes


def _result(run: Run) -> dict[str, Any]:
    data, history, score = run.data, run.history, run.held_out["NICE"]
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        "preset": run.configuration.preset,
        "model": run.model.configuration,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "data": {
            "name": data.name,
            "levels": data.levels,
            "event_shape": data.event_shape,
            "rows": {name: len(rows) for name, rows in splits.items()},
        },
        "preprocessing": run.preprocessing.describe(),
        "noise": {
            "draws": score.draws,
            "seed": score.seed,
            "spacing": run.preprocessing.spacing,
            "protocol": NOISE_PROTOCOL,
        }
        if run.preprocessing.noisy
        else None,
        "fit": {
            "epochs": len(history.epochs),
            "best_epoch": history.best.epoch,
            "best_validation": history.best.validation,
            "stopped_early": history.stopped_early,
            "seconds": history.epochs[-1].seconds,
        },
        "held_out": {name: score._asdict() for name, score in run.held_out.items()},
        "validation": {name: score._asdict() for name, score in run.validation.items()},
        "versions": {
            "nicefast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": str(run.model.scaling.log_scale.device),
            "threads": torch.get_num_threads(),
            "processes": Ranks.here().world,
        },
    }
