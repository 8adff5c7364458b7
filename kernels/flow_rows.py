"""A tile of rows on the chip: loaded with its context, and through all couplings of a flow.

The parameters are as :mod:`.packing` lays them out.
"""

import triton
import triton.language as tl

from .activation import activate
from .product import linear, operand


@triton.jit
def _activated(
    b_v, NOW: tl.constexpr, ACTIVATION: tl.constexpr, PRODUCTS: tl.constexpr, PRECISE: tl.constexpr
):
    """A layer's result as the next one's operand, or, not NOW, as it is.

    Where a warp group multiplies, an operand that is made at the start of a turn of the loop stays
    in registers, and one that is carried over goes through shared memory. Elsewhere either stays,
    and the operand takes fewer.
    """
    if NOW:
        b_v = operand(activate(b_v, ACTIVATION, PRECISE), PRODUCTS)
    return b_v


@triton.jit
def couplings(
    b_x,  # [ROWS, DP], the context in columns D .. D + C - 1
    p_in,  # [L, PARTS, HP, DP]
    p_mid,  # [L, K - 1, PARTS, HP, HP]
    p_out,  # [L, PARTS, DP, HP]
    p_b,  # [L, K * HP + DP]
    p_sides,  # [L, DP]
    L,
    K,
    INVERSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISE: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
    HP: tl.constexpr,
    STAGES: tl.constexpr,
    CARRIES: tl.constexpr,
):
    """All couplings of the flow on one tile of rows.

    L and K are no constants, nor specialised where they are 1: one compilation, whose registers
    can be known beforehand, for a flow of any depth.
    """
    o_d = tl.arange(0, DP)
    for i in tl.range(0, L, num_stages=1):
        if INVERSE:
            i_l = L - 1 - i
        else:
            i_l = i
        p_bias = p_b + i_l * (K * HP + DP)
        b_side = tl.load(p_sides + i_l * DP + o_d)[None, :]
        # NaN * 0 is NaN: mask the operand too, not only the weights
        b_a = operand(tl.where(b_side == 1, b_x, 0.0), PRODUCTS)
        b_v = linear(b_a, p_in, i_l * PARTS, p_bias, PRODUCTS, ROWS, HP, DP)
        b_v = _activated(b_v, CARRIES, ACTIVATION, PRODUCTS, PRECISE)
        for i_k in tl.range(1, K, num_stages=STAGES):
            b_t = _activated(b_v, not CARRIES, ACTIVATION, PRODUCTS, PRECISE)
            i_w = (i_l * (K - 1) + i_k - 1) * PARTS
            b_v = linear(b_t, p_mid, i_w, p_bias + i_k * HP, PRODUCTS, ROWS, HP, HP)
            b_v = _activated(b_v, CARRIES, ACTIVATION, PRODUCTS, PRECISE)
        b_a = _activated(b_v, not CARRIES, ACTIVATION, PRODUCTS, PRECISE)
        b_m = linear(b_a, p_out, i_l * PARTS, p_bias + K * HP, PRODUCTS, ROWS, DP, HP)
        if INVERSE:
            b_m = -b_m
        b_x = tl.where(b_side == 2, b_x + b_m, b_x)
    return b_x


@triton.jit
def rows_again(ROWS: tl.constexpr):
    """The program's row numbers [ROWS] once more.

    program_id(1) is always 0, which the compiler does not know: it computes addresses and masks
    anew, and does not keep those of the loads in registers through the whole flow.
    """
    i_r = tl.program_id(0).to(tl.int64) * ROWS + tl.program_id(1)
    return i_r + tl.arange(0, ROWS)


@triton.jit
def scale(p_s, D: tl.constexpr, DP: tl.constexpr):
    """log_scale [1, DP], 0 in padded columns."""
    o_d = tl.arange(0, DP)
    return tl.load(p_s + o_d, mask=o_d < D, other=0.0)[None, :].to(tl.float32)


@triton.jit
def load_rows(
    p_x, o_n, m_n, stride_n, stride_d, FIRST: tl.constexpr, COUNT: tl.constexpr,
    DENSE: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """A tensor's rows as columns FIRST .. FIRST + COUNT - 1 of a tile [ROWS, DP], 0 elsewhere."""
    o_d = tl.arange(0, DP)[None, :] - FIRST
    if DENSE:
        o_x = o_n * COUNT + o_d
    else:
        o_x = o_n * stride_n + o_d.to(tl.int64) * stride_d
    m = m_n & (o_d >= 0) & (o_d < COUNT)
    return tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)


@triton.jit
def with_context(
    b_x, p_c, o_n, m_n, stride_n, stride_d, D: tl.constexpr, C: tl.constexpr,
    DENSE: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The tile ``b_x`` with the context's rows, if there is one, in columns D .. D + C - 1."""
    if C > 0:
        b_c = load_rows(p_c, o_n, m_n, stride_n, stride_d, D, C, DENSE, DP)
        b_x = tl.where(tl.arange(0, DP)[None, :] < D, b_x, b_c)  # not a sum: -0.0 keeps its sign
    return b_x
