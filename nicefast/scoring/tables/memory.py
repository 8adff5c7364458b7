"""Arrays, tensors and whatever gives arrays one after the other."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import filled
from ...data import readers
from ...data.errors import FileFormatError
from .base import Array, Dtype, Piece, flat, spans
from .selection import Wanted, of_array

SAMPLED = 1 << 26  # bytes of an array in memory that its fingerprint sees


class Held:
    """An array or a tensor in memory, as a part."""

    names: tuple[str, ...] | None = None

    def __init__(self, values: Array | Tensor, name: str, wanted: Wanted) -> None:
        self.name = name
        if isinstance(values, Tensor):
            values = values.detach()
        self.dtype = _checked(values)
        self.rows: int | None = len(values)
        self.key_types: dict[str, Any] = {}
        shape = tuple(values.shape[1:])
        self._select, self.features = of_array(shape, wanted)
        self._values = values

    def count(self) -> int:
        return len(self._values)

    def pieces(
        self, start: int, stop: int | None, first: int, size: int, dtype: Dtype
    ) -> Iterator[Piece]:
        end = self.count() if stop is None else min(stop, self.count())
        for begin, until in spans(start, end, first, size):
            values = self._values[begin:until]
            if isinstance(values, Tensor):
                yield Piece(_flat_tensor(values, self._select), {})
            else:
                yield Piece(flat(filled(values), self._select, dtype), {})

    def fingerprint(self, about: Any) -> str:
        """Of shape, dtype and contents: all of 64 MiB, else so much, evenly spaced."""
        values = self._values
        said = (tuple(values.shape), str(values.dtype), about)
        digest = hashlib.sha256(repr(said).encode())
        run, every = 1024, max(1, math.ceil(values.nbytes / SAMPLED))
        for start in range(0, len(values), run * every):
            rows = filled(values[start : start + run])
            if isinstance(rows, Tensor):
                rows = rows.cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(np.ascontiguousarray(rows).tobytes())
        return digest.hexdigest()


class Iterated:
    """What an iterable gives, as a part: read once where it is an iterator.

    The first item is taken at once, for it says what the rows are; nothing says how many.
    """

    names: tuple[str, ...] | None = None

    def __init__(self, source: Iterable[Any], wanted: Wanted) -> None:
        self.name = f"iterable ({type(source).__name__})"
        self._source, self._wanted = source, wanted
        begun = iter(source)
        self._once = begun is source
        nothing = object()
        item = next(begun, nothing)
        self.rows: int | None = None
        self.dtype: Dtype
        self.key_types: dict[str, Any] = {}
        self._begun: Iterator[Any] | None = None
        if item is nothing:
            self.rows, self.dtype = 0, np.dtype(np.float32)
            self.features = math.prod(wanted.event_shape or (0,))
            return
        self._begun = chain([item], begun)
        part = self._part(0, item)
        self.dtype = part.dtype
        self.features = part.features

    def count(self) -> int:
        return self.rows or 0  # of the only part of a table none is asked

    def pieces(
        self, start: int, stop: int | None, first: int, size: int, dtype: Dtype
    ) -> Iterator[Piece]:
        items, self._begun = self._begun, None
        if items is None:
            if self._once and self.rows != 0:
                raise ValueError(f"{self.name}: it can be read only once")
            items = iter(self._source)
        seen = 0
        for i, item in enumerate(items):
            part = self._part(i, item)
            if (part.features, part.dtype) != (self.features, self.dtype):
                raise ValueError(
                    f"{self.name}: item {i}: expected rows of {self.features} values of "
                    f"{self.dtype} as in item 0, found {part.features} of {part.dtype}"
                )
            skipped = max(min(start - seen, part.count()), 0)
            seen += part.count()
            yield from part.pieces(skipped, None, part.count(), part.count() or 1, dtype)
        self.rows = seen

    def _part(self, i: int, item: Any) -> Held:
        values = item[0] if isinstance(item, tuple | list) and item else item
        if not isinstance(values, np.ndarray | Tensor):
            raise TypeError(
                f"{self.name}: item {i}: expected an array or a tensor of rows, or a tuple that "
                f"begins with one, got {type(values).__name__}"
            )
        try:
            return Held(values, self.name, self._wanted)
        except FileFormatError as why:
            raise ValueError(f"{self.name}: item {i}: {why}") from None


def _checked(values: Array | Tensor) -> Dtype:
    if not values.ndim:
        raise FileFormatError("expected rows, found one number")
    if not math.prod(values.shape[1:]):
        raise FileFormatError(f"holds rows of no values: shape {tuple(values.shape)}")
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.dtype.is_complex or values.is_quantized:
            held = "complex numbers" if values.dtype.is_complex else str(values.layout)
            raise FileFormatError(
                f"expected a dense tensor of real numbers or integers, got {held}"
            )
        return torch.uint8 if values.dtype == torch.bool else values.dtype
    readers.check_dtype(values.dtype)
    if values.dtype.itemsize > 8:
        raise FileFormatError(f"expected numbers of at most 64 bits, got {values.dtype}")
    if values.dtype.kind in "iub" and np.ma.is_masked(values):
        return np.dtype(np.float64)  # which holds what is missing, as in a file
    return np.dtype(np.uint8) if values.dtype.kind == "b" else values.dtype.newbyteorder("=")


def _flat_tensor(values: Tensor, select: slice | Array | None) -> Tensor:
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    if isinstance(select, slice):
        values = values[:, select]
    elif select is not None:
        values = values[:, torch.from_numpy(select).to(values.device)]
    return values.view(torch.uint8) if values.dtype == torch.bool else values
