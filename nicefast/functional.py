"""One function for each operation: what layers call and what users call.

Each checks its arguments, flattens leading dimensions to one (a view wherever the strides allow)
and hands over to the operation. What they compute is defined in
:mod:`nicefast.reference`.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import autograd, reference
from .checks import (
    check_count,
    check_coupling,
    check_density,
    check_features,
    check_kind_of_number,
    check_levels,
    check_seed,
    check_tensor,
    check_type,
)
from .ops import check_log_scale
from .partition import Features, Partition, columns_of
from .reference import check_prior
from .runtime import watchers


def additive_coupling(
    x: Tensor,
    shift: Tensor,
    partition: Partition,
    inverse: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Additive coupling: ``y1 = x1``, ``y2 = x2 + shift + bias`` (inverse: ``x2 - shift - bias``).

    The Jacobian is triangular with unit diagonal, so log |det| = 0 (Dinh et al. 2014, section 3.2).

    Args:
        x: (..., D), floating point, any strides.
        shift: (..., S), one value for each shifted feature, in ``partition.shifted`` order; the
            same leading dimensions as ``x``, or broadcastable to them.
        partition: which features are shifted.
        inverse: subtract instead of add.
        bias: (S,), added to the shift in the same pass.

    Returns:
        y, shaped like ``x``, contiguous; of ``x``'s dtype, or of a wider one of shift or bias.

    Raises:
        TypeError: an argument that is no tensor (partition: no Partition), or an integer dtype.
        ValueError: shapes or devices that do not fit.

    >>> import torch, nicefast as nf
    >>> p = nf.Partition.alternating(4)
    >>> nf.functional.additive_coupling(torch.zeros(1, 4), torch.tensor([[1.0, 2.0]]), p)
    tensor([[0., 1., 0., 2.]])
    """
    x, shift = check_coupling(x, shift, partition, bias)
    dtype = x.dtype
    for t in (shift,) if bias is None else (shift, bias):
        dtype = dtype if t.dtype == dtype else torch.promote_types(dtype, t.dtype)
    f = partition.locate(x.device)
    if watchers.wants_definition():
        return reference.additive_coupling(x.to(dtype), shift, _columns(f), inverse, bias)
    y = autograd.AdditiveCoupling.apply(
        _rows(x.to(dtype)), _rows(shift), bias, f.slots, f.indices, f.start, f.step, inverse
    )
    return y.view(x.shape)


def additive_coupling_(
    x: Tensor,
    shift: Tensor,
    partition: Partition,
    inverse: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`additive_coupling` written over ``x``: only the shifted features are touched.

    For inference: no gradient is recorded, so it raises ValueError where one would have to be, and
    where ``x`` cannot be seen as rows without a copy; TypeError where shift or bias is wider than
    ``x``. Otherwise as :func:`additive_coupling`. Returns ``x``.

    >>> import torch, nicefast as nf
    >>> x = torch.zeros(2)
    >>> _ = nf.functional.additive_coupling_(x, torch.ones(1), nf.Partition.half(2)); x
    tensor([0., 1.])
    """
    given = x
    x, shift = check_coupling(x, shift, partition, bias)
    tensors = [t for t in (x, shift, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            "additive_coupling_ writes over x and records no gradient: call it under "
            "torch.no_grad(), or use additive_coupling"
        )
    for name, t in (("shift", shift), ("bias", bias)):
        if t is not None and torch.promote_types(x.dtype, t.dtype) != x.dtype:
            raise TypeError(
                f"{name} must not be wider than x, which is written in place: "
                f"got {t.dtype} for an x of {x.dtype}"
            )
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"x must not be expanded, since it is written in place; got strides {x.stride()}"
        )
    try:
        rows = x.view(-1, x.shape[-1]) if x.numel() else x.reshape(-1, x.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"x must be viewable as rows of features to be written in place; "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        ) from None
    f, shift = partition.locate(x.device), _elsewhere(shift, x)
    bias = None if bias is None else _elsewhere(bias, x)
    # PyTorch cannot hand a view with the opposite sign to an operation that writes to it
    written = rows.resolve_neg() if not watchers.is_compiled() else rows
    torch.ops.nicefast.additive_coupling_(
        written, _rows(shift), bias, f.slots, f.indices, f.start, f.step, inverse
    )
    if written is not rows:
        rows.copy_(written)
    return given


def split_features(x: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
    """``(x, x1)``: ``x`` and its conditioning features x1 = x[..., conditioning].

    Use the x that comes back in the coupling: its gradient and that of x1 are then joined in one
    pass. x1 (..., C) is a view where the conditioning features lie side by side. Errors as in
    :func:`additive_coupling`.

    >>> import torch, nicefast as nf
    >>> nf.functional.split_features(torch.arange(4.0), nf.Partition.alternating(4))[1]
    tensor([0., 2.])
    """
    check_features("x", x, partition)
    f = partition.locate(x.device, conditioning=True)
    if watchers.wants_definition():
        return x, reference.select_features(x, _columns(f))
    same, x1 = autograd.SplitFeatures.apply(_rows(x), f.slots, f.indices, f.start, f.step, f.size)
    if x.ndim != 2:
        same, x1 = same.view(x.shape), x1.reshape(*x.shape[:-1], f.size)
    return same, x1


@overload
def scale_log_prob(
    h: Tensor, log_scale: Tensor, prior: str = ..., return_z: Literal[False] = ...
) -> Tensor: ...


@overload
def scale_log_prob(
    h: Tensor, log_scale: Tensor, prior: str, return_z: Literal[True]
) -> tuple[Tensor, Tensor]: ...


@overload
def scale_log_prob(
    h: Tensor, log_scale: Tensor, prior: str = ..., *, return_z: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def scale_log_prob(
    h: Tensor, log_scale: Tensor, prior: str = "logistic", return_z: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaling, prior log-density and log-determinant, summed over features in one pass.

    ``z = exp(log_scale) * h``; ``log_prob = sum_d log p(z_d) + sum_d log_scale_d``, in nats
    (Dinh et al. 2014, equation 1 with section 3.3).

    Args:
        h: (..., D), floating point, any strides.
        log_scale: (D,), finite. On the CPU a non-finite entry is an error; on a GPU, where looking
            would wait for the device, it makes every log_prob infinite or NaN.
        prior: ``"logistic"`` or ``"normal"``.
        return_z: also return z, shaped like ``h``.

    Returns:
        log_prob (...), float32 or wider, or ``(z, log_prob)``. NaN in a row of h gives NaN for
        that row and no other.

    Raises:
        TypeError: an argument that is no tensor, or an integer dtype.
        ValueError: unknown prior, wrong shape, mixed devices, non-finite log_scale.

    >>> import torch, nicefast as nf
    >>> nf.functional.scale_log_prob(torch.zeros(3, 2), torch.zeros(2), prior="normal")
    tensor([-1.8379, -1.8379, -1.8379])
    """
    check_density(h, log_scale, prior)
    # z is never narrower than what it is made of, and float64 is computed from float64
    if return_z or log_scale.dtype == torch.float64:
        h = h.to(torch.promote_types(h.dtype, log_scale.dtype))
    if watchers.wants_definition():
        check_log_scale(log_scale)
        return reference.scale_log_prob(h, log_scale, prior, return_z)
    arguments = (_rows(h), log_scale, prior, return_z)
    if _is_plain_call(h, log_scale):  # a Function costs as much as a small batch
        z, log_prob = torch.ops.nicefast.scale_log_prob(*arguments)
    else:
        z, log_prob = autograd.ScaleLogProb.apply(*arguments)
    log_prob = log_prob.view(h.shape[:-1])
    return (z.view(h.shape), log_prob) if return_z else log_prob


def cell_log_prob(h: Tensor, log_scale: Tensor, grid: float, prior: str = "logistic") -> Tensor:
    """Log-probability of the grid cell around h, in nats, <= 0:

        sum_d log(F(s_d (h_d + grid / 2)) - F(s_d (h_d - grid / 2))),  s = exp(log_scale),

    F the prior's cumulative distribution function. Over all h on the grid the probabilities add up
    to 1. Computed in float64, stable in the tails.

    Args:
        h: (..., D), floating point.
        log_scale: (D,), finite.
        grid: > 0, the width of a cell.
        prior: ``"logistic"`` or ``"normal"``.

    Returns:
        (...), float32 or wider. Differentiable.

    Raises:
        TypeError, ValueError: as :func:`scale_log_prob`; ValueError for a grid that is not > 0.

    >>> import torch, nicefast as nf
    >>> h = torch.arange(-50.0, 50.0)[:, None]
    >>> nf.functional.cell_log_prob(h, torch.zeros(1), 1.0).exp().sum()
    tensor(1.)
    """
    check_density(h, log_scale, prior)
    check_kind_of_number("grid", grid)
    if not 0 < grid < float("inf"):
        raise ValueError(f"grid must be positive and finite, got {grid!r}")
    check_log_scale(log_scale)
    return reference.cell_log_prob(h, log_scale, grid, prior)


def sample_prior(
    log_scale: Tensor,
    n: int,
    prior: str = "logistic",
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``h = exp(-log_scale) * z`` (n, D) with ``z`` drawn from the prior, in one pass.

    Entry (i, d) depends on the seed, ``row_offset + i`` and ``d`` alone: the same seed gives the
    same sample, however it is cut into batches. Differentiable in ``log_scale``.

    Args:
        log_scale: (D,).
        n: number of rows, >= 0.
        prior: ``"logistic"`` or ``"normal"``.
        seed: 0 <= seed < 2^63, or the tensor that :func:`draw_seed` gives; by default drawn from
            ``generator`` (by default torch's own).
        generator: where the seed is drawn from.
        row_offset: index of the first row, for samples drawn in batches.
        dtype: of the result; that of ``log_scale`` by default.

    Raises:
        TypeError: log_scale is no floating-point tensor, or dtype is not floating point.
        ValueError: unknown prior, negative n or row_offset, seed out of range, non-finite
            log_scale (CPU).

    >>> import torch, nicefast as nf
    >>> nf.functional.sample_prior(torch.zeros(4), 10, seed=0).shape
    torch.Size([10, 4])
    """
    check_tensor("log_scale", log_scale)
    check_prior(prior)
    if log_scale.ndim != 1 or log_scale.shape[0] < 1:
        raise ValueError(f"log_scale must have shape (D,), got {tuple(log_scale.shape)}")
    n = check_count("n", n)
    row_offset = check_count("row_offset", row_offset)
    dtype = dtype or log_scale.dtype
    check_type("dtype", dtype, torch.dtype, "a torch.dtype")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    if seed is None:
        seed = draw_seed(generator)
    if isinstance(seed, Tensor):
        if seed.ndim or seed.dtype != torch.int64:
            shape = tuple(seed.shape)
            raise TypeError(f"seed must be an integer, got a tensor of {seed.dtype}, shape {shape}")
    else:
        seed = check_seed(seed)
    if watchers.wants_definition() and not isinstance(seed, Tensor):
        check_log_scale(log_scale)
        return reference.sample_prior(log_scale, n, seed, prior, row_offset, dtype)
    arguments = log_scale, n, row_offset, seed, prior, dtype
    if _is_plain_call(log_scale) and not isinstance(seed, Tensor):
        return torch.ops.nicefast.sample_prior(*arguments)
    return autograd.SamplePrior.apply(*arguments)


def dequantise(
    levels: Tensor,
    k: int | None,
    *,
    seed: int = 0,
    row_offset: int = 0,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Uniform dequantisation in one pass: ``x = low + (level + u) / k * (high - low)``.

    ``u`` (N, D) is uniform on [0, 1); entry (i, d) depends on the seed, ``row_offset + i`` and
    ``d`` alone, as with :func:`sample_prior`: the noise is the same however rows are cut into
    batches. A density p of x bounds the probability of the levels from below, in nats:
    ``E_u[log p(x)] + D log((high - low) / k) <= log P(levels)``. Not differentiable: integers in.

    x lies in [low, high), and ``floor((x - low) / (high - low) * k)`` is the level again, computed
    in float32 for every k wherever |low| and |high| are at most high - low (beyond, x has too few
    digits left). ``u`` has ``21 - ceil(log2 k)`` bits for that: 13 for 256 levels.

    Args:
        levels: (N, \\*shape), of dtype uint8, int16, int32 or int64, any strides; 0 .. k-1. On the
            CPU a level out of range is an error; on a GPU, where looking would wait for the device,
            it gives an x without meaning.
        k: number of levels, 2 .. 65536; None for integers of any range and sign, up to 2^24 in
            magnitude, which get noise alone: ``x = level + u``, and ``floor(x)`` is the level.
        seed: 0 <= seed < 2^63.
        row_offset: index of the first row.
        low, high: the range of x, rounded to float32; 0 and 1 where there is no k.

    Returns:
        x, shaped like ``levels``, float32, contiguous.

    Raises:
        TypeError: levels are no tensor of one of these dtypes; low or high is no number.
        ValueError: levels without features or out of range (CPU); k, seed, row_offset or the range
            not as above.

    >>> import torch, nicefast as nf
    >>> levels = torch.tensor([[0, 255, 7]], dtype=torch.uint8)
    >>> (256 * nf.functional.dequantise(levels, 256, seed=1)).floor()
    tensor([[  0., 255.,   7.]])
    """
    check_kind_of_number("low", low)
    check_kind_of_number("high", high)
    low, high = float(low), float(high)
    check_levels(levels, k, low, high)
    row_offset = check_count("row_offset", row_offset)
    seed = check_seed(seed)
    rows = levels if levels.ndim == 2 else levels.flatten(1)
    x = torch.ops.nicefast.dequantise(rows, k, row_offset, seed, low, high)
    return x.view(levels.shape)


def _is_plain_call(*tensors: Tensor) -> bool:
    """Whether nobody differentiates, transforms or compiles this call."""
    return not (
        watchers.is_compiled()
        or watchers.records(*tensors)
        or watchers.is_transformed()
        or watchers.wants_definition()
    )


def _columns(f: Features) -> slice | Tensor:
    """``f.columns``, as a compiler can read it."""
    return columns_of(f.indices, f.start, f.step, f.size)


def draw_seed(generator: torch.Generator | None = None) -> int | Tensor:
    """A seed for :func:`sample_prior`, drawn from ``generator`` (by default torch's own).

    An integer; where numbers cannot be read, within ``torch.compile``, ``FakeTensorMode`` and
    ``torch.func.vmap(randomness="different")``, an int64 tensor without dimensions.

    >>> import torch, nicefast as nf
    >>> nf.functional.draw_seed(torch.Generator().manual_seed(0)) >= 0
    True
    """
    if generator is not None:
        check_type("generator", generator, torch.Generator, "a torch.Generator")
    device = "cpu" if generator is None else generator.device
    high = torch.iinfo(torch.int64).max
    seed = torch.randint(high, (), generator=generator, dtype=torch.int64, device=device)
    return int(seed) if watchers.has_values(seed) else seed


def _elsewhere(t: Tensor, x: Tensor) -> Tensor:
    """``t``, not in the memory that is written when ``x`` is."""
    is_alias_of: Any = getattr(torch._C, "_is_alias_of")  # noqa: B009 - it is not declared
    return t.clone() if not watchers.is_compiled() and is_alias_of(t, x) else t


def _rows(x: Tensor) -> Tensor:
    """``x`` (..., D) as (N, D): a view wherever the strides allow."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
