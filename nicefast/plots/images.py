"""Pictures made of images: inpainting, interpolations, nearest neighbours, plain grids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count, check_type
from .canvas import (
    ACCENT,
    INK,
    LINES,
    MUTED,
    SOFT,
    check_images,
    figure_of,
    show,
    tidy,
    tiled,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.layout_engine import ConstrainedLayoutEngine

LINEAR = 1000.0  # nats within which a curve with a wide range is drawn to a linear scale
HIDDEN = (0.78, 0.86, 0.93)  # a tint that is neither ink nor paper


def plot_inpainting(
    original: Tensor,
    observed: Tensor,
    filled: Tensor,
    log_prob: Tensor,
    path: str | Path,
    titles: Sequence[str],
    steps: Tensor | None = None,
) -> None:
    """Original, masked and filled images, a column for each mask; below, log p as it rose. PNG.

    Args:
        original, filled: (M, H, W) or (M, C, H, W), values in [0, 1].
        observed: bool, True where a pixel was observed; broadcastable to ``original`` as (M, H, W)
            or in its own shape. Hidden pixels are tinted.
        log_prob: (S, N), after each recorded step; the curve is the mean over the N images, which
            may be more than are shown. S >= 2.
        path: the PNG's place.
        titles: M names, of the masks.
        steps: (S,), which steps those are; 0 .. S - 1 by default.

    Raises ValueError for shapes or counts that do not fit.

    >>> import tempfile
    >>> x, seen = torch.rand(2, 1, 8, 8), torch.rand(2, 8, 8) < 0.5
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = folder + "/inpainting.png"
    ...     plot_inpainting(x, seen, x, torch.arange(6.0).view(3, 2), path, ["one", "two"])
    ...     Path(path).exists()
    True
    """
    before, after = check_images("original", original), check_images("filled", filled)
    if before.shape != after.shape:
        raise ValueError(
            f"filled must be shaped like original, {tuple(original.shape)}, "
            f"got {tuple(filled.shape)}"
        )
    check_type("observed", observed, Tensor, "a torch.Tensor")
    seen = observed.cpu()
    if seen.ndim == 3:
        seen = seen.unsqueeze(1)
    try:
        seen = seen.expand(before.shape)
    except RuntimeError:
        raise ValueError(
            f"observed must be (M, H, W) or shaped like original, {tuple(original.shape)}, "
            f"got {tuple(observed.shape)}"
        ) from None
    check_type("titles", titles, Collection, "names")
    if len(titles) != len(before):
        raise ValueError(f"titles must be one for each of {len(before)} columns: {list(titles)}")
    curve, numbers = _curve(log_prob, steps)

    columns = len(before)
    width = max(6.4, 0.4 + 1.0 * columns)
    side = width / columns * before.shape[-2] / before.shape[-1]
    figure = figure_of(width, 3 * side + 2.9)
    parts: Any = figure.subfigures(2, 1, height_ratios=[3 * side + 0.45, 2.45])
    upper, lower = parts
    grid = upper.subplots(3, columns, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    masked = _tinted(before, seen)
    for row, (name, images) in enumerate(
        (("original", _coloured(before)), ("masked", masked), ("filled", _coloured(after)))
    ):
        for column in range(columns):
            axes = grid[row, column]
            axes.imshow(images[column], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(LINES)
            if not row:
                axes.set_title(titles[column].replace("-", "\n"), color=INK, fontsize=8)
            if not column:
                axes.set_ylabel(name, color=INK, fontsize=9)
    axes = lower.subplots()
    _draw_curve(axes, numbers, curve)
    write(figure, path)


def plot_interpolation(images: Tensor, path: str | Path) -> None:
    """Rows of images on the way from one to another, (R, S, H, W) or (R, S, C, H, W), as PNG.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_interpolation(torch.rand(2, 5, 8, 8), folder + "/interpolation.png")
    ...     Path(folder, "interpolation.png").exists()
    True
    """
    tiles = check_images("images", images, leading=2)
    rows, steps = tiles.shape[:2]
    picture = tiled(tiles.flatten(0, 1), steps)
    width = min(12.0, max(4.0, 0.75 * steps))
    figure = figure_of(width, width * picture.shape[0] / picture.shape[1] + 0.25)
    axes = figure.subplots()
    show(axes, picture)
    title = f"{rows} way{'s' * (rows > 1)} through latent space, from left to right"
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    write(figure, path)


def plot_neighbours(
    samples: Tensor,
    neighbours: Tensor,
    path: str | Path,
    distances: Tensor | None = None,
    columns: int = 10,
) -> None:
    """Each sample above the training image nearest to it, written to ``path`` as PNG.

    Args:
        samples, neighbours: (N, H, W) or (N, C, H, W), values in [0, 1]: of training images, those
            whose indices :func:`nearest` gives.
        path: the PNG's place.
        distances: (N,), written below each pair.
        columns: pairs in a row.

    Raises ValueError for shapes that differ or columns below 1.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_neighbours(torch.rand(4, 8, 8), torch.rand(4, 8, 8), folder + "/neighbours.png")
    ...     Path(folder, "neighbours.png").exists()
    True
    """
    above, below = check_images("samples", samples), check_images("neighbours", neighbours)
    if above.shape != below.shape:
        raise ValueError(
            f"neighbours must be shaped like samples, {tuple(samples.shape)}, "
            f"got {tuple(neighbours.shape)}"
        )
    if distances is not None:
        check_type("distances", distances, Tensor, "a torch.Tensor")
        if tuple(distances.shape) != (len(above),):
            raise ValueError(f"distances must be ({len(above)},), got {tuple(distances.shape)}")
    columns = check_count("columns", columns, 1)
    columns = min(columns, len(above))
    rows = -(-len(above) // columns)
    pairs = torch.stack([above, below], 1)
    below_each = 0.25 if distances is not None else 0.1
    width = max(4.0, 0.95 * columns)
    tall = 1.9 * above.shape[-2] / above.shape[-1] * width / (0.95 * columns) + below_each
    figure = figure_of(width, rows * tall + (0.3 if width >= 7 else 0.5))
    cast("ConstrainedLayoutEngine", figure.get_layout_engine()).set(hspace=0, h_pad=0.03)
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if i < len(pairs):
            show(axes, tiled(pairs[i], 1))
            if distances is not None:
                text = f"{float(distances[i]):.3g}"
                axes.text(
                    0.5,
                    -0.02,
                    text,
                    transform=axes.transAxes,
                    ha="center",
                    va="top",
                    fontsize=8,
                    color=MUTED,
                )
    title = "above: samples; below: the training image nearest to each"
    title += "" if distances is None else ", and how far it is"
    if width < 7:
        title = title.replace("; ", "\n").replace(", and", "\nand")
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=10)
    write(figure, path)


def sample_grid(images: Tensor, path: str | Path, columns: int = 10) -> None:
    """Images (N, H, W) or (N, C, H, W) in a plain grid, nothing written on it, as PNG.

    Every pixel becomes the same whole number of pixels. ValueError for columns below 1.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sample_grid(torch.rand(6, 3, 8, 8), folder + "/grid.png", columns=3)
    ...     Path(folder, "grid.png").exists()
    True
    """
    tiles = check_images("images", images)
    columns = check_count("columns", columns, 1)
    picture = tiled(tiles, min(columns, len(tiles)))
    figure = figure_of(picture.shape[1] / 150, picture.shape[0] / 150)
    figure.set_layout_engine("none")
    show(figure.add_axes((0, 0, 1, 1)), picture)
    write(figure, path)


def _coloured(images: Tensor) -> Any:
    """(N, H, W, 3); one channel is drawn as ink on white."""
    images = images.nan_to_num(nan=0.0).clamp(0, 1)
    if images.shape[1] == 1:
        images = (1 - images).expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1).numpy()


def _tinted(images: Tensor, seen: Tensor) -> Any:
    shown = seen.all(1)[..., None].numpy()
    return np.where(shown, _coloured(images), np.array(HIDDEN, dtype=np.float32))


def _curve(log_prob: Tensor, steps: Tensor | None) -> tuple[Any, Any]:
    check_type("log_prob", log_prob, Tensor, "a torch.Tensor")
    if steps is not None:
        check_type("steps", steps, Tensor, "a torch.Tensor")
    if log_prob.ndim != 2 or len(log_prob) < 2 or not log_prob.shape[1]:
        raise ValueError(f"log_prob must be (S, N) with S >= 2, got {tuple(log_prob.shape)}")
    numbers = torch.arange(len(log_prob), device="cpu") if steps is None else steps.cpu()
    if numbers.shape != log_prob.shape[:1]:
        raise ValueError(
            f"steps must be one for each of {len(log_prob)} records, got {tuple(numbers.shape)}"
        )
    return log_prob.detach().double().cpu().numpy(), numbers.numpy()


def _draw_curve(axes: Axes, steps: Any, log_prob: Any) -> None:
    from matplotlib.ticker import NullLocator

    mean = log_prob.mean(1)
    for column in log_prob.T[:10]:
        axes.plot(steps, column, color=SOFT, linewidth=0.7, alpha=0.5)
    axes.plot(steps, mean, color=ACCENT, linewidth=2)
    # uniform noise is so unlikely that on a linear scale nothing else would be seen
    if np.ptp(log_prob) > 10 * LINEAR:
        powers = [10.0**k for k in range(int(np.log10(LINEAR)), 13)]
        axes.set_yscale("symlog", linthresh=LINEAR)
        low, high = axes.get_ylim()
        axes.set_yticks([y for y in (*(-p for p in powers), 0, *powers) if low <= y <= high])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_locator(NullLocator())
    if len(steps) > 20:  # most happens at the beginning
        axes.set_xscale("symlog", linthresh=steps[1] - steps[0])
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(steps[0], steps[-1])
    axes.set_xlabel("step")
    axes.set_ylabel("log p (nats)")
    title = f"log-likelihood of the filled images: {mean[0]:,.0f} to {mean[-1]:,.0f} on average"
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.grid(axis="y", color=LINES, linewidth=0.8)
    tidy(axes)
