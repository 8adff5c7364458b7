"""PNGs of what was learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nicefast.plots import ACCENT, INK, MUTED, figure_of
from nicefast.plots.canvas import show, tiled

from .planar import BOX, Bayes, LogDensity, grid, posterior

SIDE, BINS = 200, 70
ORANGE = "#b44d12"


def samples(images: Mapping[str, Tensor], path: Path) -> None:
    """A panel for each name: images (N, C, H, W) in [0, 1], or rows (N, D) as two features."""
    columns = 4
    rows = -(-len(images) // columns)
    figure = figure_of(3.0 * columns, 3.25 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    limits = None
    for axes, (name, values) in zip(panels, images.items(), strict=False):
        if values.ndim == 4:
            show(axes, tiled(values.float(), 6))
        else:
            axes.set_axis_on()
            axes.scatter(values[:, 0], values[:, 1], s=1.5, color=ACCENT, linewidths=0)
            limits = limits or (axes.get_xlim(), axes.get_ylim())
            axes.set(xlim=limits[0], ylim=limits[1])
            axes.tick_params(colors=MUTED, labelsize=7)
        axes.set_title(name, color=INK, fontsize=11)
    figure.savefig(path)


def reconstructions(rows: Mapping[str, Tensor], path: Path) -> None:
    """A strip of images (N, C, H, W) in [0, 1] for each name."""
    figure = figure_of(9.0, 1.15 * len(rows) + 0.1)
    panels = figure.subplots(len(rows), 1, squeeze=False).flatten()
    for axes, (name, values) in zip(panels, rows.items(), strict=True):
        show(axes, tiled(values.float(), len(values)))
        axes.set_title(name, color=INK, fontsize=9, loc="left", pad=2)
    figure.savefig(path)


def densities(
    maps: Mapping[str, LogDensity | Tensor], true: str, box: Sequence[float], path: Path
) -> None:
    """Densities over a box, on the colour scale of ``true``; of samples, histograms."""
    columns = 3
    rows = -(-len(maps) // columns)
    found = {name: _map(of, box) for name, of in maps.items()}
    top = float(found[true].max())
    tall = (box[3] - box[2]) / (box[1] - box[0])
    figure = figure_of(3.9 * columns, (3.6 * min(tall, 1.3) + 0.5) * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    picture: Any = None
    for axes, (name, values) in zip(panels, found.items(), strict=False):
        picture = _image(axes, values, box, vmin=0, vmax=top)
        axes.set_title(name, color=INK, fontsize=11)
    bar = figure.colorbar(picture, ax=list(panels), extend="max", shrink=0.7)
    bar.set_label("density", color=INK)
    figure.savefig(path)


def bayes(found: Bayes, path: Path) -> None:
    """Above, the density of both classes together; below, p(class 1 | x) and where it is a half."""
    figure = figure_of(11.4, 8.0)
    panels = figure.subplots(2, 3)
    points, _ = grid(BOX, SIDE)
    mixed = {
        name: (torch.logaddexp(*(c(points).double() for c in ways)).exp() / 2).view(SIDE, SIDE)
        for name, ways in found.ways.items()
    }
    top = float(mixed["true densities"].max())
    pictures: list[Any] = [None, None]
    for column, (name, classes) in enumerate(found.ways.items()):
        above, below = panels[:, column]
        pictures[0] = _image(above, mixed[name], BOX, vmin=0, vmax=top)
        above.set_title(f"p(x): {name}", color=INK, fontsize=11)
        probability = posterior(classes, points).view(SIDE, SIDE)
        pictures[1] = _image(below, probability, BOX, vmin=0, vmax=1, cmap="RdBu_r")
        x0, x1, y0, y1 = BOX
        below.contour(
            torch.linspace(x0, x1, SIDE), torch.linspace(y0, y1, SIDE), probability,
            levels=[0.5], colors=INK, linewidths=1.2,
        )  # fmt: skip
        for rows, colour in zip(found.rows, (ACCENT, ORANGE), strict=True):
            below.scatter(rows[:200, 0], rows[:200, 1], s=3, color=colour, linewidths=0)
        error = 100 * found.errors[name]
        below.set_title(f"p(class 1 | x), error {error:.2f} %", color=INK, fontsize=11)
        below.set_xlabel("height, cm", color=INK)
        above.set_ylabel("weight, kg" if not column else "", color=INK)
        below.set_ylabel("weight, kg" if not column else "", color=INK)
    for row, label in enumerate(("density", "probability of class 1")):
        bar = figure.colorbar(pictures[row], ax=list(panels[row]), shrink=0.9)
        bar.set_label(label, color=INK)
    optimal = 100 * found.errors["Bayes-optimal, by quadrature"]
    figure.suptitle(f"Bayes-optimal error {optimal:.2f} %", color=INK, fontsize=12)
    figure.savefig(path)


@torch.no_grad()
def _map(of: LogDensity | Tensor, box: Sequence[float]) -> Tensor:
    if isinstance(of, Tensor):
        x0, x1, y0, y1 = box
        counts, _ = torch.histogramdd(of.double(), bins=[BINS, BINS], range=[x0, x1, y0, y1])
        return counts.T / (len(of) * (x1 - x0) * (y1 - y0) / BINS**2)
    return of(grid(box, SIDE)[0]).double().exp().view(SIDE, SIDE)


def _image(axes: Any, values: Tensor, box: Sequence[float], **how: Any) -> Any:
    axes.tick_params(colors=MUTED, labelsize=7)
    return axes.imshow(
        values.numpy(), origin="lower", extent=tuple(box), aspect="auto", interpolation="nearest",
        **{"cmap": "viridis"} | how,
    )  # fmt: skip
