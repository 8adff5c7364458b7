"""The results as Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import sklearn
import torch

from .quality import COMPONENTS, NEIGHBOURS

COLUMNS = (
    "model", "log p(x), nats", "which", "bits/dim", "parameters", "fit, s", "of CPU", "steps",
    "training rows/s", "sampling rows/s", "density rows/s", "precision", "recall", "1000 MMD^2",
)  # fmt: skip

Records = Mapping[str, Sequence[Mapping[str, Any]]]


def table(results: Mapping[str, Any], command: str) -> str:
    """Of what command.py keeps in results.json: means over seeds +- their standard deviation."""
    models: Records = results["models"]
    lines = [list(COLUMNS), ["---"] + ["---:"] * 1 + ["---"] + ["---:"] * (len(COLUMNS) - 3)]
    for name, records in models.items():
        lines += _lines(name, records)
    floor = [f"{_over(results['real'], lambda r, k=key, b=by: r[k] * b, digits)}"
             for key, by, digits in _QUALITY]  # fmt: skip
    lines.append(["real training rows", *[""] * (len(COLUMNS) - 4), *floor])
    rows = results["rows"]
    parts = [
        f"# Ways to learn a density: {results['data']}\n",
        f"Written by `{command}`; {results['seeds']} seeds from 0, means +- standard deviation "
        f"over them. {rows[0]:,} training, {rows[1]:,} validation and {rows[2]:,} test rows of "
        f"{results['features']} features; budget {results['budget']:g} s a fit. "
        f"{platform.machine()}, {os.cpu_count()} cores, {results['threads']} "
        f"thread{'s' * (results['threads'] > 1)}, torch {torch.__version__}, scikit-learn "
        f"{sklearn.__version__}. Times are of a machine that may have had other work to do: "
        "CPU seconds say how much of it a fit got.\n",
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n",
        _reconstruction(results),
        _plane(results["plane"]),
        _PROTOCOL,
    ]
    return "\n".join(part for part in parts if part)


_QUALITY = (("precision", 1, 3), ("recall", 1, 3), ("mmd2", 1000, 2))


def _lines(name: str, records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    first = records[0]
    choices = "; ".join(dict.fromkeys(r["choice"] for r in records if r["choice"]))
    counts = sorted({r["parameters"] for r in records})
    parameters = " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1])))
    around = [
        f"{name} ({choices})" if choices else name,
        parameters,
        _over(records, lambda r: r["seconds"], 2),
        _over(records, lambda r: r["cpu_seconds"], 2),
        ", ".join(str(r["steps"]) for r in records),
        f"{mean(r['train_rate'] for r in records):,.0f}",
        f"{mean(r['sample_rate'] for r in records):,.0f}",
        *(_over(records, lambda r, k=key, b=by: r[k] * b, digits) for key, by, digits in _QUALITY),
    ]
    lines = []
    for i, which in enumerate(first.get("log_prob", {"none": None})):
        if which == "none":
            figures, density = ["none", "none", "none"], "none"
        else:
            level = _over(records, lambda r, w=which: r["log_prob"][w], 2)
            bits = "-"
            if first["bits_per_dim"][which] is not None:
                bits = _over(records, lambda r, w=which: r["bits_per_dim"][w], 3)
            figures = [level, "exact" if which == "exact" else f">= {which}", bits]
            density = f"{mean(r['density_rate'][which] for r in records):,.0f}"
        own = around if not i else [""] * len(around)
        lines.append([own[0], *figures, *own[1:7], density, *own[7:]])
    return lines


def _over(
    records: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], float], digits: int
) -> str:
    values = [of(r) for r in records]
    spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _reconstruction(results: Mapping[str, Any]) -> str:
    return (
        "Root mean square error of test rows brought back, seed 0, in standard deviations of a "
        + "feature: "
        + ", ".join(f"{name} {error:.2g}" for name, error in results["reconstruction"].items())
        + ".\n"
    )


def _plane(plane: Mapping[str, Any]) -> str:
    lines = ["| height and weight | error, % |", "| --- | ---: |"]
    lines += [f"| {name} | {100 * error:.3f} |" for name, error in plane["errors"].items()]
    moons = ", ".join(f"{name} {level:.3f}" for name, level in plane["moons"].items())
    return (
        "## In the plane, seed 0\n\n"
        f"Moons, mean log-density of 1,000 held-out rows in nats: {moons} (VAE: IWAE_64).\n\n"
        + "\n".join(lines)
        + "\n\nAll but the first are of 200,000 new rows, the same for all; 2,000 rows of each "
        "class to learn from.\n"
    )


_PROTOCOL = f"""\
## How

Every fit has the same wall-clock budget, with validation in it, and each model the same training
rows, batches and dequantisation noise, freshly drawn in every epoch. Gaussians are fitted in
closed form, to several noise draws of each row, and need no more; of the mixture (standardised
features) candidates are fitted in turn until the time is over ("steps"; rows/s counts rows times
candidates), and the last may run over. NICE is the preset of its name at a constant learning
rate. Mixture, VAE and NICE keep what is best on the validation rows, VAE and NICE looking every
25 steps; the GAN, which has no likelihood to look at, keeps the moving average of its last
weights, and its parameters are the generator's. Steps are recorded: `--replay results.json` takes
exactly those, and gives these figures again (on the same kind of machine, with the same number of
threads).

Log-likelihoods are mean nats a row of the same dequantised test rows. VAE (Kingma and Welling
2014, arXiv 1312.6114; logistic observations): log p(x) is not known; it is at least IWAE_1000,
that at least IWAE_64, that at least the ELBO (Burda et al. 2016, arXiv 1509.00519), in
expectation; IWAE_1 is the ELBO by sampling. Its samples have the observation's noise. GAN
(Goodfellow et al. 2014, arXiv 1406.2661, non-saturating): no likelihood. NICE: Dinh et al. 2014,
arXiv 1410.8516. Mixture: scikit-learn.

Precision (samples among real rows) and recall (real rows among samples): Kynkaanniemi et al.
2019, arXiv 1904.06991, k = {NEIGHBOURS}. MMD: Gretton et al. 2012, JMLR 13, the unbiased
estimate, which may fall below zero; Gaussian kernel as wide as the median distance. As many
samples as there are test rows, in the space of at most {COMPONENTS} principal components of the
training rows; real training rows against the test rows are the floor (for MMD) and what there is
to reach.
"""
