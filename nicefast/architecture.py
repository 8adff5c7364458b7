"""What a flow is built from: arguments of :class:`nicefast.NICE`, checked, and as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch

from .checks import as_integer, check_count, check_type
from .partition import Partition
from .reference import check_prior

PARTITIONS = ("half", "alternating", "checkerboard", "random")


class Architecture(NamedTuple):
    """One partition and the hidden widths of each coupling; ``configuration``: all of it as plain
    values, from which a saved file rebuilds it."""

    event_shape: torch.Size
    partitions: list[Partition]
    widths: list[tuple[int, ...]]
    configuration: dict[str, Any]


def architecture(
    features: int | Sequence[int],
    hidden: Sequence[int],
    couplings: int,
    prior: str,
    partition: str | Partition | Sequence[Partition],
) -> Architecture:
    """That of a flow with these arguments.

    Raises TypeError or ValueError, naming the argument, for what does not fit.

    >>> from nicefast.architecture import architecture
    >>> architecture((1, 2, 2), (8,), 2, "normal", "half").widths
    [(8,), (8,)]
    """
    event_shape = _event_shape(features)
    check_prior(prior)
    couplings = check_count("couplings", couplings, 1)
    kinds = (str, Partition, Iterable)
    check_type("partition", partition, kinds, "a name, a Partition or one for each coupling")
    partitions = partition_chain(partition, event_shape, couplings)
    widths = _hidden(hidden, couplings)
    same = all(own == widths[0] for own in widths)
    named = isinstance(partition, str)
    configuration = {
        "features": list(event_shape),
        "hidden": list(widths[0]) if same else [list(own) for own in widths],
        "couplings": couplings,
        "prior": prior,
        "partition": partition if named else [p.mask.int().tolist() for p in partitions],
    }
    return Architecture(event_shape, partitions, widths, configuration)


def partition_chain(
    partition: str | Partition | Sequence[Partition], event_shape: Sequence[int], couplings: int
) -> list[Partition]:
    """One partition for each coupling: from a name or a Partition p, then p, ~p, p, ... in turn.

    Raises TypeError or ValueError, naming ``partition``, for anything else that does not fit.

    >>> from nicefast.architecture import partition_chain
    >>> partition_chain("half", (4,), 3)
    [Partition.half(4), ~Partition.half(4), Partition.half(4)]
    """
    d = math.prod(event_shape)
    if isinstance(partition, str):
        partition = _named(partition, event_shape, d)
    if isinstance(partition, Partition):
        partitions = [~partition if i % 2 else partition for i in range(couplings)]
    else:
        partitions = list(partition)
        if not all(isinstance(p, Partition) for p in partitions):
            raise TypeError(
                "partition must be a name, a Partition or one Partition for each coupling, "
                f"got {[type(p).__name__ for p in partitions]}"
            )
        if len(partitions) != couplings:
            raise ValueError(
                f"partition must have one Partition for each of {couplings} couplings, "
                f"got {len(partitions)}"
            )
    for p in partitions:
        if p.features != d:
            raise ValueError(
                f"partition must split {d} features, as the flow has, got {p.features} ({p})"
            )
    return partitions


def _named(name: str, event_shape: Sequence[int], d: int) -> Partition:
    if name == "half":
        return Partition.half(d)
    if name == "alternating":
        return Partition.alternating(d)
    if name == "random":
        return Partition.random(d, seed=0)
    if name == "checkerboard":
        if len(event_shape) not in (2, 3):
            raise ValueError(
                "partition 'checkerboard' needs an event shape (H, W) or (C, H, W) as features, "
                f"got {tuple(event_shape)}"
            )
        channels = event_shape[0] if len(event_shape) == 3 else 1
        return Partition.checkerboard(event_shape[-2], event_shape[-1], channels=channels)
    raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}, got {name!r}")


def _event_shape(features: int | Sequence[int]) -> torch.Size:
    if as_integer(features) is None:
        check_type("features", features, Iterable, "an integer or an event shape")
    given = tuple(features) if isinstance(features, Iterable) else (features,)
    shape = [as_integer(f) for f in given]
    if any(f is None or f < 1 for f in shape):
        raise ValueError(
            f"features must be an integer or an event shape of integers >= 1, got {features!r}"
        )
    known = cast("list[int]", shape)
    if math.prod(known) < 2:
        raise ValueError(f"features must be at least 2 in all, got {features!r}")
    return torch.Size(known)


def _hidden(
    hidden: int | Sequence[int] | Sequence[Sequence[int]], couplings: int
) -> list[tuple[int, ...]]:
    """Each coupling's own hidden widths."""
    if as_integer(hidden) is not None:
        return [(cast("int", as_integer(hidden)),)] * couplings
    check_type("hidden", hidden, Iterable, "widths")
    given = list(cast("Sequence[Any]", hidden))
    if not any(isinstance(width, Iterable) for width in given):
        return [_plain(given)] * couplings
    if len(given) != couplings or not all(isinstance(own, Iterable) for own in given):
        raise ValueError(
            f"hidden must be widths, or one sequence of widths for each of {couplings} couplings, "
            f"got {hidden!r}"
        )
    return [_plain(own) for own in given]


def _plain(widths: Iterable[Any]) -> tuple[int, ...]:
    """Integers as Python's own; what is none is left to :class:`nicefast.MLP`, which names it."""
    given = tuple(widths)
    known = [as_integer(width) for width in given]
    return tuple(w if k is None else k for w, k in zip(given, known, strict=True))
