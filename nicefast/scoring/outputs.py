"""What is computed of a batch of rows, and the rows for which nothing can be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import as_integer, check_count, check_type, filled
from ..evaluation import Density
from ..flow import NICE
from ..preprocessing import Preprocessing
from ..preprocessing.moments import wide
from ..runtime.devices import dtype_of
from .models import event_shape
from .sinks import Layout

OUTPUTS = ("log_prob", "bits_per_dim", "z", "terms", "gradient", "percentile")
WIDE = ("z", "terms", "gradient")  # D numbers for each row
NARROW = ("float32", "float16", "bfloat16", "uint8", "int8", "uint16", "int16", "bool")
DRAW = 1 << 40  # row i of draw d has the noise of row d * DRAW + i


class Batch(NamedTuple):
    """Results for some rows, where they were computed: ``values`` by name, ``good`` (n,) bool."""

    values: dict[str, Tensor]
    good: Tensor


class Scorer:
    """Outputs of raw rows (n, D), in nats.

    =============  ================================================================================
    log_prob       (n,) log-density on the raw scale; the mean of ``log p`` over the noise draws
    bits_per_dim   (n,) ``-log_prob / (D ln 2)``
    z              (n, D) what the flow makes of x
    terms          (n, D) ``log p(z_d) + log_scale_d``: their sum is log_prob on the flow's scale
    gradient       (n, D) ``d log p(x) / d x`` on the flow's scale, x being preprocessed
    percentile     (n,) percentage of the reference's log_prob that are below this row's
    =============  ================================================================================

    All of them are means over the draws; there is one draw where rows are real values. Numbers are
    float32, or float64 where the model's parameters are; the scalars of a row are float64 also
    with a preprocessing, whose log-determinant is, and of models that are no modules.

    Args:
        model: see :func:`nicefast.scoring.score`.
        preprocessing: from raw rows to what ``model`` sees, None where they are that.
        outputs: names from the table.
        features: D.
        seed, draws: of the noise that integers get.
        reference: log_prob of a reference set, an array or a ``.npy`` file.

    Raises:
        ValueError: an unknown output or one that is named twice; "z" and "terms" of a model that
            is no NICE; draws below 1; "percentile" without a reference, or with one that is no
            one-dimensional array of numbers.
    """

    def __init__(
        self,
        model: Density,
        preprocessing: Preprocessing | None,
        outputs: Sequence[str],
        features: int,
        seed: int = 0,
        draws: int = 1,
        reference: Any = None,
    ) -> None:
        self.outputs = _checked(outputs)
        for name in {"z", "terms"} & {*self.outputs}:
            needs = ("forward",) if name == "z" else ("forward", "prior", "scaling")
            if not all(hasattr(model, n) for n in needs):
                raise ValueError(f"output {name!r} needs a NICE, got {type(model).__name__}")
        draws = check_count("draws", draws, 1)
        if (found := as_integer(seed)) is None or not 0 <= found < 1 << 63:
            raise ValueError(f"seed must be an integer, 0 <= seed < 2^63, got {seed!r}")
        seed = found
        if reference is not None and "percentile" not in self.outputs:
            raise ValueError("reference is for the output 'percentile', which was not asked for")
        self.model: Any = model
        # what computes densities without gradients: it reads and arranges the weights once
        self.frozen: Any = model.frozen() if type(model) is NICE else model
        self.preprocessing = preprocessing
        self.features, self.seed = features, seed
        self.discrete = preprocessing is not None and preprocessing.discrete
        self.draws = draws if preprocessing is not None and preprocessing.noisy else 1
        self.dtype = dtype_of(model)
        plain = preprocessing is None and isinstance(model, nn.Module)
        self.scalar = self.dtype if plain else torch.float64
        self.reference = _reference(reference) if "percentile" in self.outputs else None
        self.shape = event_shape(model) or (features,)

    def layout(self, keys: Sequence[str]) -> Layout:
        """Dtypes and widths of the results."""
        single = np.dtype(np.float32 if self.dtype == torch.float32 else np.float64)
        scalar = np.dtype(np.float32 if self.scalar == torch.float32 else np.float64)
        kinds = {n: (single, self.features) if n in WIDE else (scalar, None) for n in self.outputs}
        return Layout(kinds, tuple(keys))

    def staging(self, dtype: Any) -> torch.dtype:
        """What rows of ``dtype`` (NumPy's or torch's) come to the device in."""
        text = str(dtype).removeprefix("torch.")
        if self.discrete and "float" not in text:
            return getattr(torch, text) if text in ("uint8", "int16", "int32") else torch.int64
        exact = text in NARROW or self.preprocessing is None  # what float32 holds without rounding
        return self.dtype if exact else torch.float64

    @torch.no_grad()
    def __call__(self, raw: Tensor, row: int) -> Batch:
        """Results of ``raw`` (n, D), the rows of the table from ``row`` on.

        Rows that hold or give a value that is not finite are NaN throughout and not ``good``; they
        are computed as if they were another row, and no other row sees them.

        ValueError for rows that the preprocessing refuses, with their numbers.
        """
        good = _finite(raw)
        if raw.device.type == "cuda" or not bool(good.all()):
            if raw.device.type != "cuda" and not bool(good.any()):
                nothing = {n: raw.new_full(s, math.nan, dtype=d) for n, (s, d) in self._kinds(raw)}
                return Batch(nothing, good)
            stand_in = raw.index_select(0, good.int().argmax()[None])
            raw = torch.where(good[:, None], raw, stand_in)
        if self.discrete and raw.is_floating_point():
            raw = _whole(raw, row)
        found = self._mean(raw, row)
        for value in found.values():
            good = good.to(value.device) & _finite(value)
        for name, value in found.items():
            mask = good if value.ndim == 1 else good[:, None]
            found[name] = value.masked_fill(~mask, math.nan)
        return Batch(found, good)

    def finish(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Results as asked for, in their order, of results on the host."""
        found = dict(values)
        if "bits_per_dim" in self.outputs:
            found["bits_per_dim"] = -found["log_prob"] / (self.features * math.log(2))
        if self.reference is not None:
            score = found["log_prob"]
            below = np.searchsorted(self.reference, score.astype(np.float64))
            share = 100.0 * below / len(self.reference)
            found["percentile"] = np.where(np.isnan(score), np.nan, share)
        kinds = self.layout(()).outputs
        return {name: found[name].astype(kinds[name][0], copy=False) for name in self.outputs}

    def _kinds(self, raw: Tensor) -> list[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
        n = len(raw)
        found = [(name, ((n, self.features), self.dtype)) for name in WIDE if name in self.outputs]
        return [*found, *([("log_prob", ((n,), self.scalar))] if self._wants_log_prob else [])]

    @property
    def _wants_log_prob(self) -> bool:
        return bool({*self.outputs} - {*WIDE})

    def _mean(self, raw: Tensor, row: int) -> dict[str, Tensor]:
        """Means over the draws."""
        if self.draws == 1:
            return self._draw(raw, row)
        total: dict[str, Tensor] = {}
        for draw in range(self.draws):
            for name, value in self._draw(raw, row + draw * DRAW).items():
                total[name] = total[name].add_(value) if name in total else value.clone()
        return {name: value.div_(self.draws) for name, value in total.items()}

    def _draw(self, raw: Tensor, offset: int) -> dict[str, Tensor]:
        x, log_det = raw.view(len(raw), *self.shape), None
        if self.preprocessing is not None:
            try:
                x, log_det = self.preprocessing.forward(x, self.seed, offset)
            except ValueError as error:
                first = offset % DRAW
                raise ValueError(f"rows {first} to {first + len(raw) - 1}: {error}") from None
        x = x.to(self.dtype)
        found: dict[str, Tensor] = {}
        if "gradient" in self.outputs:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(True)
                log_prob = self.model.log_prob(leaf)
                (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
            found["gradient"] = gradient.flatten(1)
            log_prob = log_prob.detach()
        elif self._wants_log_prob:
            log_prob = self.frozen.log_prob(x)
        if self._wants_log_prob:
            found["log_prob"] = log_prob if log_det is None else wide(log_prob) + log_det
        if {"z", "terms"} & {*self.outputs}:
            z = self.frozen.forward(x)[0]
            if "z" in self.outputs:
                found["z"] = z.flatten(1)
            if "terms" in self.outputs:
                terms = self.model.prior.log_prob(z).flatten(1)
                if self.model.grid is None:  # otherwise the scale is the prior's
                    terms = terms + self.model.scaling.log_scale
                found["terms"] = terms
        return found


def _checked(outputs: Sequence[str]) -> tuple[str, ...]:
    check_type("outputs", outputs, Iterable, "names")
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not names:
        raise ValueError(f"outputs must name one or more of {', '.join(OUTPUTS)}")
    for i, name in enumerate(names):
        if name not in OUTPUTS:
            raise ValueError(f"outputs must be among {', '.join(OUTPUTS)}, got {name!r}")
        if name in names[:i]:
            raise ValueError(f"outputs names {name!r} twice")
    return names


def _reference(reference: Any) -> np.ndarray:
    """Sorted, float64, without NaN and what is masked, which are bad rows."""
    if reference is None:
        raise ValueError("output 'percentile' needs a reference: log_prob of a reference set")
    name = "reference"
    if isinstance(reference, str | os.PathLike):
        name = f"reference {Path(reference)}"
        try:
            # Not np.load, which allocates what the header promises.
            reference = np.lib.format.open_memmap(reference, mode="r")
        except (OSError, ValueError) as problem:
            raise ValueError(f"{name} is not a readable .npy file: {problem}") from None
    if isinstance(reference, Tensor):
        reference = reference.detach().cpu().numpy()
    values = np.asarray(filled(reference))
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be numbers of shape (N,), got {values.dtype} {values.shape}")
    values = values[~np.isnan(values)].astype(np.float64)
    if not len(values):
        raise ValueError(f"{name} must hold at least one number")
    return np.sort(values)


def _finite(values: Tensor) -> Tensor:
    """(n,) bool: whether all values of each row are finite."""
    if not values.is_floating_point():
        return torch.ones(len(values), dtype=torch.bool, device=values.device)
    if values.ndim == 1:
        return values.isfinite()
    if values.device.type == "cpu":  # the sum is, unless a value is not, or it overflows
        good = values.sum(1).isfinite()
        if bool(good.all()):
            return good
    return values.isfinite().all(1)


def _whole(raw: Tensor, row: int) -> Tensor:
    """Integers that came as floating-point numbers, as a table with gaps has them."""
    levels = raw.to(torch.int64)
    if not torch.equal(levels.to(raw.dtype), raw):
        i, d = (levels.to(raw.dtype) != raw).nonzero()[0].tolist()
        raise ValueError(
            f"row {row + i}, feature {d}: expected an integer, to which 'dequantise' adds noise, "
            f"found {raw[i, d].item():g}"
        )
    return levels
