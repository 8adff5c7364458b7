"""Scaling, prior log-density, log-determinant and row sum in one pass, and its gradient.

    z        = exp(log_scale) * h
    log_prob = sum_d log p(z_d) + sum_d log_scale_d

Backward recomputes z from h. With g = d loss / d log_prob and g_z = d loss / d z,

    a              = g * d log p(z) / dz + g_z
    grad h         = a * exp(log_scale)
    grad log_scale = sum_n (a * z + g)

by partial sums over a number of programs fixed by the shapes and one sum in fixed order: no
atomics, bit-for-bit repeatable.

Bytes moved, for N rows, D features, element size b: forward N * D * b (2 N * D * b where z is
wanted) + 4 N; backward 2 N * D * b (3 N * D * b with g_z) + 4 N.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, accumulator, dense, is_dense, on_device, torch_dtype
from .prior import prior_score, prior_terms, spans, sum_terms
from .tile import ceil_div, reduction_programs, tile


@triton.jit(do_not_specialize=["N"])
def scale_log_prob_fwd_kernel(
    p_h,  # [N, D]
    p_s,  # [D]
    p_z,  # [N, D]
    p_lp,  # [N]
    N,
    stride_hn,
    stride_hd,
    D: tl.constexpr,
    PRIOR: tl.constexpr,
    WITH_Z: tl.constexpr,
    H_DENSE: tl.constexpr,
    ACC: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    FOLDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_n = o_r[:, None]
    b_lp = tl.zeros((ROWS,), dtype=ACC)
    for i_s in range(0, SPANS):
        b_acc = tl.zeros((ROWS, COLS), dtype=ACC)
        b_product = tl.full((ROWS, COLS), 1.0, dtype=ACC)
        for i_t in range(0, SPAN):
            o_d = (i_s * SPAN + i_t) * COLS + tl.arange(0, COLS)
            b_s = tl.load(p_s + o_d, mask=o_d < D, other=0.0).to(ACC)[None, :]
            o_d = o_d[None, :]
            m = (o_n < N) & (o_d < D)
            if H_DENSE:
                o_h = o_n * D + o_d
            else:
                o_h = o_n * stride_hn + o_d.to(tl.int64) * stride_hd
            b_z = tl.load(p_h + o_h, mask=m, other=0.0).to(ACC) * tl.exp(b_s)
            b_a, b_f = prior_terms(b_z, PRIOR)
            # a padded lane must add nothing: the logistic log-density at 0 is -2 log 2
            b_acc += tl.where(m, b_a + b_s, 0.0)
            if PRIOR == "logistic":
                b_product *= tl.where(m, b_f, 1.0)
            if WITH_Z:
                tl.store(p_z + o_n * D + o_d, b_z.to(p_z.dtype.element_ty), mask=m)
        b_lp += sum_terms(b_acc, b_product, PRIOR, ROWS, COLS, False, FOLDS)
    tl.store(p_lp + o_r, b_lp, mask=o_r < N)


@triton.jit(do_not_specialize=["N"])
def scale_log_prob_bwd_kernel(
    p_gz,  # [N, D] or none
    p_glp,  # [N]
    p_h,  # [N, D]
    p_s,  # [D]
    p_gh,  # [N, D]
    p_partial,  # [programs, D]
    N,
    stride_gzn,
    stride_gzd,
    stride_glp,
    stride_hn,
    stride_hd,
    tiles_per_program,
    D: tl.constexpr,
    PRIOR: tl.constexpr,
    HAS_GZ: tl.constexpr,
    GZ_DENSE: tl.constexpr,
    H_DENSE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_d = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    b_exp = tl.exp(tl.load(p_s + o_d, mask=o_d < D, other=0.0).to(ACC))
    b_sum = tl.zeros((ROWS, COLS), dtype=ACC)
    for i_t in range(0, tiles_per_program):
        o_r = (i_p.to(tl.int64) * tiles_per_program + i_t) * ROWS + tl.arange(0, ROWS)
        o_n = o_r[:, None]
        m = (o_n < N) & (o_d < D)
        if H_DENSE:
            o_h = o_n * D + o_d
        else:
            o_h = o_n * stride_hn + o_d.to(tl.int64) * stride_hd
        b_z = tl.load(p_h + o_h, mask=m, other=0.0).to(ACC) * b_exp
        b_glp = tl.load(p_glp + o_r * stride_glp, mask=o_r < N, other=0.0).to(ACC)[:, None]
        b_a = b_glp * prior_score(b_z, PRIOR)
        if HAS_GZ:
            if GZ_DENSE:
                o_gz = o_n * D + o_d
            else:
                o_gz = o_n * stride_gzn + o_d.to(tl.int64) * stride_gzd
            b_a += tl.load(p_gz + o_gz, mask=m, other=0.0).to(ACC)
        tl.store(p_gh + o_n * D + o_d, (b_a * b_exp).to(p_gh.dtype.element_ty), mask=m)
        b_sum += tl.where(m, b_a * b_z + b_glp, 0.0)
    tl.store(p_partial + i_p.to(tl.int64) * D + o_d, tl.sum(b_sum, 0)[None, :], mask=o_d < D)


def scale_log_prob_fwd(
    h: Tensor, log_scale: Tensor, prior: str, return_z: bool
) -> tuple[Tensor, Tensor]:
    """``(z [N, D] or empty, log_prob [N])``; log_prob in at least float32."""
    n, d = h.shape
    acc = accumulator(h, log_scale)
    z = torch.empty((n, d) if return_z else 0, dtype=h.dtype, device=h.device)
    log_prob = torch.empty(n, dtype=torch_dtype(acc), device=h.device)
    if n == 0:
        return z, log_prob
    t = tile(d, h.element_size())
    with on_device(h):
        scale_log_prob_fwd_kernel[(ceil_div(n, t.rows),)](
            h, dense(log_scale), z, log_prob, n, *h.stride(),
            D=d, PRIOR=prior, WITH_Z=return_z, H_DENSE=is_dense(h), ACC=acc,
            **spans(d, t.columns), ROWS=t.rows, COLS=t.columns, num_warps=t.warps, **FUSED,
        )  # fmt: skip
    return z, log_prob


def scale_log_prob_bwd(
    grad_z: Tensor | None, grad_log_prob: Tensor, h: Tensor, log_scale: Tensor, prior: str
) -> tuple[Tensor, Tensor]:
    """``(grad h [N, D] like h, grad log_scale [D] like log_scale)``."""
    n, d = h.shape
    acc = accumulator(h, log_scale)
    grad_h = torch.empty((n, d), dtype=h.dtype, device=h.device)
    if n == 0:
        return grad_h, torch.zeros_like(log_scale)
    t = tile(d, h.element_size())
    programs, per_program = reduction_programs(n, d, t)
    partial = torch.empty((programs, d), dtype=torch_dtype(acc), device=h.device)
    with on_device(h):
        scale_log_prob_bwd_kernel[(programs, ceil_div(d, t.columns))](
            grad_z, grad_log_prob, h, dense(log_scale), grad_h, partial, n,
            *((0, 0) if grad_z is None else grad_z.stride()), *grad_log_prob.stride(),
            *h.stride(), per_program,
            D=d, PRIOR=prior, HAS_GZ=grad_z is not None,
            GZ_DENSE=grad_z is not None and is_dense(grad_z), H_DENSE=is_dense(h), ACC=acc,
            ROWS=t.rows, COLS=t.columns, num_warps=t.warps, **FUSED,
        )  # fmt: skip
    return grad_h, partial.sum(0).to(log_scale.dtype)
