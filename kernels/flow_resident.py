"""A whole flow whose weights all stay on the chip: log-density, forward, inverse and sample.

The equations are those of :mod:`.flow`. Each program loads every weight once and then takes one
tile of rows after the other, so that a tile waits for no weight. Couplings and layers are unrolled:
each depth, and each order of the sides that couplings read, is a compilation of its own. The sides
of the partition are two narrow blocks of values, and no product is masked.

How many programs there are depends on the device; a row's bits do not.

Bytes moved, for N rows, D features, C of context: those of :mod:`.flow`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .flow_tile import FlowShape, ResidentTile
from .launch import FUSED, dense, is_dense, launch, on_device
from .packing import Tensors
from .prior import prior_terms, sum_terms
from .product import operand, times
from .sampling import noise_at
from .tile import ceil_div

INTERPRETED_PROCESSORS = 1  # programs run one after the other


@triton.jit
def _features(
    p_map, SIDE: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, HALF: tl.constexpr
):
    """The features [HALF] of a side of the partition."""
    o_h = tl.arange(0, HALF)
    if STEP == 0:
        o_d = tl.load(p_map + SIDE * HALF + o_h)
    else:
        o_d = START + STEP * o_h
    return o_d


@triton.jit
def _rows(
    p_x, o_r, o_d, N, stride_n, stride_d, D: tl.constexpr, SIZE: tl.constexpr,
    DENSE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Features o_d [WIDTH] of the rows o_r, the first SIZE of them; 0 elsewhere."""
    o_n = o_r[:, None]
    if DENSE:
        o_x = o_n * D + o_d[None, :]
    else:
        o_x = o_n * stride_n + o_d.to(tl.int64)[None, :] * stride_d
    m = (o_n < N) & (tl.arange(0, WIDTH) < SIZE)[None, :]
    return tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _weight(p_w, first, OUT: tl.constexpr, IN: tl.constexpr, STRIDE: tl.constexpr):
    """The weight [OUT, IN] that begins at number ``first``, with rows STRIDE apart, transposed."""
    return tl.load(p_w + tl.arange(0, IN)[:, None] + (first + tl.arange(0, OUT)[None, :] * STRIDE))


@triton.jit
def _weights(
    p_w, L: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, CP: tl.constexpr, HP: tl.constexpr
):
    """Every weight of the flow, those of coupling 0 first: of the features, of the context, of the
    middle layers and of the last one."""
    ws = ()
    for i_l in tl.static_range(L):
        first = i_l * HP * (HALF + CP + (K - 1) * HP + HALF)
        ws = ws + (_weight(p_w, first, HP, HALF, HALF + CP),)
        if CP > 0:
            ws = ws + (_weight(p_w, first + HALF, HP, CP, HALF + CP),)
        for i_k in tl.static_range(K - 1):
            ws = ws + (_weight(p_w, first + HP * (HALF + CP + i_k * HP), HP, HP, HP),)
        ws = ws + (_weight(p_w, first + HP * (HALF + CP + (K - 1) * HP), HALF, HP, HP),)
    return ws


@triton.jit
def _biased(b_p, p_b, WIDTH: tl.constexpr):
    """The bias is subtracted, as in :func:`.product.linear`: memory has its negative."""
    return b_p - tl.load(p_b + tl.arange(0, WIDTH))[None, :]


@triton.jit
def _conditioner(
    b_x, b_c, ws, FIRST: tl.constexpr, p_b, K: tl.constexpr, HALF: tl.constexpr, CP: tl.constexpr,
    HP: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """The shift [ROWS, HALF] of one coupling, whose weights are ws[FIRST], ws[FIRST + 1], ..."""
    MID: tl.constexpr = FIRST + (1 if CP == 0 else 2)
    b_h = tl.zeros((ROWS, HP), dtype=tl.float32)
    b_h = times(operand(b_x, PRODUCTS), ws[FIRST], b_h, PRODUCTS)
    if CP > 0:
        b_h = times(b_c, ws[FIRST + 1], b_h, PRODUCTS)
    b_h = _biased(b_h, p_b, HP)
    for i_k in tl.static_range(K - 1):
        b_a = operand(activate(b_h, ACTIVATION, False), PRODUCTS)
        b_h = times(b_a, ws[MID + i_k], tl.zeros((ROWS, HP), dtype=tl.float32), PRODUCTS)
        b_h = _biased(b_h, p_b + (1 + i_k) * HP, HP)
    b_a = operand(activate(b_h, ACTIVATION, False), PRODUCTS)
    b_m = times(b_a, ws[MID + K - 1], tl.zeros((ROWS, HALF), dtype=tl.float32), PRODUCTS)
    return _biased(b_m, p_b + K * HP, HALF)


@triton.jit
def _shifted(b_x, b_m, INVERSE: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr):
    b_y = b_x - b_m if INVERSE else b_x + b_m
    if SIZE < HALF:  # padding stays 0, also where a hidden unit is infinite
        b_y = tl.where((tl.arange(0, HALF) < SIZE)[None, :], b_y, b_x)
    return b_y


@triton.jit(do_not_specialize=["N", "tiles", "row_offset", "seed"])
def resident_kernel(
    p_x,  # [N, D], or none: noise
    p_c,  # [N, C] or none
    p_w,  # [L, HP * (HALF + CP + (K - 1) * HP + HALF)]
    p_b,  # [L, K * HP + HALF]
    p_map,  # [2, HALF]
    p_s,  # [D]
    p_y,  # [N, D]
    p_lp,  # [N]
    N,
    tiles,
    row_offset: tl.int64,
    seed: tl.int64,
    stride_xn,
    stride_xd,
    stride_cn,
    stride_cd,
    D: tl.constexpr,
    S0: tl.constexpr,
    START0: tl.constexpr,
    STEP0: tl.constexpr,
    START1: tl.constexpr,
    STEP1: tl.constexpr,
    C: tl.constexpr,
    X_DENSE: tl.constexpr,
    C_DENSE: tl.constexpr,
    INVERSE: tl.constexpr,
    SAMPLE: tl.constexpr,
    WITH_Y: tl.constexpr,
    WITH_LP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRIOR: tl.constexpr,
    PRODUCTS: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    READS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    CP: tl.constexpr,
    HP: tl.constexpr,
    HALVES: tl.constexpr,
    FOLDS: tl.constexpr,
):
    S1: tl.constexpr = D - S0
    EACH: tl.constexpr = K + 1 if CP == 0 else K + 2  # weights of a coupling
    ws = _weights(p_w, L, K, HALF, CP, HP)
    m_0, m_1 = tl.arange(0, HALF) < S0, tl.arange(0, HALF) < S1
    for i_t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
        # a cast, not i_t.to: the interpreter counts in Python's integers
        o_r = tl.cast(i_t, tl.int64) * ROWS + tl.arange(0, ROWS)
        o_0 = _features(p_map, 0, START0, STEP0, HALF)
        o_1 = _features(p_map, 1, START1, STEP1, HALF)
        b_s0 = tl.load(p_s + o_0, mask=m_0, other=0.0)[None, :]
        b_s1 = tl.load(p_s + o_1, mask=m_1, other=0.0)[None, :]
        if SAMPLE:
            b_0 = noise_at(o_r[:, None] + row_offset, o_0[None, :], seed, PRIOR, ROWS, HALF)
            b_1 = noise_at(o_r[:, None] + row_offset, o_1[None, :], seed, PRIOR, ROWS, HALF)
            b_0 = tl.where(m_0[None, :], b_0, 0.0)
            b_1 = tl.where(m_1[None, :], b_1, 0.0)
        else:
            b_0 = _rows(p_x, o_r, o_0, N, stride_xn, stride_xd, D, S0, X_DENSE, HALF)
            b_1 = _rows(p_x, o_r, o_1, N, stride_xn, stride_xd, D, S1, X_DENSE, HALF)
        if INVERSE:
            b_0 = b_0 * tl.exp(-b_s0)
            b_1 = b_1 * tl.exp(-b_s1)
        b_c = b_0
        if CP > 0:
            o_c = tl.arange(0, CP)
            b_c = _rows(p_c, o_r, o_c, N, stride_cn, stride_cd, C, C, C_DENSE, CP)
            b_c = operand(b_c, PRODUCTS)
        for i_l in tl.static_range(
            L - 1 if INVERSE else 0, -1 if INVERSE else L, -1 if INVERSE else 1
        ):
            p_own = p_b + i_l * (K * HP + HALF)
            if (READS >> i_l) % 2 == 0:
                b_m = _conditioner(
                    b_0, b_c, ws, i_l * EACH, p_own, K, HALF, CP, HP, ROWS, ACTIVATION,
                    PRODUCTS,
                )  # fmt: skip
                b_1 = _shifted(b_1, b_m, INVERSE, S1, HALF)
            else:
                b_m = _conditioner(
                    b_1, b_c, ws, i_l * EACH, p_own, K, HALF, CP, HP, ROWS, ACTIVATION,
                    PRODUCTS,
                )  # fmt: skip
                b_0 = _shifted(b_0, b_m, INVERSE, S0, HALF)
        if not INVERSE:
            b_0 = b_0 * tl.exp(b_s0)
            b_1 = b_1 * tl.exp(b_s1)
        if WITH_Y:
            o_y = o_r[:, None] * D
            tl.store(p_y + o_y + o_0[None, :], b_0, mask=(o_r < N)[:, None] & m_0[None, :])
            tl.store(p_y + o_y + o_1[None, :], b_1, mask=(o_r < N)[:, None] & m_1[None, :])
        if WITH_LP:
            b_a0, b_f0 = prior_terms(b_0, PRIOR)
            b_a1, b_f1 = prior_terms(b_1, PRIOR)
            # a padded lane must add nothing: f is 2 at 0
            b_a = tl.where(m_0[None, :], b_a0 + b_s0, 0.0) + tl.where(
                m_1[None, :], b_a1 + b_s1, 0.0
            )
            b_f = tl.where(m_0[None, :], b_f0, 1.0) * tl.where(m_1[None, :], b_f1, 1.0)
            b_lp = sum_terms(b_a, b_f, PRIOR, ROWS, HALF, HALVES, FOLDS)
            tl.store(p_lp + o_r, b_lp, mask=o_r < N)


def run(
    n: int,
    x: Tensor | None,
    context: Tensor | None,
    packed: Tensors,
    log_scale: Tensor,
    shape: FlowShape,
    tile: ResidentTile,
    inverse: bool,
    y: Tensor | None,
    log_prob: Tensor | None,
    row_offset: int = 0,
    seed: int = 0,
) -> None:
    """Rows ``x`` [n, D], or noise, through the flow (``inverse``: back) to ``y`` [n, D] and
    ``log_prob`` [n], where they are wanted."""
    w, bias, features = packed
    first, second = shape.sides
    tiles = ceil_div(n, tile.rows)
    strides = (*_strides(x), *_strides(context))
    with on_device(w):
        launch(
            resident_kernel, min(tiles, tile.programs * _processors(w.device)),
            (x, context, w, bias, features, dense(log_scale), y, log_prob, n, tiles,
             row_offset, seed, *strides),
            (shape, tile, strides, inverse),
            lambda: {
                "D": shape.features, "S0": first.size, "START0": first.start,
                "STEP0": first.step, "START1": second.start, "STEP1": second.step,
                "C": shape.context, "X_DENSE": x is not None and is_dense(x),
                "C_DENSE": context is not None and is_dense(context), "INVERSE": inverse,
                "SAMPLE": x is None, "WITH_Y": y is not None, "WITH_LP": log_prob is not None,
                "ACTIVATION": shape.activation, "PRIOR": shape.prior, "PRODUCTS": tile.products,
                "L": shape.couplings, "K": len(shape.hidden),
                "READS": sum(side << i for i, side in enumerate(shape.reads)),
                "ROWS": tile.rows, "HALF": tile.half, "CP": tile.context, "HP": tile.hidden,
                "HALVES": tile.halves, "FOLDS": (tile.half // 8).bit_length() - 1,
                "num_warps": tile.warps, "maxnreg": tile.registers, **FUSED,
            },
        )  # fmt: skip


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if t is None else t.stride()


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
