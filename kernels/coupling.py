"""Additive coupling: one kernel adds, one adds in place, one selects.

    y = x;  y[:, shifted] += shift + bias        (forward)
    y = x;  y[:, shifted] -= shift + bias        (inverse)

The gradient of x is the gradient of y; that of the shift is the *selection* grad_y[:, shifted],
and that of the bias its column sums. Selecting the conditioning features x1 = x[:, conditioning]
is the same kernel, and its gradient is a coupling again: the two are each other's transpose.

Features of one side of a partition are START + STEP * j for j < COUNT (STEP 1: half splits and
blocks, STEP 2: alternating), or a map held on the device (STEP 0): ``index`` [COUNT] holds the
features, ``slot`` [D] each feature's place among them, -1 for a feature of the other side.

Bytes moved, for N rows, D features, S shifted, element size b (maps and bias are negligible):
    couple          N * (2 D + S) * b     x and shift read once, y written once
    couple in place N * 3 S * b           the conditioning features are never touched
    select          N * 2 S * b           read once, written once, column sums in the same pass
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, accumulator, dense, is_dense, on_device, torch_dtype
from .tile import ceil_div, reduction_programs, tile


@triton.jit(do_not_specialize=["N"])
def couple_kernel(
    p_x,  # [N, D]
    p_shift,  # [N, COUNT]
    p_bias,  # [COUNT]
    p_slot,  # [D]
    p_y,  # [N, D]
    N,
    stride_xn,
    stride_xd,
    stride_sn,
    stride_sd,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    START: tl.constexpr,
    STEP: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_DENSE: tl.constexpr,
    SHIFT_DENSE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_d = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    m_x = (o_n < N) & (o_d < D)
    if X_DENSE:
        o_x = o_n * D + o_d
    else:
        o_x = o_n * stride_xn + o_d.to(tl.int64) * stride_xd
    b_x = tl.load(p_x + o_x, mask=m_x).to(ACC)

    if STEP == 2:  # one wide load split into pairs, where strided loads would be scalar
        o_j = tl.program_id(1) * (COLS // 2) + tl.arange(0, COLS // 2)[None, :] - START // 2
    elif STEP == 1:
        o_j = o_d - START
    else:
        o_j = tl.load(p_slot + o_d, mask=o_d < D, other=-1)
    m_j = (o_j >= 0) & (o_j < COUNT)
    if SHIFT_DENSE:
        o_s = o_n * COUNT + o_j
    else:
        o_s = o_n * stride_sn + o_j.to(tl.int64) * stride_sd
    b_delta = tl.load(p_shift + o_s, mask=(o_n < N) & m_j, other=0.0).to(ACC)
    if HAS_BIAS:
        b_delta += tl.load(p_bias + o_j, mask=m_j, other=0.0).to(ACC)
    if INVERSE:
        b_delta = -b_delta

    if STEP == 2:
        b_even, b_odd = tl.split(tl.reshape(b_x, (ROWS, COLS // 2, 2)))
        # where, not an unconditional add: x + 0 would turn a conditioning -0.0 into 0.0
        if START % 2 == 0:
            b_even = tl.where(m_j, b_even + b_delta, b_even)
        else:
            b_odd = tl.where(m_j, b_odd + b_delta, b_odd)
        b_y = tl.reshape(tl.join(b_even, b_odd), (ROWS, COLS))
    else:
        b_y = tl.where(m_j, b_x + b_delta, b_x)
    tl.store(p_y + o_n * D + o_d, b_y.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["N"])
def couple_inplace_kernel(
    p_x,  # [N, D], read and written at the shifted features only
    p_shift,  # [N, COUNT]
    p_bias,  # [COUNT]
    p_index,  # [COUNT]
    N,
    stride_xn,
    stride_xd,
    stride_sn,
    stride_sd,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    START: tl.constexpr,
    STEP: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_DENSE: tl.constexpr,
    SHIFT_DENSE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_j = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    m_j = o_j < COUNT
    m = (o_n < N) & m_j
    if STEP == 0:
        o_d = tl.load(p_index + o_j, mask=m_j, other=0)
    else:
        o_d = START + STEP * o_j
    if X_DENSE:
        o_x = o_n * D + o_d
    else:
        o_x = o_n * stride_xn + o_d.to(tl.int64) * stride_xd
    if SHIFT_DENSE:
        o_s = o_n * COUNT + o_j
    else:
        o_s = o_n * stride_sn + o_j.to(tl.int64) * stride_sd
    b_x = tl.load(p_x + o_x, mask=m).to(ACC)
    b_delta = tl.load(p_shift + o_s, mask=m).to(ACC)
    if HAS_BIAS:
        b_delta += tl.load(p_bias + o_j, mask=m_j, other=0.0).to(ACC)
    if INVERSE:
        b_delta = -b_delta
    tl.store(p_x + o_x, (b_x + b_delta).to(p_x.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N"])
def select_kernel(
    p_x,  # [N, D]
    p_index,  # [COUNT]
    p_out,  # [N, COUNT]
    p_partial,  # [programs, COUNT]
    N,
    stride_xn,
    stride_xd,
    tiles_per_program,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    START: tl.constexpr,
    STEP: tl.constexpr,
    NEGATE: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    X_DENSE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_j = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    m_j = o_j < COUNT
    if STEP == 0:
        o_d = tl.load(p_index + o_j, mask=m_j, other=0)
    else:
        o_d = START + STEP * o_j
    b_sum = tl.zeros((ROWS, COLS), dtype=ACC)
    for i_t in range(0, tiles_per_program):
        i_n = (i_p.to(tl.int64) * tiles_per_program + i_t) * ROWS
        o_n = (i_n + tl.arange(0, ROWS))[:, None]
        m = (o_n < N) & m_j
        if X_DENSE:
            o_x = o_n * D + o_d
        else:
            o_x = o_n * stride_xn + o_d.to(tl.int64) * stride_xd
        b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(ACC)
        if NEGATE:
            b_x = -b_x
        tl.store(p_out + o_n * COUNT + o_j, b_x.to(p_out.dtype.element_ty), mask=m)
        if COLUMN_SUMS:
            b_sum += b_x
    if COLUMN_SUMS:
        b_total = tl.sum(b_sum, 0)[None, :]
        tl.store(p_partial + i_p.to(tl.int64) * COUNT + o_j, b_total, mask=m_j)


def couple(
    x: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    slot: Tensor | None,
    index: Tensor | None,
    start: int,
    step: int,
    inverse: bool,
) -> Tensor:
    """``x`` [N, D] with ``shift`` [N, S] (and ``bias`` [S]) added to its shifted features."""
    n, d = x.shape
    y = torch.empty((n, d), dtype=x.dtype, device=x.device)
    if n == 0:
        return y
    t = tile(d, x.element_size())
    with on_device(x):
        couple_kernel[(ceil_div(n, t.rows), ceil_div(d, t.columns))](
            x, shift, dense(bias), slot, y, n, *x.stride(), *shift.stride(),
            D=d, COUNT=shift.shape[1], START=start, STEP=step, INVERSE=inverse,
            HAS_BIAS=bias is not None, X_DENSE=is_dense(x), SHIFT_DENSE=is_dense(shift),
            ACC=accumulator(x, shift), ROWS=t.rows, COLS=t.columns, num_warps=t.warps, **FUSED,
        )  # fmt: skip
    return y


def couple_(
    x: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    slot: Tensor | None,
    index: Tensor | None,
    start: int,
    step: int,
    inverse: bool,
) -> None:
    """The same, written over ``x``."""
    n, d = x.shape
    count = shift.shape[1]
    if n == 0:
        return
    t = tile(count, x.element_size())
    with on_device(x):
        couple_inplace_kernel[(ceil_div(n, t.rows), ceil_div(count, t.columns))](
            x, shift, dense(bias), index, n, *x.stride(), *shift.stride(),
            D=d, COUNT=count, START=start, STEP=step, INVERSE=inverse,
            HAS_BIAS=bias is not None, X_DENSE=is_dense(x), SHIFT_DENSE=is_dense(shift),
            ACC=accumulator(x, shift), ROWS=t.rows, COLS=t.columns, num_warps=t.warps, **FUSED,
        )  # fmt: skip


def select(
    x: Tensor,
    index: Tensor | None,
    start: int,
    step: int,
    count: int,
    negate: bool,
    column_sums: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``(x[:, features], its column sums)`` as ``dtype``, negated if asked.

    The sums are [count] in at least float32, or empty where they were not asked for.
    """
    n, d = x.shape
    acc = accumulator(x)
    out = torch.empty((n, count), dtype=dtype, device=x.device)
    sums = torch.zeros(count if column_sums else 0, dtype=torch_dtype(acc), device=x.device)
    if n == 0:
        return out, sums
    t = tile(count, x.element_size())
    if column_sums:
        programs, per_program = reduction_programs(n, count, t)
    else:
        programs, per_program = ceil_div(n, t.rows), 1
    partial = torch.empty(
        (programs if column_sums else 0, count), dtype=sums.dtype, device=x.device
    )
    with on_device(x):
        select_kernel[(programs, ceil_div(count, t.columns))](
            x, index, out, partial, n, *x.stride(), per_program,
            D=d, COUNT=count, START=start, STEP=step, NEGATE=negate, COLUMN_SUMS=column_sums,
            X_DENSE=is_dense(x), ACC=acc, ROWS=t.rows, COLS=t.columns, num_warps=t.warps, **FUSED,
        )  # fmt: skip
    return out, partial.sum(0) if column_sums else sums
