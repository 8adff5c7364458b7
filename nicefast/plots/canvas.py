"""What the pictures share: colours, a figure, tiles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_path, check_type
from ..io.files import written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, ACCENT, SOFT, LINES = "#1f2933", "#7b8794", "#0b69a3", "#5b9bc8", "#e4e7eb"
BASELINES = ("#b44d12", "#8d6a9f", "#4d7c3a", "#7b8794")
TILE = 64  # pixels that a small image's side is enlarged to, at least


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


def is_image(event_shape: tuple[int, ...]) -> bool:
    """Whether rows of that shape are shown as images: (H, W) or (C, H, W) with C = 1 or 3.

    >>> is_image((1, 8, 8)), is_image((64,))
    (True, False)
    """
    channels = event_shape[0] if len(event_shape) == 3 else 1
    return len(event_shape) in (2, 3) and channels in (1, 3) and min(event_shape[-2:]) > 1


def check_images(name: str, images: Tensor, leading: int = 1) -> Tensor:
    """Images with ``leading`` dimensions before their own, as (..., C, H, W) float32 on the CPU.

    Raises TypeError for no tensor, ValueError for another shape or none at all.

    >>> check_images("images", torch.zeros(5, 8, 8)).shape
    torch.Size([5, 1, 8, 8])
    """
    check_type(name, images, Tensor, "a torch.Tensor")
    event = tuple(images.shape[leading:])
    if images.ndim <= leading or not is_image(event) or not images.numel():
        before = ", ".join("NM"[:leading])
        raise ValueError(
            f"{name} must be images ({before}, H, W) or ({before}, C, H, W) with C = 1 or 3, "
            f"at least one of them, got shape {tuple(images.shape)}"
        )
    images = images.detach().float().cpu()
    return images if len(event) == 3 else images.unsqueeze(leading)


def tiled(images: Tensor, columns: int) -> Any:
    """Images (N, C, H, W) row by row, thin lines between: numpy (H', W'), or (H', W', 3).

    Every pixel becomes the same whole number of pixels. Where N is no multiple of ``columns`` the
    rest stays empty.

    >>> tiled(torch.rand(5, 1, 64, 64), 3).shape
    (136, 204)
    """
    channels = images.shape[1]
    line, empty = (0.12, 0.0) if channels == 1 else (0.88, 1.0)  # one channel is ink on white
    tiles = images.nan_to_num(nan=0.0).clamp(0, 1)
    enlarge = max(1, -(-TILE // max(tiles.shape[-2:])))
    tiles = tiles.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    tiles = torch.nn.functional.pad(tiles, (2, 2, 2, 2), value=line)
    rows = -(-len(tiles) // columns)
    missing = rows * columns - len(tiles)
    tiles = torch.cat([tiles, tiles.new_full((missing, *tiles.shape[1:]), empty)])
    height, width = tiles.shape[2:]
    grid = tiles.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, columns * width, channels).squeeze(-1).numpy()


def write(figure: Figure, path: str | Path) -> None:
    """The figure as PNG: to a file, whole or not at all, or to what can be written to as to one."""
    if hasattr(path, "write"):
        figure.savefig(path)
        return
    check_path("path", path)
    with written(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:] or "png")


def show(axes: Axes, picture: Any) -> None:
    """A tiled picture, or one image (H, W) or (H, W, 3), without axes."""
    axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
