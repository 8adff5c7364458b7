"""Pictures: of a run, of images made by a model, of densities in two dimensions.

Drawn through matplotlib's object interface, so that no global state is touched and no display is
needed. Every ``plot_`` function and :func:`sample_grid` write one PNG, and raise ImportError where
matplotlib is missing and ValueError for shapes that do not fit. Images have event shapes (H, W) or
(C, H, W), C = 1 or 3, and values in [0, 1]; one channel is drawn as ink on white.
"""

from .canvas import ACCENT, INK, LINES, MUTED, SOFT, figure_of, is_image
from .densities import plot_density
from .fits import plot_learning_curve, plot_samples, plot_spectrum
from .images import plot_inpainting, plot_interpolation, plot_neighbours, sample_grid
from .rows import interpolate, nearest

__all__ = [
    "ACCENT",
    "INK",
    "LINES",
    "MUTED",
    "SOFT",
    "figure_of",
    "interpolate",
    "is_image",
    "nearest",
    "plot_density",
    "plot_inpainting",
    "plot_interpolation",
    "plot_learning_curve",
    "plot_neighbours",
    "plot_samples",
    "plot_spectrum",
    "sample_grid",
]
