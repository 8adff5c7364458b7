"""Run folders: what a finished job leaves behind, complete or not at all."""

from __future__ import annotations

import csv
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._version import __version__
from .checkpoint import load, save
from .data import Dataset
from .flow import NICE
from .plots import is_image, plot_learning_curve, plot_samples
from .training import Evaluation, History, evaluate

NOISE_PROTOCOL = (
    "Levels 0 .. k-1 become x = (level + u) / k with u uniform on [0, 1). A row's log-likelihood "
    "is the mean of log p(x) in nats over the noise draws, on the scale of [0, 1); the standard "
    "error is that of the mean over rows. bits/dim = -log_prob / (D ln 2) + log2(k)."
)
GRID, POINTS = 100, 2000


@dataclass(frozen=True)
class Run:
    """Everything that is to be kept of one fit.

    ``held_out`` and ``validation`` give the evaluation of each density by its name, ``NICE`` among
    those of ``held_out``; ``config`` is what the fit was asked for, as plain values.
    """

    model: NICE
    data: Dataset
    history: History
    held_out: Mapping[str, Evaluation]
    validation: Mapping[str, Evaluation]
    config: Mapping[str, Any]


@contextmanager
def new_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder beside ``out`` that takes the name ``out`` once the block has succeeded.

    Where the block raises (an interrupt too) the folder is removed, and whatever ``out`` was
    before is still there.

    Raises ValueError where ``out`` exists and ``overwrite`` is false, or where it is not a run
    folder (one with a result.json): nothing else is ever replaced.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with new_folder(Path(place, "run")) as folder:
    ...         _ = (folder / "result.json").write_text("{}")
    ...     sorted(path.name for path in Path(place).iterdir())
    ['run']
    """
    out = Path(out).resolve()
    if out.exists() and not overwrite:
        raise ValueError(f"--out {out} exists already; give --overwrite to replace it")
    if out.exists() and not (out / "result.json").is_file():
        raise ValueError(f"--out {out} exists and is not a run folder, so it is not overwritten")

    beside = f".{out.name}.{secrets.token_hex(4)}"
    folder, old = out.with_name(f"{beside}.new"), out.with_name(f"{beside}.old")
    folder.mkdir(parents=True)
    try:
        yield folder
        try:
            if out.exists():
                out.rename(old)
            folder.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_run(folder: Path, run: Run) -> list[str]:
    """Write a run's five files into ``folder``, and give back their names.

    model.safetensors, result.json (configuration, seeds, versions, split sizes, noise protocol,
    figures), history.csv, samples.png, learning_curve.png. The saved model is then loaded again
    and must score the test rows exactly as ``run.held_out["NICE"]``; RuntimeError otherwise.
    """
    seed = int(run.config["seed"])
    save(run.model, folder / "model.safetensors")
    (folder / "result.json").write_text(json.dumps(_result(run), indent=2, allow_nan=False) + "\n")
    with (folder / "history.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", "train_nats", "validation_nats", "seconds"])
        table.writerows(run.history.epochs)

    data, shown = run.data, GRID if is_image(run.data.event_shape) else POINTS
    samples = run.model.sample(shown, generator=torch.Generator().manual_seed(seed)).cpu()
    real = data.train[:shown].float()
    if data.levels is not None:
        samples = (samples * data.levels).floor().clamp(0, data.levels - 1) / (data.levels - 1)
        real = real / (data.levels - 1)
    plot_samples(real, samples, folder / "samples.png", data.name)
    plot_learning_curve(run.history, run.validation, folder / "learning_curve.png", data.name)

    score = run.held_out["NICE"]
    reloaded = load(folder / "model.safetensors", device=run.model.scaling.log_scale.device)
    again = evaluate(reloaded, data.test, data.levels, score.draws, score.seed)
    if again != score:
        raise RuntimeError(f"the saved model scores {again.log_prob} nats, not {score.log_prob}")
    return sorted(os.listdir(folder))


def _result(run: Run) -> dict[str, Any]:
    data, history, score = run.data, run.history, run.held_out["NICE"]
    return {
        "config": dict(run.config),
        "model": run.model.configuration,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "data": {
            "name": data.name,
            "levels": data.levels,
            "event_shape": data.event_shape,
            "rows": {
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(data.test),
            },
        },
        "noise": None
        if data.levels is None
        else {"draws": score.draws, "seed": score.seed, "protocol": NOISE_PROTOCOL},
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
        },
    }
