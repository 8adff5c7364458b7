"""Noise of the prior, scaled back to data space, in one pass; and its gradient.

    h[i, d] = exp(-log_scale_d) * z[i, d],   z[i, d] = noise(seed, row_offset + i, d)

The noise is Philox4x32-10 of the counter (row, d // 4): a function of seed, row and feature
alone, so a sample is the same however it is cut into tiles or batches.

    grad log_scale = -sum_n grad_h * h

Bytes moved, for N rows, D features, element size b: forward N * D * b, backward 2 N * D * b.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, accumulator, dense, is_dense, on_device, torch_dtype
from .prior import logistic_noise, normal_noise
from .tile import ceil_div, reduction_programs, tile


@triton.jit
def random_words(
    o_n,  # [ROWS, 1]
    o_q,  # [1, QUADS]
    seed,
    word,  # which of the counter's words is the last
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Four random words, uint32 [ROWS, QUADS] each, of rows o_n and features 4 o_q .. 4 o_q + 3."""
    i_row = o_n + tl.zeros((ROWS, QUADS), dtype=tl.int64)
    i_low = i_row.to(tl.uint32)
    i_high = (i_row >> 32).to(tl.uint32)
    i_quad = (o_q + tl.zeros((ROWS, QUADS), dtype=tl.int32)).to(tl.uint32)
    i_word = tl.zeros((ROWS, QUADS), dtype=tl.uint32) + word
    return tl.philox(seed, i_low, i_high, i_quad, i_word)


@triton.jit
def noise(
    o_n,  # [ROWS, 1]
    o_q,  # [1, QUADS]
    seed,
    PRIOR: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Standard noise [ROWS, 4 * QUADS] of rows o_n and features 4 o_q .. 4 o_q + 3."""
    b_0, b_1, b_2, b_3 = random_words(o_n, o_q, seed, 0, ROWS, QUADS)
    if ACC == tl.float64:
        b_4, b_5, b_6, b_7 = random_words(o_n, o_q, seed, 1, ROWS, QUADS)
    else:
        b_4, b_5, b_6, b_7 = b_0, b_1, b_2, b_3  # unused
    if PRIOR == "logistic":
        b_z0 = logistic_noise(b_0, b_4, ACC)
        b_z1 = logistic_noise(b_1, b_5, ACC)
        b_z2 = logistic_noise(b_2, b_6, ACC)
        b_z3 = logistic_noise(b_3, b_7, ACC)
    else:
        tl.static_assert(PRIOR == "normal")
        b_z0, b_z1 = normal_noise(b_0, b_4, b_1, b_5, ACC)
        b_z2, b_z3 = normal_noise(b_2, b_6, b_3, b_7, ACC)
    b_z = tl.join(tl.join(b_z0, b_z2), tl.join(b_z1, b_z3))  # [ROWS, QUADS, 2, 2]: 0 1 2 3
    return tl.reshape(b_z, (ROWS, QUADS * 4))


@triton.jit
def noise_at(
    o_n,  # [ROWS, 1]
    o_d,  # [1, COLS]
    seed,
    PRIOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The same noise [ROWS, COLS] in float32 of any features o_d: of four words, one is used."""
    b_0, b_1, b_2, b_3 = random_words(o_n, o_d // 4, seed, 0, ROWS, COLS)
    m_late, m_odd = o_d % 4 >= 2, o_d % 2 == 1
    b_first, b_second = tl.where(m_late, b_2, b_0), tl.where(m_late, b_3, b_1)
    if PRIOR == "logistic":
        b_word = tl.where(m_odd, b_second, b_first)
        b_z = logistic_noise(b_word, b_word, tl.float32)
    else:
        tl.static_assert(PRIOR == "normal")
        b_cos, b_sin = normal_noise(b_first, b_first, b_second, b_second, tl.float32)
        b_z = tl.where(m_odd, b_sin, b_cos)
    return b_z


@triton.jit(do_not_specialize=["N", "row_offset", "seed"])
def sample_fwd_kernel(
    p_s,  # [D]
    p_h,  # [N, D]
    N,
    row_offset: tl.int64,
    seed: tl.int64,
    D: tl.constexpr,
    PRIOR: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
):
    o_n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_q = (tl.program_id(1) * QUADS + tl.arange(0, QUADS))[None, :]
    b_z = noise(o_n + row_offset, o_q, seed, PRIOR, ACC, ROWS, QUADS)
    o_d = (tl.program_id(1) * (QUADS * 4) + tl.arange(0, QUADS * 4))[None, :]
    b_s = tl.load(p_s + o_d, mask=o_d < D, other=0.0).to(ACC)
    b_h = (b_z * tl.exp(-b_s)).to(p_h.dtype.element_ty)
    tl.store(p_h + o_n * D + o_d, b_h, mask=(o_n < N) & (o_d < D))


@triton.jit(do_not_specialize=["N"])
def sample_bwd_kernel(
    p_g,  # [N, D]
    p_h,  # [N, D]
    p_partial,  # [programs, D]
    N,
    stride_gn,
    stride_gd,
    stride_hn,
    stride_hd,
    tiles_per_program,
    D: tl.constexpr,
    G_DENSE: tl.constexpr,
    H_DENSE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_d = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    b_sum = tl.zeros((ROWS, COLS), dtype=ACC)
    for i_t in range(0, tiles_per_program):
        i_n = (i_p.to(tl.int64) * tiles_per_program + i_t) * ROWS
        o_n = (i_n + tl.arange(0, ROWS))[:, None]
        m = (o_n < N) & (o_d < D)
        if G_DENSE:
            o_g = o_n * D + o_d
        else:
            o_g = o_n * stride_gn + o_d.to(tl.int64) * stride_gd
        if H_DENSE:
            o_h = o_n * D + o_d
        else:
            o_h = o_n * stride_hn + o_d.to(tl.int64) * stride_hd
        b_g = tl.load(p_g + o_g, mask=m, other=0.0).to(ACC)
        b_sum -= b_g * tl.load(p_h + o_h, mask=m, other=0.0).to(ACC)
    tl.store(p_partial + i_p.to(tl.int64) * D + o_d, tl.sum(b_sum, 0)[None, :], mask=o_d < D)


def sample_fwd(
    log_scale: Tensor, n: int, row_offset: int, seed: int, prior: str, dtype: torch.dtype
) -> Tensor:
    """``h`` [n, D] of ``dtype``: rows ``row_offset`` to ``row_offset + n`` of the sample."""
    d = log_scale.shape[0]
    h = torch.empty((n, d), dtype=dtype, device=log_scale.device)
    if n == 0:
        return h
    t = tile(max(d, 4), h.element_size())
    quads = t.columns // 4
    with on_device(h):
        sample_fwd_kernel[(ceil_div(n, t.rows), ceil_div(d, quads * 4))](
            dense(log_scale), h, n, row_offset, seed,
            D=d, PRIOR=prior, ACC=accumulator(h), ROWS=t.rows, QUADS=quads,
            num_warps=t.warps, **FUSED,
        )  # fmt: skip
    return h


def sample_bwd(grad_h: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad log_scale`` [D] of ``dtype``."""
    n, d = h.shape
    if n == 0:
        return torch.zeros(d, dtype=dtype, device=h.device)
    acc = accumulator(grad_h, h)
    t = tile(d, h.element_size())
    programs, per_program = reduction_programs(n, d, t)
    partial = torch.empty((programs, d), dtype=torch_dtype(acc), device=h.device)
    with on_device(h):
        sample_bwd_kernel[(programs, ceil_div(d, t.columns))](
            grad_h, h, partial, n, *grad_h.stride(), *h.stride(), per_program,
            D=d, G_DENSE=is_dense(grad_h), H_DENSE=is_dense(h), ACC=acc,
            ROWS=t.rows, COLS=t.columns, num_warps=t.warps, **FUSED,
        )  # fmt: skip
    return partial.sum(0).to(dtype)
