"""What the fast couplings of all peers share: each feature read once and written once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .. import functional as F  # noqa: N812
from ..partition import Partition
from ..runtime import backend, watchers


def is_traced(*given: Tensor) -> bool:
    """Whether the peer's own code is to be seen: by a compiler or a tracer, which fuses it; by
    torch.func or forward-mode differentiation, which our operations do not have; or by tensors
    ``given`` that have no memory, no values, or a class with rules of its own."""
    return (
        watchers.is_compiled()
        or watchers.is_traced()
        or watchers.is_transformed()
        or watchers.has_tangents()
        or any(
            type(t) not in (Tensor, nn.Parameter) or t.is_meta or not watchers.has_values(t)
            for t in given
        )
    )


def is_overridden(module: nn.Module, methods: Iterable[str]) -> bool:
    """Whether an instance has one of its class's ``methods`` replaced, whose result we know."""
    own = module.__dict__
    return any(name in own for name in methods)


def contents(buffer: Tensor) -> bytes:
    """The values of a mask or of indices, row by row, as a key to what is made of them.

    They are read in every call, so that values written in any way are seen; whatever is kept is
    kept under the values themselves. Waits for the device where ``buffer`` is not on the CPU.
    """
    return (buffer if buffer.device.type == "cpu" else buffer.cpu()).numpy().tobytes()


@functools.lru_cache(maxsize=256)
def partition_of(conditioning: bytes) -> Partition | None:
    """The partition of one byte for each feature, not 0 where it conditions; None where a side is
    empty."""
    bits = [bit != 0 for bit in conditioning]
    if all(bits) or not any(bits):
        return None
    with _disable_current_modes():
        return Partition.from_mask(torch.tensor(bits, device="cpu"))


@functools.lru_cache(maxsize=256)
def indices(partition: Partition, device: torch.device, conditioning: bool) -> Tensor:
    """The features of one side, in memory that all callers share.

    They are real and fit for autograd, whoever asks first.
    """
    with _disable_current_modes(), torch.inference_mode(False):
        return (partition.conditioning if conditioning else partition.shifted).to(device)


def split(x: Tensor, partition: Partition, view: bool = False) -> tuple[Tensor, Tensor]:
    """``(x, x1)`` as :func:`nicefast.functional.split_features`, x1 in memory of its own: a
    conditioner may write over it; or, as ``view``, in that of x, where it lies side by side there.
    """
    if x.shape[-1:] != (partition.features,) or backend.uses_kernels(x.device):
        x, x1 = F.split_features(x, partition)  # or its error
        own = x1.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    else:
        side = partition.locate(x.device, conditioning=True)
        own = side.step != 1
        if own:
            x1 = x.index_select(-1, indices(partition, x.device, True))
        else:
            x1 = x.narrow(-1, side.start, side.size)
    return x, x1 if own or view else x1.clone(memory_format=torch.contiguous_format)


def shifted(x: Tensor, shift: Tensor, partition: Partition, inverse: bool) -> Tensor:
    """:func:`nicefast.functional.additive_coupling`, the shift broadcast to x.

    Without kernels one operation of PyTorch: what autograd.Function and an operation of our own
    cost in Python is more than all that the peers do to a small batch.
    """
    wanted = (*x.shape[:-1], partition.locate(x.device).size)
    shift = shift if shift.shape == wanted else shift.expand(wanted)
    if backend.uses_kernels(x.device):
        return F.additive_coupling(x, shift, partition, inverse)
    if shift.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, shift.dtype)
        x, shift = x.to(dtype), shift.to(dtype)
    at = indices(partition, x.device, False)
    return x.contiguous().index_add(-1, at, shift, alpha=-1 if inverse else 1)


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
    rows, x1 = split(x.reshape(len(x), partition.features), partition, view)
    shift = conditioner(x1.view(len(x), *conditioning_shape))
    # what the sum of the two would broadcast
    wanted = (len(x), *_shifted_shape(x.shape[1:], conditioning_shape))
    shift = shift if shift.shape == wanted else shift.expand(wanted)
    shift = shift.reshape(len(x), partition.features - x1.shape[1])
    return shifted(rows, shift, partition, inverse).view(x.shape)


def _shifted_shape(event: tuple[int, ...], conditioning: tuple[int, ...]) -> tuple[int, ...]:
    """What is left of the event, along the one dimension along which it is split."""
    return tuple(
        whole - part if whole != part else whole
        for whole, part in zip(event, conditioning, strict=True)
    )


def zero_log_det(x: Tensor) -> Tensor:
    """(N,) zeros that the caller may add to in place, as it may to the peers'."""
    return torch.zeros(len(x), dtype=x.dtype, device=x.device)
