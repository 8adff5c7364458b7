"""Uniform dequantisation in one pass: integers and counter-based noise in, float32 out.

    x[i, d] = low + (level[i, d] + u[i, d]) / k * (high - low),   u[i, d] in (0, 1)

and x = level + u, u in [0, 1), where there is no k. The noise is word d % 4 of Philox4x32-10 at the
counter (row, d // 4), as for the prior's samples: rows have the same noise however they are cut
into batches. Every operation is rounded as plain PyTorch rounds it, so the bits are the same.

Bytes moved, for N rows, D features, levels of size b: N * D * (b + 4). No gradient: integers in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import is_dense, on_device
from .sampling import random_words
from .tile import ceil_div, tile


@triton.jit
def words(
    o_n,  # [ROWS, 1]
    o_q,  # [1, QUADS]
    seed,
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Random words [ROWS, 4 * QUADS], uint32, of rows o_n and features 4 o_q .. 4 o_q + 3."""
    b_0, b_1, b_2, b_3 = random_words(o_n, o_q, seed, 0, ROWS, QUADS)
    b_w = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))  # [ROWS, QUADS, 2, 2]: 0 1 2 3
    return tl.reshape(b_w, (ROWS, QUADS * 4))


@triton.jit(do_not_specialize=["N", "row_offset", "seed"])
def dequantise_kernel(
    p_l,  # [N, D]
    p_x,  # [N, D]
    N,
    row_offset: tl.int64,
    seed: tl.int64,
    stride_ln,
    stride_ld,
    low,
    scale,  # (high - low) / (k * 2^BITS)
    top,  # the largest float32 below high
    D: tl.constexpr,
    DENSE: tl.constexpr,
    BITS: tl.constexpr,
    COUNTED: tl.constexpr,  # whether there is a k
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
):
    o_n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_q = (tl.program_id(1) * QUADS + tl.arange(0, QUADS))[None, :]
    o_d = (tl.program_id(1) * (QUADS * 4) + tl.arange(0, QUADS * 4))[None, :]
    m = (o_n < N) & (o_d < D)
    if DENSE:
        o_l = o_n * D + o_d
    else:
        o_l = o_n * stride_ln + o_d.to(tl.int64) * stride_ld
    b_l = tl.load(p_l + o_l, mask=m, other=0)
    b_u = (words(o_n + row_offset, o_q, seed, ROWS, QUADS) >> (32 - BITS)).to(tl.int32)
    if COUNTED:
        b_step = ((b_l.to(tl.int32) << BITS) + b_u).to(tl.float32) + 0.5  # below 2^21: exact
        b_x = b_step * scale + low
        b_x = tl.minimum(b_x, top)
    else:
        b_level = b_l.to(tl.float32)
        b_x = b_level + b_u.to(tl.float32) * scale
        b_x = tl.where(b_x < b_level + 1.0, b_x, b_level)
    tl.store(p_x + o_n * D + o_d, b_x, mask=m)


def dequantise_fwd(
    levels: Tensor, k: int | None, row_offset: int, seed: int, low: float, high: float
) -> Tensor:
    """``x`` [N, D] in float32, for ``levels`` [N, D] of any integer dtype and strides."""
    n, d = levels.shape
    x = torch.empty((n, d), dtype=torch.float32, device=levels.device)
    if n == 0:
        return x
    bits, scale, top = 24, 2.0**-24, 0.0
    if k is not None:
        ends = torch.tensor([low, high], dtype=torch.float32, device="cpu")
        low, high = ends.tolist()
        bits = 21 - (k - 1).bit_length()
        scale = (high - low) / (k << bits)
        top = torch.nextafter(ends[1], ends[0]).item()
    t = tile(max(d, 4), x.element_size())
    quads = t.columns // 4
    with on_device(x):
        dequantise_kernel[(ceil_div(n, t.rows), ceil_div(d, quads * 4))](
            levels, x, n, row_offset, seed, *levels.stride(), low, scale, top,
            D=d, DENSE=is_dense(levels), BITS=bits, COUNTED=k is not None,
            ROWS=t.rows, QUADS=quads, num_warps=t.warps,
            enable_fp_fusion=False,  # a fused multiply-add rounds once where PyTorch rounds twice
        )  # fmt: skip
    return x
