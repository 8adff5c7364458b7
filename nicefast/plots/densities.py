"""Densities in two dimensions, learned beside true."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number, check_type
from .canvas import INK, MUTED, figure_of, write

LogDensity = Callable[[Tensor], Tensor]
FINE, COARSE = 300, 80  # points of a density, bins of a histogram, along each side


def plot_density(
    learned: LogDensity,
    true: LogDensity | Tensor,
    bounds: Sequence[float],
    path: str | Path,
    name: str = "density",
) -> None:
    """Two maps on one colour scale, the learned density and the true one, written as PNG.

    Args:
        learned: (N, 2) float32 -> log-density (N,) in nats, as ``model.log_prob``; on the CPU.
        true: the same of the truth; or samples of it (M, 2), of which a histogram is drawn.
        bounds: x from, x to, y from, y to.
        path: the PNG's place.
        name: of the density, for the title.

    The scale ends at the largest value of the true density (of the histogram, at its 99.5th
    percentile among filled bins); where the learned one is larger it saturates.

    Raises ValueError for bounds that are no box, samples of another shape, or a function that does
    not give one value for each row.

    >>> import math, tempfile
    >>> normal = lambda x: -x.square().sum(1) / 2 - math.log(2 * math.pi)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_density(normal, torch.randn(500, 2), (-3, 3, -3, 3), folder + "/density.png")
    ...     Path(folder, "density.png").exists()
    True
    """
    check_type("bounds", bounds, Collection, "four numbers")
    for bound in bounds:
        check_number("bounds", bound)
    if len(bounds) != 4:
        raise ValueError(f"bounds must be x from, x to, y from, y to, got {tuple(bounds)}")
    x0, x1, y0, y1 = map(float, bounds)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"bounds must go from less to more, got {tuple(bounds)}")
    maps = [_map("learned", learned, (x0, x1, y0, y1))]
    if isinstance(true, Tensor):
        maps.append(_histogram(true, (x0, x1, y0, y1)))
        filled = maps[1][maps[1] > 0]
        top = float(filled.quantile(0.995)) if len(filled) else float(maps[0].max())
        right = f"{len(true):,} samples of the true {name}"
    else:
        maps.append(_map("true", true, (x0, x1, y0, y1)))
        top = float(maps[1].max())
        right = f"true {name}"
    tall = 4.4 * (y1 - y0) / (x1 - x0)
    figure = figure_of(10.2, min(max(tall, 2.0), 12.0) + 0.6)
    panels = figure.subplots(1, 2)
    picture: Any = None
    for axes, density, title in zip(panels, maps, (f"learned {name}", right), strict=True):
        picture = axes.imshow(
            density.numpy(),
            origin="lower",
            extent=(x0, x1, y0, y1),
            cmap="viridis",
            vmin=0,
            vmax=top or 1.0,
            interpolation="nearest",
        )
        axes.set_title(title, color=INK, fontsize=12)
        axes.tick_params(colors=MUTED)
        for spine in axes.spines.values():
            spine.set_visible(False)
    more = float(maps[0].max()) > top
    beside = panels[1].inset_axes((1.03, 0, 0.035, 1))  # as tall as the panel, whatever its shape
    bar = figure.colorbar(picture, cax=beside, extend="max" if more else "neither")
    bar.set_label("density", color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED)
    write(figure, path)


@torch.no_grad()
def _map(name: str, log_density: LogDensity, bounds: tuple[float, ...]) -> Tensor:
    """Density (FINE, FINE) at the middles of small squares: rows are y, upwards."""
    x0, x1, y0, y1 = bounds
    middles = (torch.arange(FINE, dtype=torch.float32, device="cpu") + 0.5) / FINE
    y, x = torch.meshgrid(y0 + (y1 - y0) * middles, x0 + (x1 - x0) * middles, indexing="ij")
    if not callable(log_density):
        raise TypeError(f"{name} must be a function of rows, got {type(log_density).__name__}")
    log_p = log_density(torch.stack([x.flatten(), y.flatten()], 1))
    if tuple(log_p.shape) != (FINE * FINE,):
        raise ValueError(
            f"{name} must give one log-density for each of {FINE * FINE} rows, "
            f"got shape {tuple(log_p.shape)}"
        )
    return log_p.double().cpu().exp().nan_to_num(nan=0.0).view(FINE, FINE)


def _histogram(samples: Tensor, bounds: tuple[float, ...]) -> Tensor:
    if samples.ndim != 2 or samples.shape[1] != 2 or not len(samples):
        raise ValueError(f"true must be samples (M, 2), M >= 1, got {tuple(samples.shape)}")
    x0, x1, y0, y1 = bounds
    points = samples.detach().double().cpu()
    counts, _ = torch.histogramdd(points, bins=[COARSE, COARSE], range=[x0, x1, y0, y1])
    area = (x1 - x0) * (y1 - y0) / COARSE**2
    return counts.T.contiguous() / (len(points) * area)
