"""Inpainting: hidden pixels filled in by ascending the log-density (Dinh et al. 2014, section 5.2).

With observed pixels x_O and hidden ones x_H, ``log p(x_O, x_H)`` is climbed in x_H alone. The paper
climbs by projected stochastic gradient ascent; Adam gets further in far fewer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_choice, check_count, check_number, check_seed
from .evaluation import Density

METHODS = ("paper", "adam")
RELEASED_STEPS = (
    111_895  # sum of k^2 for k < 70: what the released script makes; the paper is silent
)
RECORDS = 200  # at most about so many steps are recorded
ADAM_RATE = 0.02  # of the box's width; falls to zero on a cosine
BETAS, EPS = (0.9, 0.99), 1e-8

Transform = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


class Inpainted(NamedTuple):
    """What :func:`inpaint` gives back.

    Attributes:
        x: (N, \\*event_shape), of the dtype that came; observed features bit for bit as they came.
        log_prob: (S, N), float32 or wider: ``log p(x_O, x_H)`` in nats at each recorded step.
        steps: (S,), int64: which steps those are; 0 is before the first, the last is the last.
    """

    x: Tensor
    log_prob: Tensor
    steps: Tensor


def masks(height: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """The paper's ten masks, each bool (height, width), True where a pixel is observed.

    Hidden are, with rows i, columns j, and n = i width + j, all from 0:

    ==================  ==========================================================================
    ``top``             i < height // 2
    ``bottom``          i >= height // 2
    ``even``            n even: with an even width, every other column, the first among them
    ``odd``             n odd
    ``left``            j < width // 2
    ``right``           j >= width // 2
    ``middle-rows``     height // 4 <= i < height - height // 4: a horizontal band, half the image
    ``middle-columns``  width // 4 <= j < width - width // 4: a vertical band, half the image
    ``random-75``       each pixel with probability 0.75, independently
    ``random-90``       each pixel with probability 0.9, independently
    ==================  ==========================================================================

    For 28 x 28 that is what the authors' released script hides (rows or columns 7 to 20 for the
    bands). The random masks follow ``seed`` and nothing else; the script draws one for each image,
    for which call again with other seeds.

    Raises ValueError for a height or width below 4, where a band would hide everything, and for a
    seed below 0.

    >>> {name: int((~seen).sum()) for name, seen in masks(4, 4).items() if "random" not in name}
    {'top': 8, 'bottom': 8, 'even': 8, 'odd': 8, 'left': 8, 'right': 8, 'middle-rows': 8,
    'middle-columns': 8}
    """
    height = check_count("height", height, 4)
    width = check_count("width", width, 4)
    seed = check_seed(seed)
    sides = (torch.arange(size, device="cpu") for size in (height, width))
    i, j = torch.meshgrid(*sides, indexing="ij")
    n = i * width + j
    u = _uniform((2, height, width), torch.Generator().manual_seed(int(seed)))
    return {
        "top": i >= height // 2,
        "bottom": i < height // 2,
        "even": n % 2 == 1,
        "odd": n % 2 == 0,
        "left": j >= width // 2,
        "right": j < width // 2,
        "middle-rows": (i < height // 4) | (i >= height - height // 4),
        "middle-columns": (j < width // 4) | (j >= width - width // 4),
        "random-75": u[0] >= 0.75,
        "random-90": u[1] >= 0.9,
    }


def inpaint(
    model: Density,
    x: Tensor,
    observed: Tensor,
    *,
    method: str = "adam",
    steps: int = 1000,
    seed: int = 0,
    low: float = 0.0,
    high: float = 1.0,
    noise: int | None = None,
    transform: Transform | None = None,
    restarts: int = 1,
) -> Inpainted:
    """Fill in what is not observed by climbing ``log p(x_O, x_H)`` in x_H, within [low, high].

    Hidden features begin uniform in [low, high]; what ``x`` holds there is not looked at.

    ``"paper"``: projected stochastic gradient ascent, to the letter: for i = 0, 1, ...
    ``x_H <- clip(x_H + a_i (d log p / d x_H + eps), low, high)``, ``a_i = 10 / (100 + i)``,
    ``eps ~ N(0, 1)``, with each image's own gradient. Steps are 0.1 at first and gradients of a
    trained NICE are large (up to exp(log_scale) a feature, thousands for a nearly constant pixel),
    so features jump from one side of the box to the other until a_i is small; ``log_prob`` need not
    rise. The paper gives no number of steps. The authors' released script makes
    ``RELEASED_STEPS`` = 111,895 and differs: it follows the gradient of the mean over its 100
    images, a hundredth of each image's own, keeps the dequantiser's noise (``noise=256``), and
    does not project for MNIST.

    ``"adam"``: Adam (betas 0.9 and 0.99), each step projected, with a rate that falls from 0.02 of
    the box's width to zero on a cosine; no noise is injected. The rate is a distance, whatever the
    gradients' size, so sharp and wide features settle alike. Momentum overshoots now and then, so
    each image keeps the best that it has passed (but not with ``noise``, which would make it the
    luckiest), and its ``log_prob``, that of the best so far, never falls. Of ``restarts``
    beginnings it keeps the one that ends highest.

    Args:
        model: has log_prob. Its parameters get no gradients. A model with dropout should be in
            evaluation mode.
        x: (N, \\*event_shape), floating point.
        observed: bool, True where a feature is kept; broadcastable to x, as a mask (H, W) is to
            images (N, C, H, W).
        method: ``"paper"`` or ``"adam"``.
        steps: updates, >= 0.
        seed: of beginnings and noise, drawn on the CPU whatever the device: the same there and on
            a GPU, and on a CPU the same result bit for bit.
        low, high: the box, in the units of x.
        noise: number of levels k: the density is then taken at
            ``low + (high - low) (v (k - 1) + u) / k`` with ``v = (x - low) / (high - low)`` and a
            fresh ``u ~ U[0, 1)`` in each step, x standing for integer levels as it does in the
            released code. None, for rows that are dequantised already: at x itself.
        transform: from x to what the model sees, where that is not x, differentiable: gives y, or
            y with its log-determinants (N,), which are added to log p.
        restarts: beginnings for each image, ``"adam"`` only.

    Raises:
        TypeError: x is not floating point or observed not bool, or an argument of a wrong kind.
        ValueError: an unknown method, shapes that do not fit, observed values that are not finite,
            or a number out of range.
        FloatingPointError: a gradient or log-density that is not finite; names the step.

    >>> import nicefast as nf
    >>> model, x = nf.NICE((1, 4, 4), hidden=(8,)), torch.full((2, 1, 4, 4), 0.5)
    >>> filled = inpaint(model, x, masks(4, 4)["top"], steps=50)
    >>> bool((filled.log_prob[-1] > filled.log_prob[0]).all()), torch.equal(x, filled.x)
    (True, False)
    """
    if not callable(getattr(model, "log_prob", None)):
        raise TypeError(f"model must have log_prob, got {type(model).__name__}")
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function, got {type(transform).__name__}")
    seed = check_seed(seed)
    seed = int(seed)
    observed = _check(x, observed, method, steps, low, high, noise, restarts)
    target = _Target(model, noise, transform, low, high)
    with _frozen(model):
        best, *others = (
            _climb(target, x, observed, method, steps, torch.Generator().manual_seed(seed + start))
            for start in range(restarts)
        )
    for other in others:
        better = other.log_prob[-1] > best.log_prob[-1]
        rows = better.view(-1, *[1] * (x.ndim - 1))
        best = Inpainted(
            torch.where(rows, other.x, best.x),
            torch.where(better, other.log_prob, best.log_prob),
            best.steps,
        )
    return best


@contextmanager
def _frozen(model: Density) -> Iterator[None]:
    """Parameters ask for no gradient meanwhile: nobody works out what nobody wants."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _Target(NamedTuple):
    """What is climbed, within its box."""

    model: Density
    noise: int | None
    transform: Transform | None
    low: float
    high: float

    def gradient(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """log p (N,) of each row, and its gradient with respect to that row."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_prob = self._log_prob(x, generator)
            if log_prob.shape != x.shape[:1]:
                raise ValueError(
                    f"model.log_prob must give one value for each of {len(x)} rows, "
                    f"got shape {tuple(log_prob.shape)}"
                )
            # rows do not meet, so the sum's gradient holds each row's own
            (gradient,) = torch.autograd.grad(log_prob.sum(), x)
        return log_prob.detach(), gradient

    def log_prob(self, x: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            return self._log_prob(x, generator)

    def _log_prob(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.noise is not None:
            u = _uniform(x.shape, generator).to(x)
            width, k = self.high - self.low, self.noise
            x = self.low + ((x - self.low) * (k - 1) + width * u) / k
        if self.transform is None:
            return self.model.log_prob(x)
        y = self.transform(x)
        if isinstance(y, Tensor):
            return self.model.log_prob(y)
        return self.model.log_prob(y[0]) + y[1]


def _climb(
    target: _Target,
    given: Tensor,
    observed: Tensor,
    method: str,
    steps: int,
    generator: torch.Generator,
) -> Inpainted:
    kept = given.detach()
    if kept.dtype not in (torch.float32, torch.float64):
        kept = kept.float()
    low, high = target.low, target.high
    x = torch.where(observed, kept, low + (high - low) * _uniform(kept.shape, generator).to(kept))
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    keeps_best = method == "adam" and target.noise is None
    best: tuple[Tensor, Tensor] | None = None
    every = max(1, math.ceil(steps / RECORDS))
    log_probs, recorded = [], []
    for i in range(steps + 1):
        if i < steps:
            log_prob, gradient = target.gradient(x, generator)
            gradient = torch.where(observed, 0.0, gradient)
        else:
            log_prob, gradient = target.log_prob(x, generator), torch.zeros_like(x)
        _check_finite(log_prob, gradient, i)
        if keeps_best:
            best = _better(best, (x, log_prob))
            log_prob = best[1]
        if i % every == 0 or i == steps:
            log_probs.append(log_prob)
            recorded.append(i)
        if i == steps:
            break
        if method == "paper":
            eps = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu")
            step = 10 / (100 + i) * (gradient + eps.to(x))
        else:
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square(), 1 - BETAS[1])
            rate = ADAM_RATE * (high - low) * 0.5 * (1 + math.cos(math.pi * i / steps))
            root = (square / (1 - BETAS[1] ** (i + 1))).sqrt_() + EPS
            step = rate / (1 - BETAS[0] ** (i + 1)) * mean / root
        x = torch.where(observed, kept, (x + step).clamp_(low, high))
    x = x if best is None else best[0]
    filled = torch.where(observed, given.detach(), x.to(given.dtype))
    return Inpainted(filled, torch.stack(log_probs), torch.tensor(recorded, device="cpu"))


def _better(
    one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of each row's x and its log p, the pair of the higher log p."""
    if one is None:
        return other
    better = other[1] > one[1]
    rows = better.view(-1, *[1] * (other[0].ndim - 1))
    return torch.where(rows, other[0], one[0]), torch.where(better, other[1], one[1])


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform on [0, 1), float32, drawn on the CPU so that every device sees the same."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def _check_finite(log_prob: Tensor, gradient: Tensor, step: int) -> None:
    bad = ~(log_prob.isfinite() & gradient.flatten(1).isfinite().all(1))
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise FloatingPointError(
            f"log p or its gradient is not finite in step {step} for {len(rows)} of {len(bad)} "
            f"rows, the first of them row {rows[0]}"
        )


def _check(
    x: Tensor,
    observed: Tensor,
    method: str,
    steps: int,
    low: float,
    high: float,
    noise: int | None,
    restarts: int,
) -> Tensor:
    """``observed``, expanded to the shape of ``x``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}")
    if not isinstance(observed, Tensor) or observed.dtype != torch.bool:
        kind = observed.dtype if isinstance(observed, Tensor) else type(observed).__name__
        raise TypeError(f"observed must be a bool tensor, True where a feature is kept, got {kind}")
    if x.ndim < 2 or not len(x):
        raise ValueError(f"x must have shape (N, *event_shape) with N >= 1, got {tuple(x.shape)}")
    try:
        observed = observed.to(x.device).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"observed must be broadcastable to x, {tuple(x.shape)}, got {tuple(observed.shape)}"
        ) from None
    check_choice("method", method, METHODS)
    steps = check_count("steps", steps)
    restarts = check_count("restarts", restarts, 1)
    if noise is not None:
        check_count("noise", noise, 2)
    if method == "paper" and restarts > 1:
        raise ValueError(f"restarts must be 1 for method 'paper', got {restarts}")
    check_number("low", low)
    check_number("high", high)
    if not low < high:
        raise ValueError(f"low and high must be finite with low < high, got {low!r} and {high!r}")
    if not x[observed].isfinite().all():
        raise ValueError("x must be finite where it is observed")
    return observed
