"""Matrix products: the only place that knows which library multiplies.

On the CPU, PyTorch's float32 products are MKL's. On AMD's processors MKL does not use AVX-512, and
oneDNN is faster at large products: at all of them with AVX-512, at those of the forward pass
without. There MKL is also faster at ``W h^T`` than at ``h W^T`` where h has few rows. Elsewhere,
and for every other dtype, PyTorch chooses. :mod:`.thresholds` has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.devices import is_amd
from ..runtime.watchers import has_modes
from .thresholds import FEW_ROWS, FEW_ROWS_FLOPS, ONEDNN_FLOPS, ONEDNN_FLOPS_AVX2

InPlace = Callable[[Tensor], Tensor]
_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not in every build
_avx512 = torch.cpu._is_avx512_supported()
_never = _pointwise is None or not is_amd()
_forward_flops = math.inf if _never else ONEDNN_FLOPS if _avx512 else ONEDNN_FLOPS_AVX2
_gradient_flops = math.inf if _never or not _avx512 else ONEDNN_FLOPS
_few_rows = 0 if not is_amd() or _avx512 else FEW_ROWS


def linear(h: Tensor, weight: Tensor, bias: Tensor, activation: InPlace | None = None) -> Tensor:
    """``activation(h W^T + b)`` of h (N, in), W (out, in) and b (out,), as a new tensor (N, out).

    The activation works in place, after the product: oneDNN's fused relu makes 0 of NaN, and within
    the cache a pass over a block costs next to nothing (0 to 3 % of the whole, measured on Zen 5).
    """
    rows, work = h.shape[0], 2 * h.numel() * weight.shape[0]
    if work >= _forward_flops and _is_plain(h):
        y = _onednn(h, weight, bias)
    elif rows <= _few_rows and work >= FEW_ROWS_FLOPS and _is_plain(h):
        y = torch.addmm(bias[:, None], weight, h.t()).t()
    else:
        y = torch.nn.functional.linear(h, weight, bias)
    return y if activation is None else activation(y)


def prepared_linear(
    h: Tensor, weight: Tensor, bias: Tensor, activation: InPlace | None = None
) -> Tensor:
    """:func:`linear` of a weight (in, out), which is the shortest way through PyTorch for small
    products: a frozen flow on the CPU has its weights so."""
    if 2 * h.numel() * weight.shape[1] >= FEW_ROWS_FLOPS:
        return linear(h, weight.t(), bias, activation)
    if activation is torch.relu_ and not has_modes():  # counters of operations do not know it
        return torch._addmm_activation(bias, h, weight)
    y = torch.addmm(bias, h, weight)
    return y if activation is None else activation(y)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of a (M, K) and b (K, N), of the backward pass, as a new tensor (M, N)."""
    if 2 * a.numel() * b.shape[1] >= _gradient_flops and _is_plain(a):
        return _onednn(a, b.t(), None)
    return torch.mm(a, b)


def weight_gradient(d: Tensor, h: Tensor) -> Tensor:
    """``d^T h`` (out, in) of d (N, out) and h (N, in): the gradient of a layer's weight.

    The narrower matrix comes first: oneDNN copies that one's transpose, and MKL is slow at a
    product of many rows and few columns (11 instead of 53 GFLOP/s at 64 x 4).
    """
    if h.shape[1] < d.shape[1]:
        return product(h.t(), d).t()
    return product(d.t(), h)


def input_major(weight: Tensor) -> Tensor:
    """The weight (out, in) with its outputs next to each other in memory: with AVX-512 oneDNN wants
    it so, and would otherwise copy it in each product."""
    if _forward_flops == math.inf or not (_avx512 and _is_plain(weight)):
        return weight
    return weight.t().contiguous().t()


def _onednn(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h W^T + b`` by oneDNN, which reads a bias as if it were contiguous."""
    bias = None if bias is None else bias.contiguous()
    return _pointwise(_rows(h), _dense(weight), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, without a gap: with any other as its second operand, oneDNN
    takes hundreds of times as long (14 and 6,480 ms for 4,096 x 256 x 256)."""
    if matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


def _rows(matrix: Tensor) -> Tensor:
    """The first operand may have gaps between its rows, or its columns, but nothing twice."""
    return matrix if 1 in matrix.stride() and 0 not in matrix.stride() else matrix.contiguous()


def _is_plain(a: Tensor) -> bool:
    return a.is_cpu and a.dtype == torch.float32
