"""Products added to what is there; gradients of a chain's parameters, summed over blocks of rows
and over threads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEW_ROWS = 3  # of a matrix whose numbers MKL sums term by term,
LONG = 384  # where the sums are longer than this, in parts
FEW_INPUTS = 64  # of a layer: the gradient of its weights is then faster as in x out


def add_product(
    total: Tensor, a: Tensor, b: Tensor, sign: int = 1, plus: Tensor | None = None
) -> None:
    """``total += sign (a b + plus)``, rounded as the sum of two: left to itself, MKL adds to a
    small matrix term by term. How small depends on the processor."""
    if total.is_cpu or a.dtype != total.dtype:
        product = _product(a, b)
        total.add_(product if plus is None else product.add_(plus), alpha=sign)
    else:
        if plus is not None:
            total.add_(plus, alpha=sign)
        total.addmm_(a, b, alpha=sign)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``; of few rows in parts, since MKL sums terms one by one there."""
    few = a.is_cpu and a.dtype == torch.float32 and a.shape[0] <= FEW_ROWS
    if not few or a.shape[1] <= LONG:
        return torch.mm(a, b)
    first, *others = zip(a.split(LONG // 2, 1), b.split(LONG // 2), strict=True)
    total = torch.mm(*first)
    for part in others:
        total.add_(torch.mm(*part))
    return total


class Gradients(NamedTuple):
    """None where it was not wanted."""

    x: Tensor | None
    context: Tensor | None
    parameters: list[Tensor]


class Sum:
    """The gradient of a layer's parameters, summed over blocks, then over threads.

    A bias's in float64: a sum of sums over blocks next to a plain step's pairwise one.
    """

    def __init__(self, biased: bool = True) -> None:
        self._total: tuple[Tensor, Tensor] | None = None
        self._flipped = False  # the weight's, as in x out
        self._biased = biased  # otherwise the bias is summed elsewhere

    def add_product(self, d: Tensor, inputs: Tensor, few: int = FEW_INPUTS) -> None:
        """The share of ``d`` (N, out), the gradient of ``inputs W^T + b``."""
        flipped = inputs.shape[1] < min(d.shape[1], few)
        a, b = (inputs.t(), d) if flipped else (d.t(), inputs)
        # in float32 inside: another dtype here would copy d first
        bias = d.sum(0) if self._biased else d.new_zeros(())
        if self._total is None or d.dtype != torch.float32:
            self.add(torch.mm(a, b), bias, flipped)
        else:
            weight, total = self._total
            self._total = weight.addmm_(a, b), total.double().add_(bias)

    def add(self, weight: Tensor, bias: Tensor, flipped: bool = False) -> None:
        """A share of both; ``flipped``, as it always is or never, the weight's is in x out."""
        if self._total is None:
            self._total, self._flipped = (weight.float(), bias.float()), flipped
        else:
            self._total = self._total[0].add_(weight), self._total[1].double().add_(bias)

    def merge(self, other: Sum) -> None:
        """What another thread has summed."""
        if other._total is not None:
            self.add(*other._total, other._flipped)

    def total(self) -> tuple[Tensor, Tensor] | None:
        """Weight (out, in) and bias, in float32; None where there were no rows."""
        if self._total is None:
            return None
        weight, bias = self._total
        return weight.t().contiguous() if self._flipped else weight, bias.float()


def merge(sums: list[list[Sum]], others: list[list[Sum]]) -> None:
    """Add what another thread has summed."""
    for own, theirs in zip(sums, others, strict=True):
        for mine, yours in zip(own, theirs, strict=True):
            mine.merge(yours)
