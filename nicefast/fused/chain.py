"""Couplings as plain tensors: what every fast path is given (see :mod:`nicefast.path`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..partition import Features

NARROW = 128  # hidden units, at most
SIDEWAYS = 512  # hidden units up to which blocks on their side are faster than others in float32,
RECORDED = 256  # and with gradients
Layers = tuple[tuple[Tensor, Tensor], ...]  # (weight, bias) of each linear layer of one conditioner


@dataclass(frozen=True, eq=False)
class Chain:
    """Couplings that take one partition and its complement, and how to compute them.

    ``sides`` are the features of the two sides; coupling l conditions on ``sides[conditions[l]]``
    and shifts the other. ``bfloat16``: the operands of products; sums and the stream are float32.
    ``rebuild``: activations are rebuilt in the backward pass, otherwise they are kept.
    """

    couplings: tuple[Layers, ...] = field(repr=False)
    conditions: tuple[int, ...]
    sides: tuple[Features, Features] = field(repr=False)
    activation: str
    context: int
    bfloat16: bool
    rebuild: bool

    @cached_property
    def parameters(self) -> list[Tensor]:
        return [t for layers in self.couplings for pair in layers for t in pair]

    @property
    def features(self) -> int:
        return sum(f.size for f in self.sides)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @cached_property
    def keeping(self) -> Chain:
        """The same, but that activations are kept."""
        return replace(self, rebuild=False) if self.rebuild else self

    @cached_property
    def rebuilding(self) -> Chain:
        """The same, but that activations are rebuilt."""
        return self if self.rebuild else replace(self, rebuild=True)

    @cached_property
    def products(self) -> int:
        """Matrix products of one pass."""
        return sum(len(layers) for layers in self.couplings)

    @cached_property
    def flops(self) -> int:
        """Of all products, for one row."""
        return 2 * sum(w.numel() for layers in self.couplings for w, _ in layers)

    @cached_property
    def hidden(self) -> int:
        """Units of the widest hidden layer."""
        return max(b.shape[0] for layers in self.couplings for _, b in layers[:-1])

    @property
    def narrow(self) -> bool:
        """Whether other operations take a good part of the time that products do."""
        return self.hidden <= NARROW

    def sideways(self, recorded: bool) -> bool:
        """Whether blocks of rows are best laid on their side; ``recorded``: for a gradient."""
        return self.hidden <= (RECORDED if recorded else SIDEWAYS) and not self.bfloat16

    @cached_property
    def largest(self) -> int:
        """Numbers in the largest weight."""
        return max(w.numel() for layers in self.couplings for w, _ in layers)

    @cached_property
    def width(self) -> int:
        """Of the widest tensor between two products."""
        return max(b.shape[0] for layers in self.couplings for _, b in layers)

    @cached_property
    def kept(self) -> int:
        """Numbers that the gradient needs of one row."""
        twice = 2 if ACTIVATIONS[self.activation].from_input else 1
        each = (twice * w.shape[1] for layers in self.couplings for w, _ in layers)
        return sum(each)

    def steps(self, inverse: bool) -> list[int]:
        """The couplings in the order in which they are computed."""
        return list(range(len(self.couplings)))[:: -1 if inverse else 1]


def take_apart(x: Tensor, sides: tuple[Features, Features]) -> list[Tensor]:
    """The two sides of the rows ``x``, each a view where its features are evenly spaced."""
    return [
        x[:, columns] if isinstance(columns := f.columns, slice) else x.index_select(1, columns)
        for f in sides
    ]


def put_together(out: Tensor, pair: list[Tensor], sides: tuple[Features, Features]) -> None:
    """The rows of the two sides ``pair``, to ``out``."""
    for half, f in zip(pair, sides, strict=True):
        columns = f.columns
        if isinstance(columns, slice):
            out[:, columns] = half
        else:
            out.index_copy_(1, columns, half)
