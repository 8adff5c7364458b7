"""Densities in two dimensions that are known exactly: what a flow has to learn, seen on one page.

To add one, write how it is sampled and its log-density and enter them in ``TOYS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_seed

ROWS = 4096  # that are compared with all nodes of a curve at a time
NODES = 16  # of Gauss-Legendre quadrature, in each panel of a curve


@dataclass(frozen=True)
class Toy:
    """One density.

    Attributes:
        sample: (n, generator) -> (n, 2) float64, on the CPU.
        log_prob: (N, 2) float64 -> (N,) float64, in nats.
        bounds: x from, x to, y from, y to: the box that holds all of it but 1e-6 or less.
    """

    sample: Callable[[int, torch.Generator], Tensor]
    log_prob: Callable[[Tensor], Tensor]
    bounds: tuple[float, float, float, float]


def toy(name: str, n: int, seed: int = 0) -> Tensor:
    """``n`` rows of a density of ``TOYS``: (n, 2), float32, on the CPU.

    The same seed gives the same rows. ValueError for an unknown name, and n or seed below 0.

    >>> toy("moons", 5).shape
    torch.Size([5, 2])
    """
    found = _found(name)
    n = check_count("n", n)
    seed = check_seed(seed)
    return found.sample(n, torch.Generator().manual_seed(int(seed))).float()


def toy_log_prob(name: str, x: Tensor) -> Tensor:
    """True log-density of each row of ``x``, in nats; -inf where there is none.

    With ``N(x; c, s^2)`` the normal density of covariance s^2 I around c:

    * ``moons``: the mean over two half circles of radius 1 of ``N(x; c, 0.1^2)`` for c uniform on
      them; by Gauss-Legendre quadrature along the arcs, to about 1e-10.
    * ``rings``: the same for four circles, radii 0.5, 1, 1.5 and 2, s = 0.08, each as likely;
      exact: ``(2 pi s^2)^-1 exp(-(r^2 + R^2) / (2 s^2)) I_0(r R / s^2)`` at distance r from the
      centre of a circle of radius R.
    * ``gaussians``: eight of s = 0.2 on a circle of radius 2, each as likely; exact.
    * ``checkerboard``: uniform on the squares of [-2, 2)^2 whose lower left corner (i, j) has
      i + j even, eight of side 1; exact.
    * ``spirals``: two arms ``+-(t / 4) (cos t, sin t)``, ``t = 3 pi sqrt(u)`` with u uniform,
      s = 0.08; by quadrature.

    Args:
        name: of the density.
        x: (N, 2), floating point.

    Returns:
        (N,), computed in float64, of the dtype of ``x`` but at least float32, on its device.

    Raises:
        TypeError: x is not floating point.
        ValueError: an unknown name, or another shape.

    >>> toy_log_prob("checkerboard", torch.tensor([[0.5, 0.5], [0.5, 1.5]]))
    tensor([-2.0794,    -inf])
    """
    found = _found(name)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}")
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"x must have shape (N, 2), got {tuple(x.shape)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.double().split(ROWS)
    return torch.cat([found.log_prob(part) for part in rows]).to(dtype)


def _found(name: str) -> Toy:
    check_choice("name", name, TOYS)
    return TOYS[name]


def _noisy(points: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return points + scale * _normal(len(points), generator)


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, dtype=torch.float64, device="cpu")


def _choice(n: int, among: int, generator: torch.Generator) -> Tensor:
    return torch.randint(among, (n,), generator=generator, device="cpu")


def _mixture(x: Tensor, centres: Tensor, log_weights: Tensor, scale: float) -> Tensor:
    """log of the sum over centres of weight times N(x; centre, scale^2)."""
    square = torch.cdist(x, centres.to(x), compute_mode="donot_use_mm_for_euclid_dist").square_()
    inside = square.mul_(-1 / (2 * scale**2)).add_(log_weights.to(x))
    return inside.logsumexp(1) - math.log(2 * math.pi * scale**2)


@cache
def _quadrature(panels: int) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and log-weights: Gauss-Legendre in each of so many panels."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    starts = np.arange(panels)[:, None]
    u = (starts + (nodes + 1) / 2) / panels
    w = np.broadcast_to(weights / (2 * panels), u.shape)
    return torch.from_numpy(u.reshape(-1)), torch.from_numpy(np.log(w).reshape(-1))


# Moons: the upper half circle about (-0.5, -0.25), the lower one about (0.5, 0.25).
MOON_SCALE, MOON_PANELS = 0.1, 8


def _moon(angle: Tensor, lower: Tensor) -> Tensor:
    sign = 1 - 2 * lower.double()
    x, y = angle.cos() - 0.5, angle.sin() - 0.25
    return torch.stack([sign * x, sign * y], -1)


def _moons_sample(n: int, generator: torch.Generator) -> Tensor:
    angle, lower = math.pi * _uniform(n, generator), _choice(n, 2, generator)
    return _noisy(_moon(angle, lower), MOON_SCALE, generator)


def _moons_log_prob(x: Tensor) -> Tensor:
    u, log_weights = _quadrature(MOON_PANELS)
    zero = torch.zeros_like(u)
    centres = torch.cat([_moon(math.pi * u, zero), _moon(math.pi * u, zero + 1)])
    return _mixture(x, centres, log_weights.repeat(2) - math.log(2), MOON_SCALE)


RADII, RING_SCALE = (0.5, 1.0, 1.5, 2.0), 0.08


def _radii() -> Tensor:
    return torch.tensor(RADII, dtype=torch.float64, device="cpu")


def _rings_sample(n: int, generator: torch.Generator) -> Tensor:
    angle = 2 * math.pi * _uniform(n, generator)
    radius = _radii()[_choice(n, len(RADII), generator)]
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return _noisy(points, RING_SCALE, generator)


def _rings_log_prob(x: Tensor) -> Tensor:
    distance = x.norm(dim=1)[:, None]
    radii, square = _radii().to(x), RING_SCALE**2
    # I_0 grows as exp: i0e has that taken out, which leaves the square of the difference
    bessel = torch.special.i0e(distance * radii / square).log()
    each = bessel - (distance - radii).square() / (2 * square)
    return each.logsumexp(1) - math.log(len(RADII) * 2 * math.pi * square)


GAUSSIANS, GAUSSIAN_SCALE = 8, 0.2


def _centres() -> Tensor:
    steps = torch.arange(GAUSSIANS, dtype=torch.float64, device="cpu")
    angle = 2 * math.pi * steps / GAUSSIANS
    return 2 * torch.stack([angle.cos(), angle.sin()], 1)


def _gaussians_sample(n: int, generator: torch.Generator) -> Tensor:
    return _noisy(_centres()[_choice(n, GAUSSIANS, generator)], GAUSSIAN_SCALE, generator)


def _gaussians_log_prob(x: Tensor) -> Tensor:
    centres = _centres()
    log_weights = centres.new_full((GAUSSIANS,), -math.log(GAUSSIANS))
    return _mixture(x, centres, log_weights, GAUSSIAN_SCALE)


def _checkerboard_sample(n: int, generator: torch.Generator) -> Tensor:
    cell = _choice(n, 8, generator)
    i = cell // 2 - 2
    j = 2 * (cell % 2) - 2 + i % 2
    # a grid of 2^-20, halfway between its points: in float32 none is rounded into the next square
    fine = torch.randint(1 << 20, (n, 2), generator=generator, device="cpu")
    return torch.stack([i, j], 1) + (fine.double() + 0.5) / (1 << 20)


def _checkerboard_log_prob(x: Tensor) -> Tensor:
    corner = x.floor()
    inside = ((corner >= -2) & (corner < 2)).all(1) & (corner.sum(1) % 2 == 0)
    return torch.full_like(x[:, 0], -math.inf).masked_fill_(inside, -math.log(8))


SPIRAL_SCALE, SPIRAL_PANELS, TURN = 0.08, 32, 3 * math.pi


def _spiral(root: Tensor, sign: Tensor) -> Tensor:
    """The point at ``root = sqrt(u)`` of an arm."""
    angle = TURN * root
    return (sign * angle / 4)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def _spirals_sample(n: int, generator: torch.Generator) -> Tensor:
    root, sign = _uniform(n, generator).sqrt(), 2 * _choice(n, 2, generator) - 1
    return _noisy(_spiral(root, sign), SPIRAL_SCALE, generator)


def _spirals_log_prob(x: Tensor) -> Tensor:
    root, log_weights = _quadrature(SPIRAL_PANELS)
    one = torch.ones_like(root)
    centres = torch.cat([_spiral(root, one), _spiral(root, -one)])
    # du = 2 root d root, and each arm holds half of it
    return _mixture(x, centres, (log_weights + root.log()).repeat(2), SPIRAL_SCALE)


TOYS: dict[str, Toy] = {
    "moons": Toy(_moons_sample, _moons_log_prob, (-2.25, 2.25, -1.5, 1.5)),
    "rings": Toy(_rings_sample, _rings_log_prob, (-2.6, 2.6, -2.6, 2.6)),
    "gaussians": Toy(_gaussians_sample, _gaussians_log_prob, (-3.2, 3.2, -3.2, 3.2)),
    "checkerboard": Toy(_checkerboard_sample, _checkerboard_log_prob, (-2.2, 2.2, -2.2, 2.2)),
    "spirals": Toy(_spirals_sample, _spirals_log_prob, (-3.0, 3.0, -3.0, 3.0)),
}
