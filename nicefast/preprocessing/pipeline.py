"""Preprocessing: recorded, invertible steps from raw rows to what a flow sees, and back.

Raw rows are integers or real values as a data set holds them. The raw scale, on which densities are
comparable whatever the steps are, is that of ``level + u``, u uniform on [0, 1), for integers, that
of ``value + spacing u`` in columns of multiples of a spacing, and that of the values themselves for
real ones: ``log p_raw = log p_x + log_det``.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_type
from ..io import tensorfile
from ..spacing import column_spacings
from .moments import FIT_ROWS, Rows, wide
from .transforms import Dequantise, Logit, Rescale, Standardise, Step, constant
from .whitening import Whiten

FORMAT = "nicefast.Preprocessing/1"
STEPS: dict[str, Any] = {c.name: c for c in (Dequantise, Rescale, Logit, Standardise, Whiten)}
MAX_LEVEL = 1 << 24  # of integers of any range: the last that float32 holds

Spec = str | Mapping[str, Mapping[str, Any]] | Step


@dataclass(frozen=True)
class Preprocessing:
    """Steps in order; with none, real values pass as they are.

    Args:
        steps: those of this package; a :class:`Dequantise` comes first or not at all.

    Raises:
        TypeError: something that is no step.
        ValueError: a Dequantise that is not the first.

    >>> levels = torch.randint(0, 256, (100, 1, 2, 2), dtype=torch.uint8)
    >>> steps = Preprocessing.fit(["dequantise", "standardise"], levels, 256)
    >>> x, log_det = steps.forward(levels, seed=1)
    >>> x.shape, log_det.shape, bool((steps.levels(x) == levels).all())
    (torch.Size([100, 1, 2, 2]), torch.Size([100]), True)
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        check_type("steps", self.steps, Iterable, "a sequence of steps")
        object.__setattr__(self, "steps", tuple(self.steps))
        for i, step in enumerate(self.steps):
            if type(step) not in STEPS.values():
                raise TypeError(f"step {i} must be one of {', '.join(STEPS)}, got {step!r}")
            if i and isinstance(step, Dequantise):
                raise ValueError(f"'dequantise' must be the first step, got it as number {i + 1}")

    @classmethod
    def fit(
        cls, steps: Sequence[Spec], raw: Tensor, levels: int | None = None, seed: int = 0
    ) -> Preprocessing:
        """Learn what the named steps learn from ``raw``, in order, block by block.

        Args:
            steps: names, or names with options, or steps: ``["dequantise", "standardise"]``,
                ``["dequantise", {"whiten": {"kind": "zca", "epsilon": 1e-2}}]``,
                ``[{"dequantise": {"low": -1, "high": 1}}]``. Options are those of each step's
                ``fit``. A "dequantise" without options gives each column of a table the noise of
                its own spacing, as :func:`nicefast.spacing.column_spacings` finds it, and is left
                out where all columns are real.
            raw: (N, \\*event_shape), training rows: integers or real values.
            levels: k, for integers 0 .. k-1; None for others.
            seed: of the noise that integers get meanwhile, 0 <= seed < 2^63.

        Raises:
            TypeError: raw is no tensor, a step is none, or integers without "dequantise".
            ValueError: an unknown step or option, and whatever a step finds wrong with the rows:
                constant features, a singular covariance, values out of range or not finite.
        """
        if isinstance(steps, str | Mapping) or not isinstance(steps, Sequence):
            raise TypeError(f"steps must be a list of names, got {steps!r}")
        _check_raw(raw)
        real = raw.is_floating_point()
        made: list[Step] = []
        for i, spec in enumerate(steps):
            if not isinstance(spec, str | Mapping):
                made.append(spec)
                continue
            name, options = _read(spec)
            if name == Dequantise.name:
                if i:
                    raise ValueError(f"'dequantise' must be the first step, got {steps!r}")
                if real and options:
                    raise ValueError(
                        f"'dequantise' with options is for integers, got {raw.dtype}: "
                        f"use 'rescale' to give real values a range"
                    )
                spacing = None if options or levels is not None else _spacing(raw)
                if not real or spacing is not None:
                    made.append(Dequantise(levels, **options, spacing=spacing))
                continue
            before = cls(tuple(made))
            before._check_kind(raw)
            made.append(STEPS[name].fit(before._rows(raw, seed), **options))
        found = cls(tuple(made))
        found._check_kind(raw)
        return found

    @property
    def discrete(self) -> bool:
        """Whether raw rows are integers throughout, with a spacing of 1."""
        return self._noise is not None and self._noise.spacing is None

    @property
    def noisy(self) -> bool:
        """Whether raw rows get noise, from which a seed and row numbers tell: a Dequantise."""
        return self._noise is not None

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """The spacing of each column, 0 for a real one, where columns have their own."""
        return None if self._noise is None else self._noise.spacing

    @property
    def _noise(self) -> Dequantise | None:
        first = self.steps[0] if self.steps else None
        return first if isinstance(first, Dequantise) else None

    def forward(self, raw: Tensor, seed: int = 0, row_offset: int = 0) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``: float32 like ``raw``, and log |det dx / d raw| (N,), float64 nats.

        What is dequantised gets the noise of rows ``row_offset`` to ``row_offset + N`` of the
        seed's stream; otherwise both are ignored. Differentiable for real values.

        Raises:
            TypeError: integers where there is no Dequantise, or real values where there is one.
            ValueError: rows of another size than was fitted, levels out of range (CPU), and as
                :func:`nicefast.functional.dequantise`.
        """
        _check_raw(raw)
        self._check_kind(raw)
        x, log_det = self._flat(raw.flatten(1), seed, row_offset)
        return x.to(torch.float32).view(raw.shape), log_det

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward` of rows that have their noise, in the dtype of ``x``: ``(y, log_det)``.

        Args:
            x: (N, D), float32 or float64, on the raw scale.

        ValueError for rows of another size than was fitted.
        """
        if self._noise is None:
            return self._flat(x, 0, 0)
        y, before = self._noise.exact(x)
        y, log_det = Preprocessing(self.steps[1:])._flat(y, 0, 0)
        return y, before + log_det

    def inverse(self, x: Tensor) -> Tensor:
        """Back to the raw scale (``level + u`` for integers), like ``x`` in shape and dtype.

        TypeError for integers, ValueError for rows of another size than was fitted.
        """
        _check_raw(x)
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}")
        y = x.flatten(1)
        for step in reversed(self.steps):
            y = step.inverse(y)
        return y.view(x.shape)

    def levels(self, x: Tensor) -> Tensor:
        """The integers that ``x`` came of, or for samples would have: floored and clamped.

        uint8 up to 256 levels, else int32. Where columns have spacings of their own, multiples of
        these, float64, real columns as they are. ValueError where all are real; NaN gives any.
        """
        if self._noise is None:
            raise ValueError("levels need a first step 'dequantise': raw values are real here")
        k = self._noise.levels
        raw = self.inverse(wide(x))
        if self.spacing is not None:
            return self._noise.without_noise(raw.flatten(1)).view(raw.shape).to(x.device)
        raw = raw.floor()
        low, high = (0, k - 1) if k is not None else (-MAX_LEVEL, MAX_LEVEL)
        dtype = torch.uint8 if k is not None and k <= 256 else torch.int32
        return raw.clamp(low, high).to(dtype).to(x.device)

    def split(self) -> tuple[Preprocessing, Preprocessing]:
        """The step that gives raw values a known range, and the others: see :meth:`bounds`.

        That is a first Dequantise or Rescale; otherwise the first of the two has no steps.
        """
        at = int(bool(self.steps) and isinstance(self.steps[0], Dequantise | Rescale))
        return Preprocessing(self.steps[:at]), Preprocessing(self.steps[at:])

    def bounds(self) -> tuple[float, float]:
        """The range of x where the last step gives it one; ValueError where none does."""
        last = self.steps[-1] if self.steps else None
        if isinstance(last, Rescale) or (isinstance(last, Dequantise) and last.levels is not None):
            return last.low, last.high
        raise ValueError("the range of x is not known: no 'dequantise' to levels, no 'rescale'")

    @property
    def configuration(self) -> dict[str, Any]:
        """Steps and their options, as JSON holds them; with :attr:`tensors`, all there is."""
        return {"steps": [{"step": s.name, **s.configuration} for s in self.steps]}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the steps have learnt, float64, named by their place: ``"1.mean"``."""
        return {f"{i}.{n}": t for i, s in enumerate(self.steps) for n, t in s.tensors.items()}

    @classmethod
    def from_parts(
        cls, configuration: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Preprocessing:
        """Made of :attr:`configuration` and :attr:`tensors`; ValueError where they do not fit."""
        left, made = dict(tensors), []
        try:
            for i, entry in enumerate(configuration["steps"]):
                options = dict(entry)
                kind = STEPS[options.pop("step")]
                for key in [k for k in left if k.startswith(f"{i}.")]:
                    options[key.partition(".")[2]] = left.pop(key)
                step = kind(**options)
                if set(options) != {*step.configuration, *step.tensors}:
                    raise ValueError(f"step {i} is not complete: {sorted(options)}")
                made.append(step)
        except (KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"not the parts of a preprocessing: {problem}") from None
        if left:
            raise ValueError(f"not the parts of a preprocessing: {sorted(left)} belong to no step")
        return cls(tuple(made))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, beside its destination, and rename it when complete.

        ImportError where safetensors is not installed.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Preprocessing([Rescale(0, 10)]).save(folder + "/preprocessing.safetensors")
        ...     Preprocessing.load(folder + "/preprocessing.safetensors").describe()
        'rescale: [0, 10] to [0, 1]'
        """
        metadata = {"configuration": json.dumps(self.configuration)}
        tensorfile.write(path, self.tensors, FORMAT, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preprocessing:
        """What :meth:`save` wrote. Nothing that is loaded can run code.

        FileNotFoundError where there is no file; ValueError, with the path, where it is truncated,
        damaged or something else; ImportError where safetensors is not installed.
        """
        found, metadata = tensorfile.read(path, FORMAT, "preprocessing")
        # cloned: fresh memory is aligned, and products of aligned memory repeat bit for bit
        tensors = {k: t.clone() for k, t in found.items()}
        try:
            return cls.from_parts(tensorfile.plain(metadata, "configuration"), tensors)
        except (ArithmeticError, KeyError, TypeError, ValueError) as problem:
            said = textwrap.shorten(str(problem), 300)
            raise ValueError(f"{path} does not fit its own configuration: {said}") from None

    def describe(self) -> str:
        """One line for each step, for people to read."""
        return "\n".join(s.describe() for s in self.steps) or "none: values as they are"

    def _flat(self, raw: Tensor, seed: int, row_offset: int) -> tuple[Tensor, Tensor]:
        """Rows (N, D) through all steps; float64 values stay in float64."""
        x = raw if raw.dtype == torch.float64 or self._noise else raw.float()
        log_det = constant(raw, 0.0)
        for step in self.steps:
            if isinstance(step, Dequantise):
                x, more = step.forward(x, seed, row_offset)
            else:
                x, more = step.forward(x)
            log_det = log_det + more
        return x, log_det

    def _rows(self, raw: Tensor, seed: int) -> Rows:
        """``raw`` as these steps leave it, in blocks."""

        def blocks() -> Iterator[Tensor]:
            for i in range(0, len(raw), FIT_ROWS):
                yield self._flat(raw[i : i + FIT_ROWS].detach().flatten(1), seed, i)[0]

        return blocks

    def _check_kind(self, raw: Tensor) -> None:
        if self.discrete and raw.is_floating_point():
            raise TypeError(
                f"raw must hold integers, to which 'dequantise' adds noise; got {raw.dtype}"
            )
        if not self.noisy and not raw.is_floating_point():
            raise TypeError(
                f"raw of {raw.dtype} needs 'dequantise' as the first step: integers have no density"
            )


def bits_per_dim(log_prob_raw: Tensor | float, features: int) -> Any:
    """``-log_prob / (D ln 2)``, of a log-density on the raw scale in nats and D features.

    For levels, an upper bound in expectation of the bits that a code for them needs.

    >>> bits_per_dim(-4 * math.log(256), 4)
    8.0
    """
    if features < 1:
        raise ValueError(f"features must be at least 1, got {features}")
    return -log_prob_raw / (features * math.log(2))


def _read(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of a step, both checked."""
    entries = {spec: {}} if isinstance(spec, str) else dict(spec)
    if len(entries) != 1:
        raise ValueError(f"a step is a name, or one name with its options, got {spec!r}")
    ((name, options),) = entries.items()
    if name not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {name!r}")
    if not isinstance(options, Mapping):
        raise ValueError(f"options of step {name!r} must be a table, got {options!r}")
    takes = ["low", "high"]
    if name != Dequantise.name:
        takes = list(inspect.signature(STEPS[name].fit).parameters)[1:]
    for option in options:
        if option not in takes:
            known = ", ".join(takes) or "none"
            raise ValueError(f"step {name!r} has no option {option!r}; it takes {known}")
    return name, dict(options)


def _spacing(raw: Tensor) -> tuple[float, ...] | None:
    """Of each column, where not all are real, or integers with the spacing 1."""
    raw = raw.detach().cpu()
    known = not raw.is_floating_point() or raw.dtype in (torch.float32, torch.float64)
    found = column_spacings((raw if known else raw.float()).numpy())
    if not raw.is_floating_point() and (found == 1).all():
        return None
    return tuple(found.tolist()) if found.any() else None


def _check_raw(raw: Tensor) -> None:
    if not isinstance(raw, Tensor):
        raise TypeError(f"rows must be a torch.Tensor, got {type(raw).__name__}")
    if raw.ndim < 2 or raw.shape[1:].numel() < 1:
        raise ValueError(f"rows must have shape (N, *event_shape), got {tuple(raw.shape)}")
