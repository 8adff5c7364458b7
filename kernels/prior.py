"""The priors' formulas inside kernels: log-density, its derivative, and noise.

    logistic  log p(z) = -|z| - 2 log(1 + exp(-|z|))     d/dz = -tanh(z / 2)
    normal    log p(z) = -z^2 / 2 - log(2 pi) / 2         d/dz = -z

Both are finite wherever z is, and NaN where z is NaN.
"""

import triton
import triton.language as tl

from .tile import ceil_div

FACTORS = 100  # so many f of prior_terms, each at most 2, have a product without overflow


@triton.jit
def prior_terms(b_z, PRIOR: tl.constexpr):
    """``(a, f)`` with log p(z) = a - 2 log f and 1 <= f <= 2; the normal prior has no f.

    A logarithm takes about twenty instructions, and one serves a product of many f.
    """
    if PRIOR == "logistic":
        b_a = -tl.abs(b_z)
        b_f = 1.0 + tl.exp(b_a)
    else:
        tl.static_assert(PRIOR == "normal")
        b_a = -0.5 * b_z * b_z - 0.9189385332046727
        b_f = b_a
    return b_a, b_f


@triton.jit
def sum_terms(
    b_a, b_f, PRIOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    HALVES: tl.constexpr, FOLDS: tl.constexpr,
):  # fmt: skip
    """The sums [ROWS] of a - 2 log f over the columns of b_a and b_f [ROWS, COLS].

    The columns are folded FOLDS times before logarithms are taken, within each thread: HALVES, as a
    thread of a matrix product has columns j and j + 8, and else pairs, of which it loads two.
    """
    if PRIOR != "logistic":
        b_sum = tl.sum(b_a, 1)
    elif FOLDS == 0:
        b_sum = tl.sum(b_a - 2.0 * tl.log(b_f), 1)
    else:
        if HALVES:
            b_a = tl.permute(tl.reshape(b_a, (ROWS, 2, COLS // 2)), (0, 2, 1))
            b_f = tl.permute(tl.reshape(b_f, (ROWS, 2, COLS // 2)), (0, 2, 1))
        else:
            b_a = tl.reshape(b_a, (ROWS, COLS // 2, 2))
            b_f = tl.reshape(b_f, (ROWS, COLS // 2, 2))
        b_a0, b_a1 = tl.split(b_a)
        b_f0, b_f1 = tl.split(b_f)
        b_sum = sum_terms(b_a0 + b_a1, b_f0 * b_f1, PRIOR, ROWS, COLS // 2, HALVES, FOLDS - 1)
    return b_sum


def spans(width: int, columns: int) -> dict[str, int]:
    """How a loop over ``width`` features, ``columns`` in a turn, is cut so that no product of f
    overflows: ``SPANS`` times ``SPAN`` turns, then ``FOLDS`` for :func:`sum_terms`."""
    folds = 2 if columns >= 4 else 0
    turns = ceil_div(width, columns)
    count = ceil_div(turns, FACTORS >> folds)
    return {"SPANS": count, "SPAN": ceil_div(turns, count), "FOLDS": folds}


@triton.jit
def prior_score(b_z, PRIOR: tl.constexpr):
    """d log p(z) / dz."""
    if PRIOR == "logistic":
        b_e = tl.exp(-tl.abs(b_z))
        b_t = (1.0 - b_e) / (1.0 + b_e)  # tanh(|z| / 2), never inf / inf
        b_score = tl.where(b_z > 0, -b_t, b_t)
    else:
        tl.static_assert(PRIOR == "normal")
        b_score = -b_z
    return b_score


@triton.jit
def _unit(b_high, b_low, SCALE: tl.constexpr, ACC: tl.constexpr):
    """(k + 1/2) * SCALE for the integer k = b_high, with b_low as its fraction in float64."""
    if ACC == tl.float64:
        b_fraction = (b_low.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
        b_u = (b_high.to(tl.float64) + b_fraction) * SCALE
    else:
        b_u = (b_high.to(tl.float32) + 0.5) * SCALE
    return b_u


@triton.jit
def logistic_noise(b_high, b_low, ACC: tl.constexpr):
    """One standard logistic number from 32 (float64: 64) random bits, never infinite.

    The top bit is the sign; the others are w = P(|Z| > t) = 2 / (1 + e^t), so t = log((2 - w) / w):
    relative precision is kept where w is small, that is in both tails.
    """
    b_w = _unit(b_high & 0x7FFFFFFF, b_low, 4.656612873077393e-10, ACC)  # 2^-31
    b_t = tl.log((2.0 - b_w) / b_w)
    return tl.where((b_high >> 31) != 0, -b_t, b_t)


@triton.jit
def _cos_sin(b_turn, ACC: tl.constexpr):
    """(cos, sin) of 2 pi b_turn, 0 <= b_turn <= 1.

    By Taylor series after reduction to an eighth of a turn either side of a quarter: the library's
    cosine keeps a table for huge angles on the stack.
    """
    b_quarter = tl.floor(4.0 * b_turn + 0.5)
    b_x = (b_turn - 0.25 * b_quarter) * 6.283185307179586
    b_x2 = b_x * b_x
    if ACC == tl.float64:
        b_c = -1.5619206968586225e-16 * b_x2 + 4.779477332387385e-14
        b_c = b_c * b_x2 + -1.1470745597729725e-11
        b_c = b_c * b_x2 + 2.08767569878681e-09
        b_c = b_c * b_x2 + -2.755731922398589e-07
        b_c = b_c * b_x2 + 2.48015873015873e-05
        b_s = 2.8114572543455206e-15 * b_x2 + -7.647163731819816e-13
        b_s = b_s * b_x2 + 1.6059043836821613e-10
        b_s = b_s * b_x2 + -2.505210838544172e-08
        b_s = b_s * b_x2 + 2.7557319223985893e-06
    else:
        b_c = -2.755731922398589e-07 * b_x2 + 2.48015873015873e-05
        b_s = -2.505210838544172e-08 * b_x2 + 2.7557319223985893e-06
    b_c = b_c * b_x2 + -0.001388888888888889
    b_c = b_c * b_x2 + 0.041666666666666664
    b_c = b_c * b_x2 + -0.5
    b_c = b_c * b_x2 + 1.0
    b_s = b_s * b_x2 + -0.0001984126984126984
    b_s = b_s * b_x2 + 0.008333333333333333
    b_s = b_s * b_x2 + -0.16666666666666666
    b_s = b_s * b_x2 + 1.0
    b_s = b_s * b_x
    i_q = b_quarter.to(tl.int32) & 3
    b_even = (i_q & 1) == 0
    b_cos = tl.where(b_even, b_c, b_s)
    b_sin = tl.where(b_even, b_s, b_c)
    b_cos = tl.where((i_q == 1) | (i_q == 2), -b_cos, b_cos)
    b_sin = tl.where(i_q >= 2, -b_sin, b_sin)
    return b_cos, b_sin


@triton.jit
def normal_noise(b_high_r, b_low_r, b_high_a, b_low_a, ACC: tl.constexpr):
    """Two independent standard normal numbers (Box-Muller)."""
    b_u = _unit(b_high_r, b_low_r, 2.3283064365386963e-10, ACC)  # in (0, 1]
    b_turn = _unit(b_high_a, b_low_a, 2.3283064365386963e-10, ACC)
    b_cos, b_sin = _cos_sin(b_turn, ACC)
    b_radius = tl.sqrt(-2.0 * tl.log(b_u))
    return b_radius * b_cos, b_radius * b_sin
