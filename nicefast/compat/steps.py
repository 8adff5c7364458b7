"""What every flow of additive couplings comes down to, whichever library it is written in.

A flow is a list of steps in data -> latent order, each in slots 0 .. D-1, and a base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Coupling:
    """``h[shifted] += sign * conditioner(h[conditioning])``.

    Attributes:
        conditioning, shifted: slots, in the order of the conditioner's inputs and outputs.
        conditioner: the peer's own module, not a copy.
        shape: what the conditioner sees of one row.
        sign: 1 or -1.
        full: the conditioner sees all slots, those that do not condition being zero, and answers
            with one value for each slot.
        context: features of the context; None where the conditioner does not show them.
        passes: how the flow's context comes to the conditioner: ``"argument"``, where there is one;
            ``"always"``, as an argument that may be None; ``"joined"``, behind its inputs;
            ``"never"``, where the library keeps it from this one.
    """

    conditioning: Tensor
    shifted: Tensor
    conditioner: nn.Module
    shape: tuple[int, ...]
    sign: int = 1
    full: bool = False
    context: int | None = 0
    passes: str = "argument"


@dataclass(frozen=True)
class Permutation:
    """``h[i] = h[index[i]]``."""

    index: Tensor


@dataclass(frozen=True)
class Affine:
    """``h = scale * h + shift``, element-wise, (D,) in float64."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Base:
    """Independent ``loc + scale * e``, with e of a standard ``"normal"`` or ``"logistic"``."""

    kind: str
    loc: Tensor
    scale: Tensor


Step = Coupling | Permutation | Affine


def inverted(steps: Sequence[Step]) -> list[Step]:
    """The steps of the inverse map: each inverted, the last first.

    >>> import torch
    >>> from nicefast.compat.steps import Affine, inverted
    >>> two = torch.full((1,), 2.0)
    >>> inverted([Affine(two, two)])
    [Affine(scale=tensor([0.5000]), shift=tensor([-1.]))]
    """
    back: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, Coupling):
            back.append(replace(step, sign=-step.sign))
        elif isinstance(step, Permutation):
            back.append(Permutation(torch.argsort(step.index)))
        else:
            back.append(Affine(1 / step.scale, -step.shift / step.scale))
    return back


def slots(event: tuple[int, ...]) -> Tensor:
    """The slots of an event, in its shape: numbered row by row."""
    return torch.arange(torch.Size(event).numel(), device="cpu").view(event)


def spread(value: Tensor, event: tuple[int, ...]) -> Tensor:
    """One float64 number for each slot, from what broadcasts to the event."""
    return value.detach().to("cpu", torch.float64).expand(event).reshape(-1)
