"""Pictures of a run: samples beside real data, the learning curve, the scaling's spectrum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..checks import check_type
from .canvas import (
    ACCENT,
    BASELINES,
    INK,
    LINES,
    MUTED,
    SOFT,
    figure_of,
    is_image,
    show,
    tidy,
    tiled,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..evaluation import Evaluation
    from ..training import History


def plot_samples(real: Tensor, samples: Tensor, path: str | Path, name: str = "data") -> None:
    """Real rows on the left, samples of the model on the right, written to ``path`` as PNG.

    Images, event shapes (H, W) or (C, H, W) with C = 1 or 3 and values in [0, 1], are laid out in
    square grids (at most 100 each). Of any other data the first two features are scattered.

    Args:
        real, samples: (N, \\*event_shape) and (M, \\*event_shape).
        path: the PNG's place.
        name: of the data, for the titles.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_samples(torch.rand(9, 1, 8, 8), torch.rand(9, 1, 8, 8), folder + "/samples.png")
    ...     Path(folder, "samples.png").exists()
    True
    """
    check_type("real", real, Tensor, "a torch.Tensor")
    check_type("samples", samples, Tensor, "a torch.Tensor")
    figure = figure_of(9.6, 5.0)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    if is_image(tuple(real.shape[1:])):
        for axes, images in ((left, real), (right, samples)):
            side = max(1, min(10, int(len(images) ** 0.5)))
            tiles = images[: side * side].float().cpu()
            show(axes, tiled(tiles if tiles.ndim == 4 else tiles.unsqueeze(1), side))
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
            tidy(axes)
    left.set_title(f"real {name} (training rows)", color=INK, fontsize=12)
    right.set_title("samples of the NICE", color=INK, fontsize=12)
    write(figure, path)


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
    tidy(axes)
    write(figure, path)


def plot_spectrum(
    log_scale: Tensor, path: str | Path, event_shape: Sequence[int] | None = None
) -> None:
    """The spectrum ``sigma_d = exp(-s_d)``, largest first (Dinh et al. 2014, figure 8), as PNG.

    sigma_d is the width of latent feature d as the couplings leave it, before the scaling makes
    every width one: a small one is a direction in which the data hardly vary.

    Args:
        log_scale: s, (D,), or of the event shape; finite.
        path: the PNG's place.
        event_shape: where it is an image's and ``log_scale`` is flat: (H, W) or (C, H, W). Then a
            second panel has sigma_d at each pixel (of three channels, their geometric mean), which
            feature d of a NICE keeps through all couplings.

    Raises ValueError for an ``event_shape`` of another number of features, an empty ``log_scale``,
    or one that is not finite.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_spectrum(torch.randn(64), folder + "/spectrum.png", (1, 8, 8))
    ...     Path(folder, "spectrum.png").exists()
    True
    """
    check_type("log_scale", log_scale, Tensor, "a torch.Tensor")
    if event_shape is not None:
        check_type("event_shape", event_shape, Iterable, "a shape")
    shape = tuple(log_scale.shape if event_shape is None else event_shape)
    if not log_scale.numel() or math.prod(shape) != log_scale.numel():
        raise ValueError(
            f"log_scale must have one value for each feature of event_shape {shape}, "
            f"got shape {tuple(log_scale.shape)}"
        )
    s = log_scale.detach().double().cpu().flatten()
    if not s.isfinite().all():
        raise ValueError("log_scale must be finite")
    sigma = (-s).exp()
    shown = is_image(shape)
    figure = figure_of(9.6 if shown else 6.4, 4.2)
    axes, *others = figure.subplots(
        1, 1 + shown, squeeze=False, gridspec_kw={"width_ratios": [1.25, 1] if shown else [1]}
    )[0]
    ordered = sigma.sort(descending=True).values.numpy()
    axes.step(np.arange(len(ordered) + 1), [*ordered, ordered[-1]], where="post", color=ACCENT)
    axes.set_yscale("log")
    axes.set_xlim(0, len(ordered))
    axes.set_xlabel("latent feature d, widest first")
    axes.set_ylabel(r"$\sigma_d = \exp(-s_d)$")
    axes.set_title("spectrum of the scaling", loc="left", color=INK, fontsize=12)
    axes.grid(axis="y", color=LINES, linewidth=0.8)
    tidy(axes)
    for panel in others:
        from matplotlib.colors import LogNorm

        pixels = (-s.view(-1, *shape[-2:]).mean(0)).exp().numpy()
        low, high = axes.get_ylim()
        picture = panel.imshow(pixels, cmap="viridis", norm=LogNorm(low, high))
        panel.set_axis_off()
        panel.set_title(r"$\sigma_d$ at its pixel", color=INK, fontsize=12)
        bar = figure.colorbar(picture, ax=panel, fraction=0.05, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(which="both", colors=MUTED)
    write(figure, path)


def _label_ends(axes: Axes, labels: list[tuple[str, float, str]]) -> None:
    """Name each line at the right edge, in its own colour, pushed apart where they would touch."""
    low, high = axes.get_ylim()
    least = 0.085 * (high - low)
    place = -float("inf")
    for text, value, colour in sorted(labels, key=lambda label: label[1]):
        place = max(min(max(value, low), high), place + least)  # within the picture
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
