"""A flow's parameters as the whole-flow kernels read them: flat, padded, in the operands' dtype.

For couplings l < L with K hidden layers, features (with the context's) and hidden widths padded
to DP and HP, and each weight in one or two parts that add up to it,

    w_in    [L, PARTS, HP, DP]          zero columns for features that do not condition
    w_mid   [L, K - 1, PARTS, HP, HP]
    w_out   [L, PARTS, DP, HP]          zero rows for features that are not shifted
    bias    [L, K * HP + DP]            float32, with the opposite sign
    sides   [L, DP]                     int32: 1 conditioning or context, 2 shifted, 0 padding

Weights are [out, in] as in ``nn.Linear``: the inner dimension of a product is contiguous, as
TF32 wants it. Every activation maps 0 to 0, so padded hidden units stay 0.
"""

from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .flow_tile import FlowShape, FlowTile

Tensors = list[Tensor] | tuple[Tensor, ...]


class Layout(NamedTuple):
    """Where every packed number comes from: its place among 0 and all parameters, one after the
    other. It is made once; what changes with the parameters takes few launches."""

    none: Tensor  # that 0
    source: Tensor  # int64, of w_in, w_mid, w_out and bias, one after the other
    shapes: tuple[tuple[int, ...], ...]  # of these, without parts
    products: str
    sides: Tensor


def lay_out(shape: FlowShape, conditioning: Tensors, shifted: Tensors, tile: FlowTile) -> Layout:
    """The layout on the device of ``conditioning[l]`` and ``shifted[l]``, indices of features."""
    dp, hp = tile.features, tile.hidden
    device, start = conditioning[0].device, 1
    context = torch.arange(shape.features, shape.features + shape.context, device=device)
    w_in, w_mid, w_out, bias, sides = [], [], [], [], []

    def places(*of: int) -> Tensor:
        nonlocal start
        start += prod(of)
        return torch.arange(start - prod(of), start, device=device).view(of)

    for i_x, others in zip(conditioning, shifted, strict=True):
        features = torch.cat((i_x, context))
        widths = [len(features), *shape.hidden, len(others)]
        first, *middle, last = [(places(m, n), places(m)) for n, m in pairwise(widths)]
        w_in.append(_place(_pad(first[0], hp, len(features)), 1, features, dp))
        w_mid += [_pad(w, hp, hp) for w, _ in middle]
        w_out.append(_place(_pad(last[0], len(others), hp), 0, others, dp))
        hidden = [pad(b, (0, hp - len(b))) for _, b in (first, *middle)]
        bias.append(torch.cat([*hidden, _place(last[1], 0, others, dp)]))
        side = torch.zeros(dp, dtype=torch.int32, device=device)
        sides.append(side.index_fill(0, features, 1).index_fill(0, others, 2))
    mid = torch.stack(w_mid) if w_mid else w_in[0].new_empty(0, hp, hp)
    found = (torch.stack(w_in), mid, torch.stack(w_out), torch.stack(bias))
    source = torch.cat([t.flatten() for t in found])
    none = torch.zeros(1, device=device, dtype=torch.float32)
    shapes = tuple(tuple(t.shape) for t in found)
    return Layout(none, source, shapes, tile.products, torch.stack(sides))


def pack(layout: Layout, parameters: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(w_in, w_mid, w_out, bias, sides)`` on the parameters' device.

    ``parameters``: weight [out, in] and bias [out] of each layer of each coupling, as in
    ``nn.Linear``, the context's columns of each coupling's first weight last.
    """
    flat = torch.cat([layout.none, *(p.detach().float().flatten() for p in parameters)])
    *sizes, biases = map(prod, layout.shapes)
    weights, bias = flat.index_select(0, layout.source).split([sum(sizes), biases])
    parts = [part.split(sizes) for part in _parts(weights, layout.products)]
    w_in, w_mid, w_out = (
        _side_by_side([own.view(shape) for own in part])
        for part, shape in zip(zip(*parts, strict=True), layout.shapes, strict=False)
    )
    return w_in, w_mid, w_out, -bias.view(layout.shapes[-1]), layout.sides


def _pad(w: Tensor, rows: int, columns: int) -> Tensor:
    return pad(w, (0, columns - w.shape[1], 0, rows - w.shape[0]))


def _place(w: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """``w`` with its slices at ``index`` of ``size`` along ``dim``, zero elsewhere."""
    full = [*w.shape]
    full[dim] = size
    return w.new_zeros(full).index_copy(dim, index, w)


def _parts(w: Tensor, products: str) -> list[Tensor]:
    """In the operands' dtype, whose sum is ``w`` as nearly as they can."""
    if products == "ieee":
        return [w]
    if products == "tf32":
        return [_to_tf32(w)]
    if products == "tf32x3":
        high = _to_tf32(w)
        return [high, _to_tf32(w - high)]
    return [w.to(torch.bfloat16)]


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, 1) if len(parts) > 1 else parts[0].unsqueeze(1)


def _to_tf32(w: Tensor) -> Tensor:
    """Rounded to the 11 significant bits of TF32; NaN, whose bits might carry over, stays."""
    bits = (w.view(torch.int32) + 0x1000) & -0x2000
    return torch.where(w.isnan(), w, bits.view(torch.float32))
