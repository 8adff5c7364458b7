"""NICE beside Gaussians, a mixture, a VAE and a GAN: same split, same time, one command.

    python -m bench generative [--data digits|mnist|tabular] [--budget SECONDS]

Writes table.md, results.json and PNGs to bench/results/generative/DATA. mnist and tabular (the
gamma telescope) are looked for where NICEFAST_DATA says.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nicefast.plots import is_image

from . import pictures, planar
from .measure import measure, real
from .models import DATA, NAMES, Fitted, Task, fit
from .quality import Judge
from .table import table

OUT = Path(__file__).resolve().parents[1] / "results" / "generative"
SHOWN, STRIP = 36, 12  # samples of each model, reconstructed rows
MOONS = ("full Gaussian", "mixture", "VAE", "GAN", "NICE")


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(sys.argv[1:] if argv is None else argv)
    try:
        task = Task.of_data(options.data)
        steps = _recorded(options.replay, options.data, options.seeds)
    except (ValueError, ImportError) as error:
        print(f"python -m bench generative: {error}", file=sys.stderr)
        return 2
    out = options.out or OUT / options.data
    out.mkdir(parents=True, exist_ok=True)
    results = run(task, options, steps, out)
    command = f"python -m bench generative --data {options.data} --budget {options.budget:g}"
    for name, usual in (("seeds", 3), ("draws", 4)):
        if (given := getattr(options, name)) != usual:
            command += f" --{name} {given}"
    if options.replay:
        command += f" --replay {options.replay}"
    text = table(results, command)
    for name, content in (
        ("results.json", json.dumps(results, indent=1) + "\n"),
        ("table.md", text),
    ):
        partial = out / f"{name}.partial"
        partial.write_text(content)
        partial.replace(out / name)
    print(text)
    return 0


def run(
    task: Task, options: argparse.Namespace, steps: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Fit, measure and draw; what is in results.json."""
    models: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    floor, first = [], {}
    judge = Judge(task.x(task.train, 0))
    for seed in range(options.seeds):
        for name in NAMES:
            fitted = fit(name, task, seed, options.budget, steps.get(f"{name}/{seed}"))
            record = measure(fitted, task, judge, seed, options.draws)
            models[name].append(record)
            said = {k: round(v, 2) for k, v in record.get("log_prob", {}).items()}
            print(f"seed {seed}, {name}: {record['steps']} steps, {said}", file=sys.stderr)
            if not seed:
                first[name] = fitted
        floor.append(real(task, judge, seed))
    draw(task, first, out)
    return {
        "data": task.name,
        "choice": options.data,
        "budget": options.budget,
        "seeds": options.seeds,
        "draws": options.draws,
        "threads": torch.get_num_threads(),
        "rows": [len(task.train), len(task.validation), len(task.test)],
        "features": task.train[0].numel(),
        "models": models,
        "real": floor,
        "reconstruction": _errors(task, first),
        "plane": plane(options.budget / 3, steps, out),
    }


def plane(seconds: float, steps: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Moons and Bayes' rule, with seed 0 and ``seconds`` a fit."""
    task = planar.moons_task(0)
    maps: dict[str, Any] = {"true density": planar.moons_log_prob}
    levels = {"true": planar.moons_log_prob(task.test).mean().item()}
    taken = {}
    for name in MOONS:
        fitted = fit(name, task, 0, seconds, steps.get(f"moons {name}/0"))
        taken[f"moons {name}"] = [fitted.spent.steps]
        if name == "GAN":
            made = fitted.sample(100_000, torch.Generator().manual_seed(0)).float()
            maps["GAN, 100,000 samples"] = task.preprocessing.inverse(made)
        else:
            log_prob = planar.on_raw(task, fitted)
            maps[f"{name}, IWAE_64" if name == "VAE" else name] = log_prob
            levels[name] = log_prob(task.test).mean().item()
    pictures.densities(maps, "true density", (-2.25, 2.25, -1.5, 1.5), out / "moons.png")
    known = [steps.get(f"class {c}/0") for c in (0, 1)]
    found = planar.height_weight(0, seconds, None if None in known else known)
    pictures.bayes(found, out / "bayes.png")
    taken |= {f"class {c}": [f.spent.steps] for c, f in enumerate(found.fitted)}
    return {"moons": levels, "errors": found.errors, "steps": taken}


def draw(task: Task, fitted: Mapping[str, Fitted], out: Path) -> None:
    """Samples of every model beside real rows; images reconstructed and inverted."""
    shown = SHOWN if is_image(tuple(task.train.shape[1:])) else 2000
    panels = {"real rows": _shown(task, task.x(task.test[:shown], 0))}
    for name, one in fitted.items():
        made = one.sample(shown, torch.Generator().manual_seed(0)).float()
        panels[name] = _shown(task, made)
        if name == "VAE" and shown == SHOWN:
            z = one.model.prior(shown, torch.Generator().manual_seed(0))
            with torch.no_grad():
                panels["VAE, without the noise of p(x|z)"] = _shown(task, one.model.decode(z)[0])
    pictures.samples(panels, out / "samples.png")
    if shown == SHOWN:
        x = task.x(task.test[:STRIP], 0)
        strips = {"test rows": x} | _brought_back(x, fitted)
        pictures.reconstructions(
            {name: _shown(task, rows) for name, rows in strips.items()}, out / "reconstructions.png"
        )


def _shown(task: Task, x: Tensor) -> Tensor:
    raw = task.preprocessing.inverse(x.reshape(len(x), *task.train.shape[1:]))
    if raw.ndim != 4 or task.levels is None:
        return raw
    return raw.floor().clamp(0, task.levels - 1) / (task.levels - 1)


@torch.no_grad()
def _brought_back(x: Tensor, fitted: Mapping[str, Fitted]) -> dict[str, Tensor]:
    flow = fitted["NICE"].model
    return {
        "VAE: location of p(x|z) at the mean of q(z|x)": fitted["VAE"].model.reconstruct(x),
        "NICE: inverse of forward": flow.inverse(flow.forward(x)[0])[0],
    }


def _errors(task: Task, fitted: Mapping[str, Fitted]) -> dict[str, float]:
    x = task.x(task.test, 0)
    deviation = task.x(task.train, 0).std(0)
    return {
        name.partition(":")[0]: ((back - x) / deviation).square().mean().sqrt().item()
        for name, back in _brought_back(x, fitted).items()
    }


def _recorded(path: Path | None, choice: str, seeds: int) -> dict[str, int]:
    """Steps of a finished run, by "model/seed"; ValueError where it is none of this data."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
        models = {name: [r["steps"] for r in found["models"][name]] for name in NAMES}
        every = models | found["plane"]["steps"]
        data, recorded = found["choice"], found["seeds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--replay {path} is no results.json of this command: {error}") from None
    if data != choice or recorded < seeds:
        raise ValueError(
            f"--replay {path} is of {data} with {recorded} seeds, expected {choice} with {seeds}"
        )
    return {f"{name}/{seed}": n for name, counts in every.items() for seed, n in enumerate(counts)}


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench generative",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=tuple(DATA), default="digits")
    parser.add_argument("--budget", type=float, default=12.0, help="seconds of a fit; default 12")
    parser.add_argument("--seeds", type=int, default=3, help="fits of each model; default 3")
    parser.add_argument("--draws", type=int, default=4, help="noise draws of a test row; default 4")
    parser.add_argument("--replay", type=Path, help="results.json whose steps are taken again")
    parser.add_argument("--out", type=Path, help="folder of what is written")
    options = parser.parse_args(list(argv))
    if not 0 < options.budget < math.inf:
        parser.error(f"--budget must be positive and finite, got {options.budget:g}")
    for name in ("seeds", "draws"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options
