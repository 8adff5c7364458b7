"""What the fast couplings of all peers share: each feature read once and written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .. import functional as F  # noqa: N812
from ..partition import Partition

T = TypeVar("T")
KEPT = "_nicefast_partition"  # in the module's __dict__: what a partition was made of, and it


def is_traced() -> bool:
    """Whether the peer's own code is to be seen: by a compiler or a tracer, which fuses it, or by
    forward-mode differentiation, which our operations do not have."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def kept_partition(
    module: nn.Module, buffer: Tensor, shape: tuple[int, ...], make: Callable[[], T]
) -> T:
    """The partition of rows of ``shape`` that ``buffer`` says, made anew when the buffer changes.

    A buffer that moves to another device or dtype is another tensor; one that a checkpoint is
    loaded into has another version.
    """
    known = module.__dict__.get(KEPT)
    version = buffer._version if not buffer.is_inference() else 0
    if known is not None:
        of, at, rows, partition = known
        if of is buffer and at == version and rows == shape:
            return cast("T", partition)
    partition = make()
    module.__dict__[KEPT] = (buffer, version, shape, partition)
    return partition


def split(x: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
    """``(x, x1)`` as :func:`nicefast.functional.split_features`, x1 in memory of its own: a
    conditioner may write over it."""
    rows, x1 = F.split_features(x, partition)
    if x1.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr():
        x1 = x1.clone(memory_format=torch.contiguous_format)
    return rows, x1


def couple(
    x: Tensor,
    partition: Partition,
    conditioner: Callable[[Tensor], Tensor],
    conditioning_shape: tuple[int, ...],
    inverse: bool,
    view: bool = False,
) -> Tensor:
    """``x`` (N, *event) with the shift of its conditioning features added (inverse: taken away).

    The conditioner sees those features as (N, *conditioning_shape), in memory of their own; or, as
    ``view``, in that of x, where they lie side by side.
    """
    rows = x.reshape(len(x), partition.features)
    rows, x1 = F.split_features(rows, partition) if view else split(rows, partition)
    shift = conditioner(x1.view(len(x), *conditioning_shape))
    expected = (len(x), partition.features - x1.shape[1])
    # what the sum of the two would broadcast
    wanted = (len(x), *_shifted_shape(x.shape[1:], conditioning_shape))
    shift = (shift if shift.shape == wanted else shift.expand(wanted)).reshape(expected)
    return F.additive_coupling(rows, shift, partition, inverse).view(x.shape)


def _shifted_shape(event: tuple[int, ...], conditioning: tuple[int, ...]) -> tuple[int, ...]:
    """What is left of the event, along the one dimension along which it is split."""
    return tuple(
        whole - part if whole != part else whole
        for whole, part in zip(event, conditioning, strict=True)
    )


def zero_log_det(x: Tensor) -> Tensor:
    """(N,) zeros that the caller may add to in place, as it may to the peers'."""
    return torch.zeros(len(x), dtype=x.dtype, device=x.device)
