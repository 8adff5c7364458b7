"""Pictures of a run: samples beside real data, and the learning curve.

Drawn through matplotlib's object interface, so that no global state is touched and no display is
needed. Every function writes one PNG and raises ImportError where matplotlib is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .training import Evaluation, History

INK, MUTED, ACCENT, SOFT, LINES = "#1f2933", "#7b8794", "#0b69a3", "#5b9bc8", "#e4e7eb"
BASELINES = ("#b44d12", "#8d6a9f", "#4d7c3a", "#7b8794")


def plot_samples(real: Tensor, samples: Tensor, path: str | Path, name: str = "data") -> None:
    """Real rows on the left, samples of the model on the right, written to ``path`` as PNG.

    Images, event shapes (H, W) or (C, H, W) with C = 1 or 3 and values in [0, 1], are laid out in
    square grids (at most 100 each). Of any other data the first two features are scattered.

    Args:
        real, samples: (N, \\*event_shape) and (M, \\*event_shape).
        path: the PNG's place.
        name: of the data, for the titles.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_samples(torch.rand(9, 1, 8, 8), torch.rand(9, 1, 8, 8), folder + "/samples.png")
    ...     Path(folder, "samples.png").exists()
    True
    """
    figure = figure_of(9.6, 5.0)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    if is_image(tuple(real.shape[1:])):
        for axes, images in ((left, real), (right, samples)):
            axes.imshow(_mosaic(images), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
    else:
        edges = real.flatten(1)[:, :2].float()
        low, high = edges.amin(0), edges.amax(0)
        margin = 0.1 * (high - low)
        for axes, rows in ((left, real), (right, samples)):
            points = rows.flatten(1)[:2000].float().cpu()
            axes.scatter(points[:, 0], points[:, 1], s=5, alpha=0.5, color=ACCENT, linewidths=0)
            axes.set_xlim(float(low[0] - margin[0]), float(high[0] + margin[0]))
            axes.set_ylim(float(low[1] - margin[1]), float(high[1] + margin[1]))
            axes.set_xlabel("feature 0")
            axes.set_ylabel("feature 1")
            _tidy(axes)
    left.set_title(f"real {name} (training rows)", color=INK, fontsize=12)
    right.set_title("samples of the NICE", color=INK, fontsize=12)
    figure.savefig(path)


def plot_learning_curve(
    history: History,
    baselines: Mapping[str, Evaluation],
    path: str | Path,
    name: str = "data",
) -> None:
    """Log-likelihood in nats against epochs, the best epoch marked, written to ``path`` as PNG.

    Args:
        history: of the fit.
        baselines: name -> its evaluation on the same validation rows; a horizontal line each.
        path: the PNG's place.
        name: of the data, for the title.
    """
    figure = figure_of(9.0, 5.0)
    axes = figure.subplots()
    numbers = [epoch.epoch for epoch in history.epochs]
    train = np.array([epoch.train for epoch in history.epochs])
    validation = np.array([epoch.validation for epoch in history.epochs])
    axes.plot(numbers, train, color=SOFT, linewidth=1.4)
    axes.plot(numbers, validation, color=ACCENT, linewidth=2.2)

    best, levels = history.best, [score.log_prob for score in baselines.values()]
    # The first epochs lie so far below that they would flatten the rest of the picture.
    top = max([train.max(), best.validation, *levels])
    bottom = min([*levels, float(np.median(validation))])
    room = 0.12 * (top - bottom) or 1.0
    axes.set_ylim(bottom - room, top + room)
    axes.set_xlim(0, numbers[-1])

    axes.plot(best.epoch, best.validation, "o", color=ACCENT, markersize=8, zorder=4, clip_on=False)
    best_label = f"NICE, validation\nbest {best.validation:.1f} at epoch {best.epoch}"
    labels = [("NICE, training", train[-1], SOFT), (best_label, validation[-1], ACCENT)]
    for (label, score), colour in zip(baselines.items(), BASELINES, strict=False):
        axes.axhline(score.log_prob, color=colour, linewidth=1.5, linestyle=(0, (5, 3)))
        labels.append((f"{label}\n{score.log_prob:.1f}", score.log_prob, colour))
    _label_ends(axes, labels)

    axes.set_xlabel("epoch")
    axes.set_ylabel("log-likelihood (nats per row)")
    axes.set_title(
        f"NICE on {name}: learning curve (baselines on the same validation rows)",
        loc="left",
        color=INK,
        fontsize=12,
    )
    axes.grid(axis="y", color=LINES, linewidth=0.8)
    _tidy(axes)
    figure.savefig(path)


def is_image(event_shape: tuple[int, ...]) -> bool:
    """Whether rows of that shape are shown as images: (H, W) or (C, H, W) with C = 1 or 3.

    >>> is_image((1, 8, 8)), is_image((64,))
    (True, False)
    """
    channels = event_shape[0] if len(event_shape) == 3 else 1
    return len(event_shape) in (2, 3) and channels in (1, 3) and min(event_shape[-2:]) > 1


def figure_of(width: float, height: float) -> Figure:
    """Inches; without global state and without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'nicefast[train]'") from error
    figure = Figure((width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _mosaic(images: Tensor) -> Any:
    """Images in a square grid with thin light lines between them: (H', W') or (H', W', 3)."""
    side = max(1, min(10, int(len(images) ** 0.5)))
    tiles = images[: side * side].float().cpu().clamp(0, 1)
    if tiles.ndim == 3:
        tiles = tiles.unsqueeze(1)
    enlarge = -(-64 // tiles.shape[-1])
    tiles = tiles.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    channels = tiles.shape[1]
    line = 0.12 if channels == 1 else 0.88  # one channel is drawn as ink on white
    tiles = torch.nn.functional.pad(tiles, (2, 2, 2, 2), value=line)
    height, width = tiles.shape[2:]
    grid = tiles.view(side, side, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(side * height, side * width, channels).squeeze(-1).numpy()


def _label_ends(axes: Axes, labels: list[tuple[str, float, str]]) -> None:
    """Name each line at the right edge, in its own colour, pushed apart where they would touch."""
    low, high = axes.get_ylim()
    least = 0.085 * (high - low)
    place = -float("inf")
    for text, value, colour in sorted(labels, key=lambda label: label[1]):
        place = max(value, place + least)
        axes.annotate(
            text,
            (1.0, place),
            (8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=MUTED)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
