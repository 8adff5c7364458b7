"""A flow as a code: levels to latents on the flow's grid, to bits, and back."""

from __future__ import annotations

import hashlib
import json
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..flow import NICE
from ..preprocessing import Preprocessing
from ..preprocessing.transforms import Dequantise
from .tables import Coder, digest, make_tables

Integers = npt.NDArray[np.int64]
CHUNK_ELEMENTS = 1 << 21  # of the rows that are coded together
MAX_LEVEL = 1 << 24  # of integers of any range
TRIAL_ROWS = 4


class Scale(NamedTuple):
    """``x = (level + first) * grid``; levels from 0 to ``levels`` - 1, or any integers."""

    grid: float
    first: int
    levels: int | None

    @classmethod
    def of(cls, preprocessing: Preprocessing | None) -> Scale:
        """Of what the model was trained on; ValueError where that is not a grid of levels."""
        steps = () if preprocessing is None else preprocessing.steps
        if len(steps) != 1 or not isinstance(steps[0], Dequantise):
            names = ", ".join(step.name for step in steps) or "none"
            raise ValueError(
                f"model must be one of levels, its only step 'dequantise', got steps: {names}"
            )
        step = steps[0]
        low = step.low if step.levels is not None else 0.0
        if math.frexp(step.scale)[0] != 0.5 or low % step.scale:
            raise ValueError(
                f"model must have levels that are a power of two apart, got {step.scale:g} from "
                f"{low:g}: dequantise to a range of levels x 2^-k (as the preset digits-lossless)"
            )
        return cls(step.scale, round(low / step.scale), step.levels)


class Codec:
    """Rows of integers (n, D) to words of 32 bits and back, without loss.

    Args:
        model: a flow without context; one without a grid is put on that of the levels.
        preprocessing: what it was trained on: a single ``dequantise``.

    Raises:
        TypeError: the model is no :class:`nicefast.NICE`.
        ValueError: another preprocessing, another grid, or a context.
        ImportError: constriction is not installed.

    >>> import nicefast as nf
    >>> steps = Preprocessing((Dequantise(4),))
    >>> codec = Codec(nf.NICE(6, hidden=(8,), grid=0.25), steps)
    >>> rows = np.arange(12).reshape(2, 6) % 4
    >>> bool((codec.decode(codec.encode(rows), 2) == rows).all())
    True
    """

    def __init__(self, model: NICE, preprocessing: Preprocessing | None) -> None:
        if not isinstance(model, NICE):
            raise TypeError(f"model must be a nicefast.NICE, got {type(model).__name__}")
        if model.context:
            raise ValueError(f"model must have no context, got one of {model.context} features")
        self.scale = Scale.of(preprocessing)
        grid = self.scale.grid
        if model.grid not in (None, grid):
            raise ValueError(f"model must have the grid of its levels, {grid:g}, got {model.grid}")
        self.model = model.with_grid(grid).eval()
        self.features = model.features
        self.chunk = max(1, CHUNK_ELEMENTS // self.features)
        tables = make_tables(model.scaling.log_scale.detach().cpu(), grid, model.prior_name)
        self._coder = Coder(tables)
        self.identity = self._identity()
        self.arithmetic = self._arithmetic(digest(tables))

    def encode(self, levels: Integers) -> npt.NDArray[np.uint32]:
        """ValueError for a level out of range; names its row and feature."""
        return self._coder.encode(self._latents(self.check(levels)))

    def decode(self, words: npt.NDArray[np.uint32], rows: int) -> Integers:
        """ValueError for words that no levels have."""
        latents = self._coder.decode(words, rows)
        levels = self._walk(latents, 0, inverse=True) - self.scale.first
        return self.check(levels)

    def bits(self, levels: Integers) -> float:
        """What the rows must take: ``-sum cell_log_prob / ln 2``."""
        with torch.no_grad():
            x = self._on_grid(levels + self.scale.first)
            return -self.model.cell_log_prob(x).double().sum().item() / math.log(2)

    def check(self, levels: Integers) -> Integers:
        """The levels themselves, or a ValueError."""
        low, high = (
            (-MAX_LEVEL, MAX_LEVEL) if self.scale.levels is None else (0, self.scale.levels - 1)
        )
        outside = (levels < low) | (levels > high)
        if outside.any():
            row, feature = np.argwhere(outside)[0].tolist()
            raise ValueError(
                f"row {row}, feature {feature}: level {levels[row, feature]} is outside {low} to "
                f"{high}, which the model knows"
            )
        return levels

    def _latents(self, levels: Integers) -> Integers:
        return self._walk(levels, self.scale.first, inverse=False)

    @torch.no_grad()
    def _walk(self, steps: Integers, offset: int, inverse: bool) -> Integers:
        call = self.model.inverse if inverse else self.model
        y, _ = call(self._on_grid(steps + offset))
        found: Integers = (y.flatten(1).double() / self.scale.grid).long().cpu().numpy()
        return found

    def _on_grid(self, steps: Integers) -> torch.Tensor:
        log_scale = self.model.scaling.log_scale
        x = torch.from_numpy(np.ascontiguousarray(steps)).double() * self.scale.grid
        return x.to(log_scale.device, self.model.dtype).view(len(steps), *self.model.event_shape)

    def _identity(self) -> bytes:
        """Of the model: its configuration and every bit of its parameters."""
        seal = hashlib.sha256(json.dumps([self.model.configuration, self.scale]).encode())
        for name, parameter in sorted(self.model.named_parameters(remove_duplicate=False)):
            value = parameter.detach().cpu().contiguous()
            seal.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            seal.update(value.view(-1).view(torch.uint8).numpy().tobytes())
        return seal.digest()

    def _arithmetic(self, tables: bytes) -> bytes:
        """Of the arithmetic here: the tables, and what some rows become."""
        most = self.scale.levels or 256
        count = TRIAL_ROWS * self.features
        trial = (np.arange(count, dtype=np.int64) * 2_654_435_761 >> 9) % most
        latents = self._latents(trial.reshape(TRIAL_ROWS, self.features))
        words = self._coder.encode(latents)  # the coder's own rounding is part of it
        return hashlib.sha256(
            tables + latents.astype("<i8").tobytes() + words.astype("<u4").tobytes()
        ).digest()
