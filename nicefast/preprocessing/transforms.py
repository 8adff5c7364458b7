"""Invertible steps between raw values and what a flow sees, with their log-determinants.

A step maps rows x (N, D) to y (N, D). ``forward`` gives y and ``log |det dy/dx|`` (N,) in float64
nats, so that ``log p(x) = log p(y) + log_det``; ``inverse`` goes back. Rows keep their dtype,
float32 or float64, and products stay out of TF32 and autocast. What a step has learnt is float64;
``configuration`` (plain values) and ``tensors`` are all it takes to make it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .. import functional
from ..checks import is_number
from ..spacing import multiples_below, on_grid
from .moments import Rows, blocks, moments, wide


class Step(Protocol):
    """What :class:`nicefast.preprocessing.Preprocessing` asks of a step."""

    name: ClassVar[str]

    @property
    def configuration(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, y: Tensor) -> Tensor: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Dequantise:
    """``x = low + (level + u) / k * (high - low)`` with uniform noise; with no k, ``level + u``.

    With ``spacing``, the columns of a table get noise of their own width: ``value + spacing_d u``,
    where a value is a multiple of its column's spacing, to rounding; others stay as they are, as
    all do in a column whose spacing is 0.

    The determinant is taken from the raw scale, ``level + u`` or ``value + spacing_d u``: it is
    ``D log((high - low) / k)``, and 0 with no k. See :func:`nicefast.functional.dequantise` for
    what the noise depends on; with ``spacing``, d counts the columns that have one.

    Args:
        levels: k, or None for integers of any range.
        low, high: the range of x.
        spacing: (D,), of each column (:func:`nicefast.spacing.column_spacings`), for tables of
            integers or real values; None for integers that all have the spacing 1.

    Raises:
        ValueError, TypeError: as :func:`nicefast.functional.dequantise` does; spacings that are
            negative, not finite or all 0, or that come with levels; rows of another width.

    >>> x, log_det = Dequantise(4).forward(torch.tensor([[0, 3]]))
    >>> x.mul(4).floor(), log_det
    (tensor([[0., 3.]]), tensor([-2.7726], dtype=torch.float64))
    """

    levels: int | None
    low: float = 0.0
    high: float = 1.0
    spacing: tuple[float, ...] | None = None
    name: ClassVar[str] = "dequantise"

    def __post_init__(self) -> None:
        check_numbers(low=self.low, high=self.high)
        if self.spacing is not None:
            object.__setattr__(self, "spacing", _spacings(self.spacing))
            if self.levels is not None:
                raise ValueError(f"spacing is for columns without levels, got {self.levels} levels")
        functional.dequantise(
            torch.zeros((0, 1), dtype=torch.uint8, device="cpu"),
            self.levels,
            low=self.low,
            high=self.high,
        )

    @property
    def configuration(self) -> dict[str, Any]:
        own = {} if self.spacing is None else {"spacing": list(self.spacing)}
        return {"levels": self.levels, "low": self.low, "high": self.high, **own}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    @property
    def scale(self) -> float:
        """dx / d(level + u)."""
        return 1.0 if self.levels is None else (self.high - self.low) / self.levels

    def forward(self, x: Tensor, seed: int = 0, row_offset: int = 0) -> tuple[Tensor, Tensor]:
        """Rows x (N, D) with the noise of rows ``row_offset`` to ``row_offset + N``.

        x holds integers; with ``spacing`` integers or real values, and y is float64.
        """
        if self.spacing is not None:
            return self._spaced(x, seed, row_offset), constant(x, 0.0)
        y = functional.dequantise(
            x, self.levels, seed=seed, row_offset=row_offset, low=self.low, high=self.high
        )
        return y, constant(y, x.shape[1] * math.log(self.scale))

    def inverse(self, y: Tensor) -> Tensor:
        """``level + u``: the raw value, its floor being the level."""
        return y if self.levels is None else (y - self.low) / self.scale

    def exact(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` makes of raw values (N, D) that have their noise."""
        y = raw if self.levels is None else self.low + raw * self.scale
        return y, constant(raw, raw.shape[1] * math.log(self.scale))

    def without_noise(self, raw: Tensor) -> Tensor:
        """The values (N, D) that raw ones with their noise came of: multiples of the spacing."""
        if self.spacing is None:
            return raw.floor()
        columns, spacing = self._columns(raw)
        found = raw.clone()
        found[:, columns] = multiples_below(raw[:, columns], spacing)
        return found

    def _spaced(self, x: Tensor, seed: int, row_offset: int) -> Tensor:
        columns, spacing = self._columns(x)
        values = wide(x)
        zeros = torch.zeros((len(x), len(columns)), dtype=torch.uint8, device=values.device)
        u = functional.dequantise(zeros, None, seed=seed, row_offset=row_offset).to(values.dtype)
        chosen = values[:, columns]
        noise = torch.where(on_grid(chosen.detach(), spacing), u * spacing, torch.zeros_like(u))
        return values.index_add(1, columns, noise)

    def _columns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and spacings of the columns that have one."""
        assert self.spacing is not None
        if x.ndim != 2 or x.shape[1] != len(self.spacing):
            raise ValueError(
                f"rows must have {len(self.spacing)} features, got shape {tuple(x.shape)}"
            )
        every = wide(torch.tensor(self.spacing, dtype=torch.float64, device="cpu"))
        place = wide(x[:0]).device
        columns = every.nonzero().flatten()
        return columns.to(place), every[columns].to(place)

    def describe(self) -> str:
        if self.spacing is not None:
            noisy = [s for s in self.spacing if s]
            widths = [f"{s:g}" for s in sorted(set(noisy))]
            shown = ", ".join(widths[:8]) + (", ..." if len(widths) > 8 else "")
            return (
                f"dequantise: {len(noisy)} of {len(self.spacing)} columns + spacing u, u uniform "
                f"on [0, 1), spacing {shown}"
            )
        if self.levels is None:
            return "dequantise: integers + u, u uniform on [0, 1)"
        low, high = f"{self.low:g}", f"{self.high:g}"
        return f"dequantise: {self.levels} levels + u, u uniform on [0, 1), to [{low}, {high})"


@dataclass(frozen=True)
class Rescale:
    """Linearly from one range to another.

    ``log_det = D log((high - low) / (from_high - from_low))``. ValueError for a range that is
    empty or not finite.

    >>> Rescale(0, 10, -1, 1).forward(torch.tensor([[5.0, 10.0]]))[0]
    tensor([[0., 1.]])
    """

    from_low: float
    from_high: float
    low: float = 0.0
    high: float = 1.0
    name: ClassVar[str] = "rescale"

    def __post_init__(self) -> None:
        check_numbers(**self.configuration)
        for a, b in (("from_low", "from_high"), ("low", "high")):
            if not getattr(self, a) < getattr(self, b):
                raise ValueError(
                    f"{a} must be below {b}, got {getattr(self, a)} and {getattr(self, b)}"
                )
        if not 0 < self.scale < math.inf:
            raise ValueError(f"ranges must not be so far apart in size, got {self}")

    @classmethod
    def fit(cls, x: Rows, low: float = 0.0, high: float = 1.0) -> Rescale:
        """From the least and the greatest value of all features of ``x``."""
        found = moments(x, products=False)
        return cls(found.low.min().item(), found.high.max().item(), low, high)

    @property
    def configuration(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("from_low", "from_high", "low", "high")}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    @property
    def scale(self) -> float:
        """dy / dx."""
        return (self.high - self.low) / (self.from_high - self.from_low)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.low + (x - self.from_low) * self.scale
        return y, constant(y, x.shape[1] * math.log(self.scale))

    def inverse(self, y: Tensor) -> Tensor:
        return self.from_low + (y - self.low) / self.scale

    def describe(self) -> str:
        return f"rescale: [{self.from_low:g}, {self.from_high:g}] to [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Logit:
    """``y = logit(p)``, ``p = alpha + (1 - 2 alpha) x``: from [0, 1] to the real line.

    ``log_det = sum_d log(1 - 2 alpha) - log p_d - log(1 - p_d)``. ValueError for an alpha outside
    (0, 1/2), and for x with p outside (0, 1): looked for on the CPU; elsewhere y is not finite.

    >>> y, log_det = Logit(0.05).forward(torch.tensor([[0.0, 0.5]]))
    >>> y, log_det
    (tensor([[-2.9444,  0.0000]]), tensor([4.2226], dtype=torch.float64))
    """

    alpha: float = 0.05
    name: ClassVar[str] = "logit"

    def __post_init__(self) -> None:
        check_numbers(alpha=self.alpha)
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must lie between 0 and 1/2, got {self.alpha}")

    @classmethod
    def fit(cls, x: Rows, alpha: float = 0.05) -> Logit:
        """Nothing is learnt from ``x``, but its range is checked."""
        made = cls(alpha)
        for block in blocks(x):
            made._check(block)
        return made

    @property
    def configuration(self) -> dict[str, Any]:
        return {"alpha": self.alpha}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type == "cpu":
            self._check(x)
        exact, stretch = wide(x), 1 - 2 * self.alpha
        log_p = torch.log(self.alpha + stretch * exact)
        log_q = torch.log(self.alpha + stretch * (1 - exact))  # of q = 1 - p
        log_det = math.log(stretch) * x.shape[1] - (log_p + log_q).sum(1)
        return (log_p - log_q).to(x), log_det

    def inverse(self, y: Tensor) -> Tensor:
        return ((torch.sigmoid(wide(y)) - self.alpha) / (1 - 2 * self.alpha)).to(y)

    def describe(self) -> str:
        return f"logit: of alpha + (1 - 2 alpha) x, alpha = {self.alpha:g}"

    def _check(self, x: Tensor) -> None:
        beyond = self.alpha / (1 - 2 * self.alpha)
        if x.numel() and not bool(((x > -beyond) & (x < 1 + beyond)).all()):
            low, high = (v.item() for v in torch.aminmax(x.detach()))
            raise ValueError(
                f"logit takes values in [0, 1], got values from {low:g} to {high:g}: "
                f"put 'rescale' before it"
            )


@dataclass(frozen=True, eq=False)
class Standardise:
    """``y_d = (x_d - mean_d) / std_d``: ``log_det = -sum_d log std_d``.

    Args:
        mean, std: (D,), float64; std positive.

    ValueError for shapes and values that do not fit, and for rows of another width.

    >>> Standardise.fit(torch.tensor([[1.0, 5.0], [3.0, 9.0]])).forward(torch.ones(1, 2))
    (tensor([[-1., -3.]]), tensor([-0.6931], dtype=torch.float64))
    """

    mean: Tensor
    std: Tensor
    name: ClassVar[str] = "standardise"
    _made: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_vectors(mean=self.mean, std=self.std)
        if not (self.std > 0).all():
            raise ValueError("std must be positive")

    @classmethod
    def fit(cls, x: Rows) -> Standardise:
        """Mean and standard deviation (of the population) of each feature of ``x``.

        ValueError, naming them by index, where features are constant.
        """
        found = moments(x, products=False)
        constant = (found.low == found.high).nonzero().flatten().tolist()
        if constant:
            shown = ", ".join(map(str, constant[:10])) + (", ..." if len(constant) > 10 else "")
            raise ValueError(
                f"{len(constant)} of {len(found.mean)} features are constant and cannot be "
                f"standardised: {shown} (counted from 0); leave them out of the data"
            )
        return cls(found.mean, found.second.sqrt())

    @property
    def configuration(self) -> dict[str, Any]:
        return {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "std": self.std}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_width(x, self.mean)
        mean, std = (like(self._made, n, t, x) for n, t in self.tensors.items())
        return (x - mean) / std, constant(x, -self.std.log().sum().item())

    def inverse(self, y: Tensor) -> Tensor:
        check_width(y, self.mean)
        mean, std = (like(self._made, n, t, y) for n, t in self.tensors.items())
        return y * std + mean

    def describe(self) -> str:
        return f"standardise: each of {len(self.mean)} features to mean 0, standard deviation 1"


def constant(x: Tensor, value: float) -> Tensor:
    """The same log-determinant for each row of ``x``."""
    device = "cpu" if x.device.type == "mps" else x.device
    return torch.full((len(x),), value, dtype=torch.float64, device=device)


def like(made: dict[Any, Tensor], key: str, tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` on ``x``'s device in its dtype, made once and kept."""
    where = (key, x.device, x.dtype)
    if where not in made:
        with torch.inference_mode(False):  # or autograd could not use it later
            made[where] = tensor.to(x.dtype).to(x.device)
    return made[where]


def check_width(x: Tensor, mean: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] != len(mean):
        raise ValueError(f"rows must have {len(mean)} features, got shape {tuple(x.shape)}")


def check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not is_number(value):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def _spacings(spacing: Any) -> tuple[float, ...]:
    if not isinstance(spacing, tuple | list) or not spacing:
        raise TypeError(f"spacing must be numbers, one for each column, got {spacing!r}")
    for value in spacing:
        check_numbers(spacing=value)
        if value < 0:
            raise ValueError(f"spacing must not be negative, got {value}")
    if not any(spacing):
        raise ValueError("spacing must be above 0 in some column")
    return tuple(map(float, spacing))


def check_vectors(**vectors: Any) -> None:
    length = None
    for name, v in vectors.items():
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(v).__name__}")
        length = len(v) if length is None and v.ndim == 1 else length
        if v.dtype != torch.float64 or v.shape != (length,):
            raise ValueError(f"{name} must be float64 ({length},), got {v.dtype} {tuple(v.shape)}")
        if not v.isfinite().all():
            raise ValueError(f"{name} must be finite")
