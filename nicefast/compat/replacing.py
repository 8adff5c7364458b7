"""accelerate and restore: a peer's additive couplings made fast where they are.

A module gets another class, a subclass of its own one, and stays the same object: parameters,
buffers, names, hooks, references and optimisers are untouched, and restoring it is giving its old
class back.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..layers import runs_more_than_forward


class Peer(NamedTuple):
    """A library: its module of nicefast.compat, the first version that is supported and the first
    that is not, and the classes whose instances are looked at."""

    module: str
    least: str
    bound: str
    classes: tuple[str, ...]


PEERS = {
    "nflows": Peer("nflows", "0.14", "0.15", ("CouplingTransform",)),
    "normflows": Peer(
        "normflows", "1.7", "1.8", ("AffineCoupling", "AffineCouplingBlock", "MaskedAffineFlow")
    ),
    "zuko": Peer("zuko", "1.4", "2", ("GeneralCouplingTransform",)),
    "FrEIA": Peer("freia", "0.2", "0.3", ("_BaseCouplingBlock",)),
}


class Finding(NamedTuple):
    """One coupling: where it is in the tree (``""``: at its root), what it is, and, where it was
    left alone, why."""

    name: str
    kind: str
    reason: str = ""


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` did: couplings that are fast now, and those left alone, and why."""

    replaced: tuple[Finding, ...]
    left: tuple[Finding, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} couplings replaced, {len(self.left)} left as they are"]
        lines += [f"  replaced  {name or '(root)'}: {kind}" for name, kind, _ in self.replaced]
        lines += [f"  left      {name or '(root)'}: {kind}, {why}" for name, kind, why in self.left]
        return "\n".join(lines)


def accelerate(module: nn.Module) -> Acceleration:
    """Make the additive couplings within ``module`` fast, whichever library they come from.

    Knows nflows' ``AdditiveCouplingTransform``; normflows' ``AffineCoupling`` and
    ``AffineCouplingBlock`` with ``scale=False`` and ``MaskedAffineFlow`` with ``s=None``; zuko's
    ``GeneralCouplingTransform`` with ``AdditiveTransform``; FrEIA's ``NICECouplingBlock``. They
    stay the same objects with the same parameters, names in ``state_dict``, directions, shapes and
    errors, and give the same values, log-determinants, gradients and samples, to rounding;
    optimisers and checkpoints go on working. Everything else is left alone. :func:`restore` undoes
    it. Under ``torch.compile`` a coupling shows its library's own code.

    Left untouched, with the reason in the report: couplings that are not additive, subclasses,
    modules with hooks or a ``forward`` of their own, couplings that are in the tree more than once
    or share a conditioner, modules on several devices, and versions of a library that are not
    known.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.

    >>> import torch, nicefast as nf
    >>> from nflows.flows import SimpleRealNVP
    >>> flow = SimpleRealNVP(4, 16, 3, 1, use_volume_preserving=True)
    >>> x = torch.randn(5, 4)
    >>> before = flow.log_prob(x)
    >>> report = nf.accelerate(flow)
    >>> len(report.replaced), torch.allclose(flow.log_prob(x), before)
    (3, True)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    places: dict[nn.Module, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        places.setdefault(part, []).append(name)
    couplings: dict[nn.Module, type[nn.Module] | str] = {}
    inside: set[nn.Module] = set()  # parts of a coupling that is judged as a whole
    for part in places:
        if part not in inside and (found := _recognise(part)) is not None:
            couplings[part] = found
            inside.update(part.modules())
    owners = Counter(inner for part in couplings for inner in part.modules())
    plan: list[tuple[nn.Module, type[nn.Module]]] = []
    replaced, left = [], []
    for part, found in couplings.items():
        name, kind = places[part][0], type(part).__name__
        why = found if isinstance(found, str) else _why_left(part, places, owners)
        if why is not None:
            left.append(Finding(name, kind, why))
        elif isinstance(found, type):
            plan.append((part, found))
            replaced.append(Finding(name, kind))
    for part, fast in plan:
        part.__class__ = fast
    return Acceleration(tuple(replaced), tuple(left))


def restore(module: nn.Module) -> int:
    """Undo :func:`accelerate`: every coupling within ``module`` gets its own class back.

    Returns how many there were. TypeError where ``module`` is no ``torch.nn.Module``.

    >>> import nicefast as nf
    >>> from nflows.flows import SimpleRealNVP
    >>> flow = SimpleRealNVP(4, 16, 3, 1, use_volume_preserving=True)
    >>> _ = nf.accelerate(flow)
    >>> nf.restore(flow)
    3
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    count = 0
    for part in module.modules():
        own = _own_class(type(part))
        if own is not None:
            part.__class__ = own
            count += 1
    return count


def own_methods(part: nn.Module) -> list[str]:
    """The methods of its class that an instance has replaced."""
    return [name for name in part.__dict__ if callable(getattr(type(part), name, None))]


def _own_class(fast: type[nn.Module]) -> type[nn.Module] | None:
    """The peer's class that a fast one stands for: of the same name, and one of its bases."""
    if not fast.__module__.startswith(f"{__package__}."):
        return None
    for base in fast.__mro__[1:]:
        if base.__name__ == fast.__name__ and base.__module__.partition(".")[0] in PEERS:
            return base
    return None


def _recognise(part: nn.Module) -> type[nn.Module] | str | None:
    """The class to take the part's place, or why none does; None for what is no peer's coupling."""
    if _own_class(type(part)) is not None:
        return "fast already"
    for base in type(part).__mro__:
        package = base.__module__.partition(".")[0]
        if package in PEERS and base.__name__ in PEERS[package].classes:
            break
    else:
        return None
    peer = PEERS[package]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed as a package, so its version is not known"
    if not _numbers(peer.least) <= _numbers(version) < _numbers(peer.bound):
        return f"{package} {version} is not supported, from {peer.least} to below {peer.bound} is"
    compat = importlib.import_module(f"{__package__}.{peer.module}")
    found: type[nn.Module] | str = compat.recognise(part)
    return found


def _numbers(version: str) -> tuple[int, ...]:
    found = []
    for piece in version.split("."):
        if not piece.isdigit():
            break
        found.append(int(piece))
    return tuple(found)


def _why_left(
    part: nn.Module, places: dict[nn.Module, list[str]], owners: Counter[nn.Module]
) -> str | None:
    """What of a recognised coupling replacement would lose, if anything."""
    if len(places[part]) > 1:
        return f"shared: it is in the tree {len(places[part])} times"
    for inner in part.modules():
        if owners[inner] > 1 and any(True for _ in inner.parameters()):
            return f"shared: {places[inner][0]} is in {owners[inner]} couplings"
    if runs_more_than_forward(part):
        return "it has hooks, or a forward of its own"
    own = own_methods(part)
    if own:
        return f"it has a method of its own: {', '.join(own)}"
    tensors = [*part.parameters(), *part.buffers()]
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        return f"on several devices: {', '.join(devices)}"
    return None
