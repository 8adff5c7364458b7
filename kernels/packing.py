"""A flow's parameters as the whole-flow kernels read them: flat, padded, in the operands' dtype.

For couplings l < L with K hidden layers, features (with the context's) and hidden widths padded
to DP and HP, and each weight in one or two parts that add up to it,

    w_in    [L, PARTS, HP, DP]          zero columns for features that do not condition
    w_mid   [L, K - 1, PARTS, HP, HP]
    w_out   [L, PARTS, DP, HP]          zero rows for features that are not shifted
    bias    [L, K * HP + DP]            float32, with the opposite sign
    sides   [L, DP]                     int32: 1 conditioning or context, 2 shifted, 0 padding

The kernel that keeps all weights on the chip reads them as :func:`lay_out_resident` says.
Weights are [out, in] as in ``nn.Linear``: the inner dimension of a product is contiguous, as
TF32 wants it. Every activation maps 0 to 0, so padded hidden units stay 0.
"""

from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .flow_tile import PARTS, FlowShape, FlowTile, ResidentTile
from .launch import FUSED, launch, on_device
from .product import to_tf32
from .tile import ceil_div

Tensors = list[Tensor] | tuple[Tensor, ...]
BLOCK = 1024  # packed numbers of one program


@triton.jit
def _stored(b_v, p_w, PRODUCTS: tl.constexpr):
    """The number as the products' operands are."""
    if PRODUCTS == "tf32" or PRODUCTS == "tf32x3":
        # NaN, whose bits might carry over, stays as it is
        b_v = tl.where(b_v == b_v, to_tf32(b_v), b_v)
    return b_v.to(p_w.dtype.element_ty)


@triton.jit(do_not_specialize=["INPUTS", "MIDDLE", "WEIGHTS", "N"])
def pack_kernel(
    p_flat,  # 0 and all parameters
    p_source,  # [N] int64
    p_w,  # PARTS times WEIGHTS
    p_b,  # N - WEIGHTS
    INPUTS,  # numbers of w_in,
    MIDDLE,  # of w_in and w_mid,
    WEIGHTS,  # and of w_out, too
    N,
    OUTER: tl.constexpr,  # numbers of one matrix of w_in and w_out,
    INNER: tl.constexpr,  # and of w_mid
    PRODUCTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o_n < N
    b_v = tl.load(p_flat + tl.load(p_source + o_n, mask=m, other=0), mask=m, other=0.0)
    m_w = o_n < WEIGHTS
    tl.store(p_b + o_n - WEIGHTS, -b_v, mask=m & (o_n >= WEIGHTS))
    m_mid = (o_n >= INPUTS) & (o_n < MIDDLE)
    o_start = tl.where(o_n < INPUTS, 0, tl.where(m_mid, INPUTS, MIDDLE))
    o_size = tl.where(m_mid, INNER, OUTER)
    o_own = o_n - o_start
    # the parts of one matrix follow each other
    o_w = o_start * PARTS + (o_own // o_size) * o_size * PARTS + o_own % o_size
    b_high = _stored(b_v, p_w, PRODUCTS)
    tl.store(p_w + o_w, b_high, mask=m_w)
    if PARTS == 2:
        b_low = _stored(b_v - b_high, p_w, PRODUCTS)
        tl.store(p_w + o_w + o_size, b_low, mask=m_w)


class Layout(NamedTuple):
    """Where every packed number comes from: its place among 0 and all parameters, one after the
    other. It depends on the architecture alone; packing takes two launches."""

    none: Tensor  # that 0
    source: Tensor  # int64, of w_in, w_mid, w_out and bias, one after the other
    shapes: tuple[tuple[int, ...], ...]  # of these, without parts
    products: str
    sides: Tensor


def lay_out(
    shape: FlowShape, conditioning: Tensors, shifted: Tensors, tile: FlowTile | ResidentTile
) -> Layout:
    """The layout on the device of ``conditioning[l]`` and ``shifted[l]``, indices of features."""
    if isinstance(tile, ResidentTile):
        return lay_out_resident(shape, conditioning, shifted, tile)
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


def lay_out_resident(
    shape: FlowShape, conditioning: Tensors, shifted: Tensors, tile: ResidentTile
) -> Layout:
    """Of each coupling w_in [HP, HALF + CP], w_mid [K - 1, HP, HP] and w_out [HALF, HP], one after
    the other, and its biases [K * HP + HALF]; then the features [2, HALF] of both sides.

    A side has its features in its first columns.
    """
    half, hp, device, start = tile.half, tile.hidden, conditioning[0].device, 1
    weights, bias = [], []
    for i_x, others in zip(conditioning, shifted, strict=True):
        widths = [len(i_x) + shape.context, *shape.hidden, len(others)]
        for i, (n, m) in enumerate(pairwise(widths)):
            w = torch.arange(start, start + m * n, device=device).view(m, n)
            b = torch.arange(start + m * n, start + m * n + m, device=device)
            start += m * n + m
            rows = half if i == len(shape.hidden) else hp
            if i == 0:
                x, c = w.split([len(i_x), shape.context], 1)
                w = torch.cat((_pad(x, rows, half), _pad(c, rows, tile.context)), 1)
            weights.append((w if i == 0 else _pad(w, rows, hp)).flatten())
            bias.append(pad(b, (0, rows - m)))
    reads = shape.reads
    sides = [
        pad(conditioning[reads.index(i)] if i in reads else shifted[0], (0, half)) for i in (0, 1)
    ]
    found = torch.cat(weights), torch.cat(bias)
    shapes = (0, len(found[0])), (0, 1), (1, len(found[0])), (len(found[1]),)
    none = torch.zeros(1, device=device, dtype=torch.float32)
    features = torch.stack([s[:half] for s in sides]).to(torch.int32)
    return Layout(none, torch.cat(found), shapes, tile.products, features)


def pack(layout: Layout, parameters: Tensors) -> tuple[Tensor, ...]:
    """``(w_in, w_mid, w_out, bias, sides)`` on the parameters' device: one ``cat``, one kernel;
    ``(w, bias, features)`` where weights stay on the chip.

    ``parameters``: weight [out, in] and bias [out] of each layer of each coupling, as in
    ``nn.Linear``, float32, the context's columns of each coupling's first weight last.
    """
    flat = torch._C._nn.flatten_dense_tensors([layout.none, *parameters])
    parts, (outer, inner, last, biases) = PARTS[layout.products], layout.shapes
    sizes = [parts * prod(shape) for shape in (outer, inner, last)]
    dtype = torch.bfloat16 if layout.products == "bf16" else torch.float32
    w = torch.empty(sum(sizes), dtype=dtype, device=flat.device)
    bias = torch.empty(biases, dtype=torch.float32, device=flat.device)
    n, (inputs, middle, _) = len(layout.source), sizes
    with on_device(flat):
        launch(
            pack_kernel, ceil_div(n, BLOCK),
            (flat, layout.source, w, bias, inputs // parts, (inputs + middle) // parts,
             sum(sizes) // parts, n),
            (layout.products, layout.shapes),
            lambda: {
                "OUTER": prod(outer[1:]), "INNER": max(1, prod(inner[1:])),
                "PRODUCTS": layout.products, "PARTS": parts, "BLOCK": BLOCK, **FUSED,
            },
        )  # fmt: skip
    w_in, w_mid, w_out = (
        own.view(shape[0], parts, *shape[1:])
        for own, shape in zip(torch.split_with_sizes(w, sizes), layout.shapes[:3], strict=True)
    )
    if not inputs:  # the whole flow's weights are one matrix
        return w_out, bias, layout.sides
    return w_in, w_mid, w_out, bias, layout.sides


def _pad(w: Tensor, rows: int, columns: int) -> Tensor:
    return pad(w, (0, columns - w.shape[1], 0, rows - w.shape[0]))


def _place(w: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """``w`` with its slices at ``index`` of ``size`` along ``dim``, zero elsewhere."""
    full = [*w.shape]
    full[dim] = size
    return w.new_zeros(full).index_copy(dim, index, w)
