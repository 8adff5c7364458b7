"""Partitions: which features condition a coupling and which it shifts."""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Features(NamedTuple):
    """Where the features of one side lie, as the operations want to be told.

    ``start + step * j`` for ``j < size`` with step 1 or 2, or, with step 0, two maps on the
    device: ``indices`` [size] holds the features and ``slots`` [D] the place of each feature among
    them, -1 for one of the other side.
    """

    size: int
    start: int
    step: int
    indices: Tensor | None
    slots: Tensor | None

    @property
    def columns(self) -> slice | Tensor:
        """As plain PyTorch indexes them."""
        return columns_of(self.indices, self.start, self.step, self.size)


def columns_of(index: Tensor | None, start: int, step: int, count: int) -> slice | Tensor:
    """One side's features as plain PyTorch indexes them."""
    return slice(start, start + step * count, step) if index is None else index


class Partition:
    """A split of D features into conditioning features x1 and shifted features x2.

    Made by :meth:`half`, :meth:`alternating`, :meth:`checkerboard`, :meth:`random` or
    :meth:`from_mask`; ``~p`` swaps the two sides. Immutable, hashable, printable; two partitions
    are equal where their masks are. Any split of any two sizes >= 1 will do
    (Dinh et al. 2014, section 3.2; section 4.1 alternates even and odd features).

    Attributes:
        features: D.
        mask: bool tensor (D,), True where a feature conditions and stays unchanged (a copy).
        pattern: the mask as text, one digit for each feature.
        conditioning, shifted: int64 index tensors of the two sides, ascending (copies).

    >>> import nicefast as nf
    >>> p = nf.Partition.alternating(5)
    >>> p.conditioning, p.shifted
    (tensor([0, 2, 4]), tensor([1, 3]))
    >>> ~p == nf.Partition.alternating(5, parity=1)
    True
    """

    __slots__ = ("__weakref__", "_bits", "_complement", "_located", "_name")

    _bits: bytes  # one byte for each feature, 1 = conditioning
    _name: str
    _complement: Partition | None
    _located: dict[tuple[torch.device, bool], Features]

    def __init__(self) -> None:
        raise TypeError(
            "make a Partition by Partition.half, .alternating, .checkerboard, .random or .from_mask"
        )

    @classmethod
    def _make(cls, bits: bytes, name: str) -> Partition:
        if len(bits) < 2:
            raise ValueError(f"{name}: a partition needs at least 2 features, got {len(bits)}")
        if not 0 < sum(bits) < len(bits):
            side = "shifted" if sum(bits) else "conditioning"
            raise ValueError(
                f"{name}: each side of a partition needs at least one feature, "
                f"but no feature is {side}"
            )
        self = object.__new__(cls)
        for attribute, value in (
            ("_bits", bits),
            ("_name", name),
            ("_complement", None),
            ("_located", {}),
        ):
            object.__setattr__(self, attribute, value)
        return self

    @classmethod
    def half(cls, features: int) -> Partition:
        """The first ``ceil(D / 2)`` features condition, the rest are shifted."""
        features = _integer("features", features, 2)
        first = (features + 1) // 2
        return cls._make(b"\1" * first + b"\0" * (features - first), f"Partition.half({features})")

    @classmethod
    def alternating(cls, features: int, parity: int = 0) -> Partition:
        """Features of index ``parity`` modulo 2 condition, the others are shifted."""
        features, parity = _integer("features", features, 2), _parity(parity)
        bits = bytes((d + parity + 1) % 2 for d in range(features))
        return cls._make(bits, f"Partition.alternating({features}, parity={parity})")

    @classmethod
    def checkerboard(cls, height: int, width: int, channels: int = 1, parity: int = 0) -> Partition:
        """Pixels with ``(row + column) % 2 == parity`` condition, in every channel.

        Features are those of a (channels, height, width) image, flattened row by row.
        """
        height, width = _integer("height", height, 1), _integer("width", width, 1)
        channels, parity = _integer("channels", channels, 1), _parity(parity)
        image = bytes((r + c + parity + 1) % 2 for r in range(height) for c in range(width))
        name = f"Partition.checkerboard({height}, {width}, channels={channels}, parity={parity})"
        return cls._make(image * channels, name)

    @classmethod
    def random(cls, features: int, seed: int) -> Partition:
        """``ceil(D / 2)`` features drawn at random condition; the same seed, the same partition."""
        features, seed = _integer("features", features, 2), _integer("seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(features, generator=generator, device="cpu").tolist()
        chosen = set(order[: (features + 1) // 2])
        bits = bytes(d in chosen for d in range(features))
        return cls._make(bits, f"Partition.random({features}, seed={seed})")

    @classmethod
    def from_mask(cls, mask: Tensor) -> Partition:
        """Any split: ``mask`` is a one-dimensional bool tensor (or sequence), True = conditioning.

        Raises TypeError for another dtype, ValueError for another shape or an empty side.
        """
        if not isinstance(mask, Tensor):
            if np.ma.is_masked(mask):
                raise ValueError("mask has masked values: expected all of them")
            try:
                mask = torch.as_tensor(mask, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                kind = type(mask).__name__
                raise TypeError(
                    f"mask must be a bool tensor or a sequence of bools, got {kind}"
                ) from None
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be a bool tensor, True = conditioning, got dtype {mask.dtype}"
            )
        if mask.ndim != 1:
            raise ValueError(
                f"mask must have one dimension (features), got shape {tuple(mask.shape)}"
            )
        bits = bytes(mask.tolist())
        shown = "".join("x."[not b] for b in bits[:16]) + ("..." if len(bits) > 16 else "")
        return cls._make(bits, f"Partition.from_mask({len(bits)} features: {shown})")

    @property
    def features(self) -> int:
        return len(self._bits)

    @property
    def mask(self) -> Tensor:
        return torch.tensor(list(self._bits), dtype=torch.bool, device="cpu")

    @property
    def pattern(self) -> str:
        """The mask as text, one digit for each feature: 1 = conditioning."""
        return "".join(map(str, self._bits))

    @property
    def conditioning(self) -> Tensor:
        return torch.tensor(_positions(self._bits, 1), device="cpu")

    @property
    def shifted(self) -> Tensor:
        return torch.tensor(_positions(self._bits, 0), device="cpu")

    def __invert__(self) -> Partition:
        if self._complement is None:
            other = self._make(bytes(1 - b for b in self._bits), _complement_name(self._name))
            object.__setattr__(self, "_complement", other)
            object.__setattr__(other, "_complement", self)
        assert self._complement is not None
        return self._complement

    def locate(self, device: torch.device, conditioning: bool = False) -> Features:
        """The shifted (or the conditioning) features as the operations take them.

        Maps are made once for each device and side, and constant inside a compiled graph.
        """
        key = (device, conditioning)
        if key not in self._located:
            with torch.inference_mode(False):  # the maps outlive this call and may meet autograd
                found = _locate(self._bits, device, int(conditioning))
            if type(found.indices) not in (Tensor, type(None)):
                return found  # fake tensors of a trace: not to be kept
            self._located[key] = found
        return self._located[key]

    # what torch.compiler.assume_constant_result does, without importing the compiler to do it
    locate._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Partition is immutable: cannot set {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and self._bits == other._bits

    def __hash__(self) -> int:
        return hash(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __repr__(self) -> str:
        return self._name

    def __reduce__(self) -> tuple[object, tuple[bytes, str]]:
        return Partition._make, (self._bits, self._name)

    def __deepcopy__(self, memo: dict[int, object]) -> Partition:
        return self  # immutable, and the maps on the device may as well be shared


def _locate(bits: bytes, device: torch.device, side: int) -> Features:
    features = _positions(bits, side)
    size, start = len(features), features[0]
    step = features[1] - start if size > 1 else 1
    if step <= 2 and features == list(range(start, start + step * size, step)):
        return Features(size, start, step, None, None)
    indices = torch.tensor(features, device=device)
    slots = torch.full((len(bits),), -1, dtype=torch.int32, device=device)
    slots[indices] = torch.arange(size, dtype=torch.int32, device=device)
    return Features(size, 0, 0, indices, slots)


def _positions(bits: bytes, side: int) -> list[int]:
    return [d for d, b in enumerate(bits) if b == side]


def _complement_name(name: str) -> str:
    return name[1:] if name.startswith("~") else f"~{name}"


def _integer(argument: str, value: int, least: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument} must be an integer, got {value!r}") from None
    if value < least:
        raise ValueError(f"{argument} must be at least {least}, got {value}")
    return value


def _parity(value: int) -> int:
    if value not in (0, 1):
        raise ValueError(f"parity must be 0 or 1, got {value!r}")
    return int(value)
