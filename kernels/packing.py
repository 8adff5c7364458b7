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

import torch
from torch import Tensor
from torch.nn.functional import pad

from .flow_tile import FlowShape, FlowTile

Tensors = list[Tensor] | tuple[Tensor, ...]


def pack(
    shape: FlowShape,
    conditioning: Tensors,
    shifted: Tensors,
    weights: list[Tensors] | tuple[Tensors, ...],
    biases: list[Tensors] | tuple[Tensors, ...],
    tile: FlowTile,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(w_in, w_mid, w_out, bias, sides)`` on the weights' device.

    ``conditioning[l]``, ``shifted[l]``: indices of features; ``weights[l][i]`` [out, in] and
    ``biases[l][i]`` [out] as in ``nn.Linear``, the context's columns of ``weights[l][0]`` last.
    """
    dp, hp, products = tile.features, tile.hidden, tile.products
    device = weights[0][0].device
    context = torch.arange(shape.features, shape.features + shape.context, device=device)
    w_in, w_mid, w_out, bias, sides = [], [], [], [], []
    for i_x, i_y, ws, bs in zip(conditioning, shifted, weights, biases, strict=True):
        features, others = torch.cat((i_x.to(device), context)), i_y.to(device)
        first, *middle, last = (w.detach().float() for w in ws)
        w_in.append(_split(_place(_pad(first, hp, first.shape[1]), 1, features, dp), products))
        w_mid += [_split(_pad(w, hp, hp), products) for w in middle]
        w_out.append(_split(_place(_pad(last, last.shape[0], hp), 0, others, dp), products))
        *hidden, out = (b.detach().float() for b in bs)
        padded = [pad(b, (0, hp - b.shape[0])) for b in hidden]
        bias.append(-torch.cat([*padded, _place(out, 0, others, dp)]))
        side = torch.zeros(dp, dtype=torch.int32, device=device)
        sides.append(side.index_fill(0, features, 1).index_fill(0, others, 2))
    mid = torch.stack(w_mid) if w_mid else w_in[0].new_empty(0)
    return torch.stack(w_in), mid, torch.stack(w_out), torch.stack(bias), torch.stack(sides)


def _pad(w: Tensor, rows: int, columns: int) -> Tensor:
    return pad(w, (0, columns - w.shape[1], 0, rows - w.shape[0]))


def _place(w: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """``w`` with its slices at ``index`` of ``size`` along ``dim``, zero elsewhere."""
    full = [*w.shape]
    full[dim] = size
    return w.new_zeros(full).index_copy(dim, index, w)


def _split(w: Tensor, products: str) -> Tensor:
    """The parts [PARTS, ...] in the operands' dtype whose sum is ``w`` as nearly as they can."""
    if products == "ieee":
        return w[None]
    if products == "tf32":
        return _to_tf32(w)[None]
    if products == "tf32x3":
        high = _to_tf32(w)
        return torch.stack((high, _to_tf32(w - high)))
    return w.to(torch.bfloat16)[None]


def _to_tf32(w: Tensor) -> Tensor:
    """Rounded to the 11 significant bits of TF32."""
    bits = (w.contiguous().view(torch.int32) + 0x1000) & -0x2000
    return torch.where(w.isfinite(), bits.view(torch.float32), w)
