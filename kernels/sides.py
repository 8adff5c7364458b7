"""Around a wide flow's products, which are cuBLAS's: rows to the partition's sides, and back.

Between couplings the sides lie one after the other in y [N, D], so that each is an operand of a
product as it is. What is added on the way are the biases of couplings' last layers, one for each
side at most, since a product that adds to a side in place has no epilogue for them:

    enter   y_j = exp(-log_scale_d) x_d + bias_j        (the scale: back from z alone)
    add     y_j = y_j + bias_j, in place
    leave   z_d = exp(log_scale_d) (y_j + bias_j)       (the scale: forwards alone)
            log_prob = sum_d log p(z_d) + sum_d log_scale_d

with d the feature that is j-th of the sides; with ``inverse``, biases are subtracted. Everything is
float32.

Bytes moved, for N rows and D features: 8 N D each, and leave 4 N D + 4 N where z is not wanted.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, dense, is_dense, on_device
from .prior import prior_terms, spans, sum_terms
from .tile import Tile, ceil_div, tile

Biases = tuple[Tensor | None, Tensor | None]


@triton.jit
def _feature(
    o_j,
    p_i0,  # [S]
    p_i1,  # [D - S]
    D: tl.constexpr,
    S: tl.constexpr,
    START0: tl.constexpr,
    STEP0: tl.constexpr,
    START1: tl.constexpr,
    STEP1: tl.constexpr,
):
    """Which feature is the ``o_j``-th of the sides."""
    if STEP0 == 1 and STEP1 == 1 and START0 == 0:
        o_d = o_j  # and the compiler knows that accesses are wide
    else:
        if STEP0 == 0:
            o_0 = tl.load(p_i0 + o_j, mask=o_j < S, other=0).to(tl.int32)
        else:
            o_0 = START0 + STEP0 * o_j
        if STEP1 == 0:
            o_1 = tl.load(p_i1 + o_j - S, mask=(o_j >= S) & (o_j < D), other=0).to(tl.int32)
        else:
            o_1 = START1 + STEP1 * (o_j - S)
        o_d = tl.where(o_j < S, o_0, o_1)
    return o_d


@triton.jit
def _add(b_y, p_b, o_b, m_b, HAS: tl.constexpr, INVERSE: tl.constexpr):
    """``b_y`` with a bias added where the mask ``m_b`` of its columns is set."""
    if HAS:
        b_b = tl.load(p_b + o_b, mask=m_b, other=0.0)
        if INVERSE:
            b_b = -b_b
        # where, not an unconditional add: x + 0 would turn a conditioning -0.0 into 0.0
        b_y = tl.where(m_b[None, :], b_y + b_b[None, :], b_y)
    return b_y


@triton.jit
def _biased(
    b_y,
    o_j,
    p_b0,  # [S]
    p_b1,  # [D - S]
    D: tl.constexpr,
    S: tl.constexpr,
    HAS_B0: tl.constexpr,
    HAS_B1: tl.constexpr,
    INVERSE: tl.constexpr,
):
    b_y = _add(b_y, p_b0, o_j, o_j < S, HAS_B0, INVERSE)
    return _add(b_y, p_b1, o_j - S, (o_j >= S) & (o_j < D), HAS_B1, INVERSE)


@triton.jit(do_not_specialize=["N"])
def enter_kernel(
    p_x,  # [N, D]
    p_s,  # [D]
    p_b0,  # [S]
    p_b1,  # [D - S]
    p_i0,  # [S]
    p_i1,  # [D - S]
    p_y,  # [N, D]
    N,
    stride_xn,
    stride_xd,
    D: tl.constexpr,
    S: tl.constexpr,
    START0: tl.constexpr,
    STEP0: tl.constexpr,
    START1: tl.constexpr,
    STEP1: tl.constexpr,
    ALTERNATING: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_B0: tl.constexpr,
    HAS_B1: tl.constexpr,
    INVERSE: tl.constexpr,
    X_DENSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_j = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if ALTERNATING:
        o_d = o_j
    else:
        o_d = _feature(o_j, p_i0, p_i1, D, S, START0, STEP0, START1, STEP1)
    if X_DENSE:
        o_x = o_n * D + o_d[None, :]
    else:
        o_x = o_n * stride_xn + o_d.to(tl.int64)[None, :] * stride_xd
    m = (o_n < N) & (o_j < D)[None, :]
    b_y = tl.load(p_x + o_x, mask=m)
    if SCALED:
        b_y *= tl.exp(-tl.load(p_s + o_d, mask=o_j < D, other=0.0))[None, :]
    if ALTERNATING:  # one wide load split into pairs, where strided loads would be narrow
        o_k = tl.program_id(1) * (COLS // 2) + tl.arange(0, COLS // 2)
        b_0, b_1 = tl.split(tl.reshape(b_y, (ROWS, COLS // 2, 2)))
        if START0 == 1:
            b_0, b_1 = b_1, b_0
        b_0 = _add(b_0, p_b0, o_k, o_k < S, HAS_B0, INVERSE)
        b_1 = _add(b_1, p_b1, o_k, o_k < D - S, HAS_B1, INVERSE)
        o_y = o_n * D + o_k[None, :]
        tl.store(p_y + o_y, b_0, mask=(o_n < N) & (o_k < S)[None, :])
        tl.store(p_y + o_y + S, b_1, mask=(o_n < N) & (o_k < D - S)[None, :])
    else:
        b_y = _biased(b_y, o_j, p_b0, p_b1, D, S, HAS_B0, HAS_B1, INVERSE)
        tl.store(p_y + o_n * D + o_j[None, :], b_y, mask=m)


@triton.jit(do_not_specialize=["N"])
def add_kernel(
    p_y,  # [N, D]
    p_b0,  # [S]
    p_b1,  # [D - S]
    N,
    D: tl.constexpr,
    S: tl.constexpr,
    HAS_B0: tl.constexpr,
    HAS_B1: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_j = tl.program_id(1) * COLS + tl.arange(0, COLS)
    o_y, m = o_n * D + o_j[None, :], (o_n < N) & (o_j < D)[None, :]
    b_y = tl.load(p_y + o_y, mask=m)
    b_y = _biased(b_y, o_j, p_b0, p_b1, D, S, HAS_B0, HAS_B1, INVERSE)
    tl.store(p_y + o_y, b_y, mask=m)


@triton.jit(do_not_specialize=["N"])
def leave_kernel(
    p_y,  # [N, D]
    p_s,  # [D]
    p_b0,  # [S]
    p_b1,  # [D - S]
    p_i0,  # [S]
    p_i1,  # [D - S]
    p_z,  # [N, D]
    p_lp,  # [N]
    N,
    D: tl.constexpr,
    S: tl.constexpr,
    START0: tl.constexpr,
    STEP0: tl.constexpr,
    START1: tl.constexpr,
    STEP1: tl.constexpr,
    ALTERNATING: tl.constexpr,
    PRIOR: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_B0: tl.constexpr,
    HAS_B1: tl.constexpr,
    INVERSE: tl.constexpr,
    WITH_Z: tl.constexpr,
    WITH_LP: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    FOLDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_n = o_r[:, None]
    b_lp = tl.zeros((ROWS,), dtype=tl.float32)
    for i_s in range(0, SPANS):
        b_acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        b_product = tl.full((ROWS, COLS), 1.0, dtype=tl.float32)
        for i_t in range(0, SPAN):
            i_c = i_s * SPAN + i_t
            o_j = i_c * COLS + tl.arange(0, COLS)
            m = (o_n < N) & (o_j < D)[None, :]
            if ALTERNATING:  # wide loads joined to pairs
                o_d = o_j
                o_k = i_c * (COLS // 2) + tl.arange(0, COLS // 2)
                m_0, m_1, o_y = o_k < S, o_k < D - S, o_n * D + o_k[None, :]
                b_0 = tl.load(p_y + o_y, mask=(o_n < N) & m_0[None, :], other=0.0)
                b_1 = tl.load(p_y + o_y + S, mask=(o_n < N) & m_1[None, :], other=0.0)
                b_0 = _add(b_0, p_b0, o_k, m_0, HAS_B0, INVERSE)
                b_1 = _add(b_1, p_b1, o_k, m_1, HAS_B1, INVERSE)
                if START0 == 1:
                    b_0, b_1 = b_1, b_0
                b_z = tl.reshape(tl.join(b_0, b_1), (ROWS, COLS))
            else:
                o_d = _feature(o_j, p_i0, p_i1, D, S, START0, STEP0, START1, STEP1)
                b_z = tl.load(p_y + o_n * D + o_j[None, :], mask=m, other=0.0)
                b_z = _biased(b_z, o_j, p_b0, p_b1, D, S, HAS_B0, HAS_B1, INVERSE)
            if SCALED:
                b_s = tl.load(p_s + o_d, mask=o_j < D, other=0.0)[None, :]
                b_z *= tl.exp(b_s)
                if WITH_LP:
                    b_a, b_f = prior_terms(b_z, PRIOR)
                    # a padded lane must add nothing: the logistic log-density at 0 is -2 log 2
                    b_acc += tl.where(m, b_a + b_s, 0.0)
                    if PRIOR == "logistic":
                        b_product *= tl.where(m, b_f, 1.0)
            if WITH_Z:
                tl.store(p_z + o_n * D + o_d[None, :], b_z, mask=m)
        if WITH_LP:
            b_lp += sum_terms(b_acc, b_product, PRIOR, ROWS, COLS, False, FOLDS)
    if WITH_LP:
        tl.store(p_lp + o_r, b_lp, mask=o_r < N)


def enter(
    x: Tensor, sides: tuple[Any, Any], biases: Biases, log_scale: Tensor | None, inverse: bool
) -> Tensor:
    """y [N, D] of rows ``x`` [N, D]; a side has ``size``, ``start``, ``step`` and ``indices``."""
    n, d = x.shape
    x = x.resolve_neg()
    y = torch.empty((n, d), dtype=x.dtype, device=x.device)
    if n == 0:
        return y
    t, (first, second) = tile(d, x.element_size()), sides
    with on_device(x):
        enter_kernel[_grid(n, d, t)](
            x, dense(log_scale), *map(dense, biases), first.indices, second.indices, y, n,
            *x.stride(), D=d, **_places(sides), SCALED=log_scale is not None, **_has(biases),
            INVERSE=inverse, X_DENSE=is_dense(x), ROWS=t.rows, COLS=t.columns,
            num_warps=t.warps, **FUSED,
        )  # fmt: skip
    return y


def add_(y: Tensor, size: int, biases: Biases, inverse: bool) -> None:
    """``biases`` to the sides in y [N, D], the first of which has ``size`` features."""
    n, d = y.shape
    if n == 0:
        return
    t = tile(d, y.element_size())
    with on_device(y):
        add_kernel[_grid(n, d, t)](
            y, *map(dense, biases), n,
            D=d, S=size, **_has(biases), INVERSE=inverse,
            ROWS=t.rows, COLS=t.columns, num_warps=t.warps, **FUSED,
        )  # fmt: skip


def leave(
    y: Tensor,
    sides: tuple[Any, Any],
    biases: Biases,
    log_scale: Tensor | None,
    prior: str,
    inverse: bool,
    z: Tensor | None,
    log_prob: Tensor | None,
) -> None:
    """Rows of ``y`` [N, D] to z [N, D] and log_prob [N], where they are wanted; both are dense."""
    n, d = y.shape
    if n == 0:
        return
    t, (first, second) = tile(d, y.element_size()), sides
    with on_device(y):
        leave_kernel[(ceil_div(n, t.rows),)](
            y, dense(log_scale), *map(dense, biases), first.indices, second.indices, z, log_prob, n,
            D=d, **_places(sides), PRIOR=prior, SCALED=log_scale is not None, **_has(biases),
            INVERSE=inverse, WITH_Z=z is not None, WITH_LP=log_prob is not None,
            **spans(d, t.columns), ROWS=t.rows, COLS=t.columns, num_warps=t.warps, **FUSED,
        )  # fmt: skip


def _grid(n: int, d: int, t: Tile) -> tuple[int, int]:
    return ceil_div(n, t.rows), ceil_div(d, t.columns)


def _places(sides: tuple[Any, Any]) -> dict[str, int | bool]:
    first, second = sides
    evens, odds = sides if first.start == 0 else (second, first)
    alternating = (
        (evens.start, evens.step, odds.start) == (0, 2, 1)
        and (odds.step == 2 or odds.size == 1)
        and 0 <= evens.size - odds.size <= 1
    )
    return {
        "S": first.size, "START0": first.start, "STEP0": first.step,
        "START1": second.start, "STEP1": second.step, "ALTERNATING": alternating,
    }  # fmt: skip


def _has(biases: Biases) -> dict[str, bool]:
    return {"HAS_B0": biases[0] is not None, "HAS_B1": biases[1] is not None}
