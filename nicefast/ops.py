"""The operations as PyTorch knows them: schema, shapes, and one implementation for each device.

``torch.ops.nicefast.*`` take two-dimensional tensors that :mod:`nicefast.functional` has checked.
The dispatcher picks the device; on a GPU the implementation is the Triton launcher, elsewhere plain
PyTorch: the reference, or the same in cache blocks. :func:`nicefast.set_backend` can say otherwise.
Gradients live one floor up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import likelihood, reference
from .partition import columns_of
from .runtime import backend
from .runtime.precision import at_least_float32
from .runtime.watchers import has_values

_DEVICES = ("CPU", "CUDA", "MPS", "XPU")
_library = torch.library.Library("nicefast", "DEF")


def _define(
    schema: str,
    plain: Callable[..., Any],
    kernel: str,
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
) -> None:
    """Register one operation: ``plain`` is the reference, ``kernel`` names its Triton launcher.

    ``check`` looks at values when the operation runs, in compiled graphs as well.
    """
    name = schema.partition("(")[0]
    qualified = f"nicefast::{name}"

    def implementation(*args: Any) -> Any:
        tensor = next(a for a in args if isinstance(a, Tensor))
        if check is not None:
            check(*args)
        if backend.uses_kernels(tensor.device):
            return getattr(backend.kernels(), kernel)(*args)
        return plain(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in _DEVICES:
        _library.impl(name, implementation, device)
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_vmap(qualified, _one_by_one(name), lib=_library)


def _one_by_one(name: str) -> Callable[..., Any]:
    """vmap as a loop: right for every operation, as fast as its single calls."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        operation = getattr(torch.ops.nicefast, name)
        outputs = [
            operation(
                *(
                    a if dim is None else a.select(dim, i)
                    for a, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(outputs[0], tuple):
            return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0,) * len(outputs[0])
        return torch.stack(outputs), 0

    return rule


def check_log_scale(log_scale: Tensor) -> None:
    """ValueError for a non-finite entry, where looking costs nothing and values are at hand."""
    if not log_scale.is_cpu or not has_values(log_scale):
        return
    if math.isfinite(log_scale.sum().item()):  # one that is not would show: this is quick
        return
    finite = torch.isfinite(log_scale)
    if not finite.all():
        feature = int((~finite).nonzero()[0])
        value = log_scale[feature].item()
        raise ValueError(f"log_scale must be finite, got {value} at feature {feature}")


def check_levels(levels: Tensor, k: int | None) -> None:
    """ValueError for a level that is out of range, where looking costs little."""
    if levels.device.type != "cpu" or not levels.numel():
        return
    if k is not None and levels.dtype == torch.uint8 and k > 255:
        return
    low, high = (int(v) for v in torch.aminmax(levels))
    first, last = (-(1 << 24), 1 << 24) if k is None else (0, k - 1)
    if low < first or high > last:
        why = "" if k is not None else ", the integers that float32 holds"
        raise ValueError(
            f"levels must lie in {first} .. {last}{why}, got values from {low} to {high}"
        )


# x with shift (and bias) added to its shifted features -----------------------------------------


def _additive_coupling(x: Tensor, *coupling: Any) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    _additive_coupling_(y, *coupling)
    return y


def _additive_coupling_(
    x: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    slot: Tensor | None,
    index: Tensor | None,
    start: int,
    step: int,
    inverse: bool,
) -> None:
    reference.additive_coupling_(
        x, shift, columns_of(index, start, step, shift.shape[1]), inverse, bias
    )


_COUPLING = (
    "Tensor shift, Tensor? bias, Tensor? slot, Tensor? index, int start, int step, bool inverse"
)
_define(
    f"additive_coupling(Tensor x, {_COUPLING}) -> Tensor",
    _additive_coupling,
    "couple",
    lambda x, *_: x.new_empty(x.shape),
)
_define(
    f"additive_coupling_(Tensor(a!) x, {_COUPLING}) -> ()",
    _additive_coupling_,
    "couple_",
    lambda *_: None,
)


# the selection of one side's features, with the column sums that a bias's gradient is -----------


def _select_features(
    x: Tensor,
    index: Tensor | None,
    start: int,
    step: int,
    count: int,
    negate: bool,
    column_sums: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    columns = reference.select_features(x, columns_of(index, start, step, count))
    if negate:
        columns = -columns
    work = at_least_float32(x.dtype)
    sums = columns.sum(0, dtype=work) if column_sums else x.new_empty(0, dtype=work)
    out = columns.to(dtype)
    return (out.clone() if out._is_view() else out).contiguous(), sums


def _select_features_fake(
    x: Tensor,
    index: Tensor | None,
    start: int,
    step: int,
    count: int,
    negate: bool,
    column_sums: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    work = at_least_float32(x.dtype)
    sums = x.new_empty(count if column_sums else 0, dtype=work)
    return x.new_empty((x.shape[0], count), dtype=dtype), sums


_define(
    "select_features(Tensor x, Tensor? index, int start, int step, int count, bool negate, "
    "bool column_sums, ScalarType dtype) -> (Tensor, Tensor)",
    _select_features,
    "select",
    _select_features_fake,
)


# scaling + prior + log-determinant + row sum ----------------------------------------------------


def _in_blocks(*tensors: Tensor | None) -> bool:
    """Whether :mod:`nicefast.likelihood` computes these, rather than the definition itself."""
    return likelihood.serves(*tensors) and backend.get_backend() != "reference"


def _scale_log_prob(
    h: Tensor, log_scale: Tensor, prior: str, return_z: bool
) -> tuple[Tensor, Tensor]:
    if _in_blocks(h, log_scale):
        return likelihood.scale_log_prob(h, log_scale, prior, return_z)
    z, log_prob = reference.scale_log_prob(h, log_scale, prior, return_z=True)
    return (z.contiguous() if return_z else h.new_empty(0)), log_prob


def _scale_log_prob_fake(
    h: Tensor, log_scale: Tensor, prior: str, return_z: bool
) -> tuple[Tensor, Tensor]:
    work = at_least_float32(h.dtype, log_scale.dtype)
    z = h.new_empty(h.shape if return_z else (0,))
    return z, h.new_empty(h.shape[0], dtype=work)


def _scale_log_prob_backward(
    grad_z: Tensor | None, grad_log_prob: Tensor, h: Tensor, log_scale: Tensor, prior: str
) -> tuple[Tensor, Tensor]:
    arguments = (grad_z, grad_log_prob, h, log_scale)
    if _in_blocks(*arguments):
        return likelihood.scale_log_prob_backward(*arguments, prior)
    return reference.scale_log_prob_backward(*arguments, prior)


_define(
    "scale_log_prob(Tensor h, Tensor log_scale, str prior, bool return_z) -> (Tensor, Tensor)",
    _scale_log_prob,
    "scale_log_prob_fwd",
    _scale_log_prob_fake,
    lambda h, log_scale, *_: check_log_scale(log_scale),
)
_define(
    "scale_log_prob_backward(Tensor? grad_z, Tensor grad_log_prob, Tensor h, Tensor log_scale, "
    "str prior) -> (Tensor, Tensor)",
    _scale_log_prob_backward,
    "scale_log_prob_bwd",
    lambda grad_z, grad_log_prob, h, log_scale, prior: (
        h.new_empty(h.shape),
        log_scale.new_empty(log_scale.shape),
    ),
)


# noise of the prior, scaled back ----------------------------------------------------------------


def _sample_prior(
    log_scale: Tensor, n: int, row_offset: int, seed: int, prior: str, dtype: torch.dtype
) -> Tensor:
    return reference.sample_prior(log_scale, n, seed, prior, row_offset, dtype)


_define(
    "sample_prior(Tensor log_scale, SymInt n, SymInt row_offset, SymInt seed, str prior, "
    "ScalarType dtype) -> Tensor",
    _sample_prior,
    "sample_fwd",
    lambda log_scale, n, row_offset, seed, prior, dtype: log_scale.new_empty(
        (n, log_scale.shape[0]), dtype=dtype
    ),
    lambda log_scale, *_: check_log_scale(log_scale),
)
_library.define(
    "sample_prior_seeded(Tensor log_scale, SymInt n, SymInt row_offset, Tensor seed, str prior, "
    "ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _sample_prior_seeded(
    log_scale: Tensor, n: int, row_offset: int, seed: Tensor, prior: str, dtype: torch.dtype
) -> Tensor:
    """``sample_prior`` with a seed that is read when the operation runs."""
    return torch.ops.nicefast.sample_prior(log_scale, n, row_offset, int(seed), prior, dtype)


for _device in _DEVICES:
    _library.impl("sample_prior_seeded", _sample_prior_seeded, _device)
torch.library.register_fake(
    "nicefast::sample_prior_seeded",
    lambda log_scale, n, row_offset, seed, prior, dtype: log_scale.new_empty(
        (n, log_scale.shape[0]), dtype=dtype
    ),
    lib=_library,
)
torch.library.register_vmap(
    "nicefast::sample_prior_seeded", _one_by_one("sample_prior_seeded"), lib=_library
)
_define(
    "sample_prior_backward(Tensor grad_h, Tensor h, ScalarType dtype) -> Tensor",
    reference.sample_prior_backward,
    "sample_bwd",
    lambda grad_h, h, dtype: h.new_empty(h.shape[1], dtype=dtype),
)


# integers with noise, scaled to a range --------------------------------------------------------


def _dequantise(
    levels: Tensor, k: int | None, row_offset: int, seed: int, low: float, high: float
) -> Tensor:
    return reference.dequantise(levels, k, seed, row_offset, low, high)


_define(
    "dequantise(Tensor levels, int? k, SymInt row_offset, SymInt seed, float low, float high) "
    "-> Tensor",
    _dequantise,
    "dequantise_fwd",
    lambda levels, *_: levels.new_empty(levels.shape, dtype=torch.float32),
    lambda levels, k, *_: check_levels(levels, k),
)
