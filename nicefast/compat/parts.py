"""What the readers of all libraries share: parts are known by the names of their classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import MLP, runs_more_than_forward
from .replacing import PEERS, own_methods
from .steps import Affine, Base, Coupling, Step, slots, spread

UNKNOWN = (
    "is no additive coupling, permutation or element-wise map that is known "
    "(subclasses of them, modules with methods of their own and modules with hooks are not)"
)
Event = tuple[int, ...]
Reader = Callable[[Any, str, Event], list[Step]]


def refused(part: object, where: str, why: str) -> ValueError:
    return ValueError(f"flow cannot be converted: {where}, a {type(part).__name__}, {why}")


def kind_of(part: object, peer: str) -> str:
    """The name of a class of that library, or of one of nicefast's for it; "" for any other, and
    for what does more than its class."""
    if isinstance(part, nn.Module) and (runs_more_than_forward(part) or own_methods(part)):
        return ""
    home = type(part).__module__
    own = home == f"{__package__}.{PEERS[peer].module}"
    return type(part).__name__ if own or home.partition(".")[0] == peer else ""


def each(read: Reader, parts: Iterable[Any], where: str, event: Event) -> list[Step]:
    found: list[Step] = []
    for i, part in enumerate(parts):
        found += read(part, f"{where}.{i}", event)
    return found


def checked_base(part: object, where: str, prior: str | None, known: Base | None) -> Base:
    if prior is not None:
        raise ValueError(f"prior must be None for a flow with a base of its own, got {prior!r}")
    if known is None:
        raise refused(part, where, "is neither a normal nor a logistic base with fixed loc, scale")
    return known


def standard_base(kind: str, event: Event) -> Base:
    zero = torch.zeros(torch.Size(event).numel(), dtype=torch.float64, device="cpu")
    return Base(kind, zero, zero + 1)


def others(conditioning: Tensor, event: Event) -> Tensor:
    """All other slots, ascending."""
    mask = torch.ones(torch.Size(event).numel(), dtype=torch.bool, device="cpu")
    mask[conditioning.flatten()] = False
    return mask.nonzero().flatten()


def normflows_half(mode: str, event: Event) -> tuple[Tensor, Event]:
    """Slots and shape of z1, the conditioning side of normflows' Split."""
    numbered = slots(event)
    if mode.startswith("checkerboard"):
        parity = torch.zeros(event, dtype=torch.int64, device="cpu")
        for dim, size in enumerate(event):
            parity = parity + slots((size,)).view(-1, *(1,) * (len(event) - 1 - dim))
        odd = parity % 2 == (0 if "inv" in mode else 1)
        return numbered[odd], (*event[:-1], event[-1] // 2)
    sides = numbered.chunk(2)
    side = sides[1] if "inv" in mode else sides[0]
    return side.flatten(), tuple(side.shape)


def native_steps(part: Any, peer: str, event: Event) -> list[Step] | None:
    """nicefast's own coupling or scaling, as a class of that library, data -> latent."""
    kind = kind_of(part, peer)
    part = getattr(part, "layer", part)  # as FrEIA's have it
    if runs_more_than_forward(part) or own_methods(part):
        return None
    if kind == "Scaling" and hasattr(part, "log_scale"):
        scale = spread(part.log_scale.double().exp().view(event), event)
        return [Affine(scale, torch.zeros_like(scale))]
    if kind != "AdditiveCoupling" or not hasattr(part, "partition"):
        return None
    conditioning, shifted = (getattr(part.partition, k).cpu() for k in ("conditioning", "shifted"))
    net = part.conditioner
    known = context_of(net)
    return [Coupling(conditioning, shifted, net, (len(conditioning),), context=known)]


def context_of(net: Any) -> int | None:
    """The context features of a conditioner; None where it does not show them."""
    if isinstance(net, MLP):
        return net.context
    for name in ("context_features", "context_channels"):  # of nflows' networks
        if hasattr(net, name):
            found = getattr(net, name)
            return 0 if found is None else found if isinstance(found, int) else None
    return None
