"""A whole flow in one launch: log-density, forward, inverse and sample.

With couplings l = 0 .. L - 1, each of which adds an MLP of its conditioning features (and of a
context c) to the others,

    x[shifted_l] += m_l(x[conditioning_l], c)        z = exp(log_scale) x
    log_prob = sum_d log p(z_d) + sum_d log_scale_d

and backwards with -= from l = L - 1 down. A tile of rows stays on the chip throughout. The
partition is a mask on full-width first and last products: features that are not shifted are
selected, not added to, so they keep their bits, and what is masked cannot spread its NaN. The
context rides along as features that condition every coupling and are never shifted.

x, the accumulators and log_prob are float32; the products' operands are as the precision says.

Bytes moved, for N rows, D features, C of context: log_prob 4 N (D + C) + 4 N, forward and inverse
8 N D + 4 N C (forward with log_prob: + 4 N), sample 4 N (D + C); the weights come from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import flow_resident
from .flow_rows import couplings, load_rows, rows_again, scale, with_context
from .flow_tile import PARTS, FlowShape, FlowTile, ResidentTile
from .launch import FUSED, dense, is_dense, launch, on_device
from .packing import Tensors
from .prior import prior_terms, sum_terms
from .sampling import noise
from .tile import ceil_div


@triton.jit(do_not_specialize=["N", "L", "K"])
def flow_fwd_kernel(
    p_x,  # [N, D]
    p_c,  # [N, C] or none
    p_in,
    p_mid,
    p_out,
    p_b,
    p_sides,
    p_s,  # [D]
    p_z,  # [N, D]
    p_lp,  # [N]
    N,
    L,
    K,
    stride_xn,
    stride_xd,
    stride_cn,
    stride_cd,
    D: tl.constexpr,
    C: tl.constexpr,
    X_DENSE: tl.constexpr,
    C_DENSE: tl.constexpr,
    WITH_Z: tl.constexpr,
    WITH_LOG_PROB: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRIOR: tl.constexpr,
    PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISE: tl.constexpr,
    DP: tl.constexpr,
    HP: tl.constexpr,
    STAGES: tl.constexpr,
    CARRIES: tl.constexpr,
    HALVES: tl.constexpr,
    FOLDS: tl.constexpr,
):
    o_n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_d = tl.arange(0, DP)[None, :]
    b_x = load_rows(p_x, o_n, o_n < N, stride_xn, stride_xd, 0, D, X_DENSE, DP)
    b_x = with_context(b_x, p_c, o_n, o_n < N, stride_cn, stride_cd, D, C, C_DENSE, DP)
    b_x = couplings(
        b_x, p_in, p_mid, p_out, p_b, p_sides,
        L, K, False, ACTIVATION, PRODUCTS, PARTS, PRECISE, ROWS, DP, HP, STAGES, CARRIES,
    )  # fmt: skip
    b_s = scale(p_s, D, DP)
    b_z = b_x * tl.exp(b_s)
    o_r = rows_again(ROWS)
    o_n = o_r[:, None]
    m = (o_n < N) & (o_d < D)
    if WITH_Z:
        tl.store(p_z + o_n * D + o_d, b_z, mask=m)
    if WITH_LOG_PROB:
        b_a, b_f = prior_terms(b_z, PRIOR)
        # a padded lane must add nothing: f is 2 at 0
        b_a, b_f = tl.where(m, b_a + b_s, 0.0), tl.where(m, b_f, 1.0)
        b_lp = sum_terms(b_a, b_f, PRIOR, ROWS, DP, HALVES, FOLDS)
        tl.store(p_lp + o_r, b_lp, mask=o_r < N)


@triton.jit(do_not_specialize=["N", "L", "K"])
def flow_inv_kernel(
    p_z,  # [N, D]
    p_c,  # [N, C] or none
    p_in,
    p_mid,
    p_out,
    p_b,
    p_sides,
    p_s,  # [D]
    p_x,  # [N, D]
    N,
    L,
    K,
    stride_zn,
    stride_zd,
    stride_cn,
    stride_cd,
    D: tl.constexpr,
    C: tl.constexpr,
    X_DENSE: tl.constexpr,
    C_DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISE: tl.constexpr,
    DP: tl.constexpr,
    HP: tl.constexpr,
    STAGES: tl.constexpr,
    CARRIES: tl.constexpr,
):
    o_n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_d = tl.arange(0, DP)[None, :]
    b_s = scale(p_s, D, DP)
    b_x = load_rows(p_z, o_n, o_n < N, stride_zn, stride_zd, 0, D, X_DENSE, DP) * tl.exp(-b_s)
    b_x = with_context(b_x, p_c, o_n, o_n < N, stride_cn, stride_cd, D, C, C_DENSE, DP)
    b_x = couplings(
        b_x, p_in, p_mid, p_out, p_b, p_sides,
        L, K, True, ACTIVATION, PRODUCTS, PARTS, PRECISE, ROWS, DP, HP, STAGES, CARRIES,
    )  # fmt: skip
    o_n = rows_again(ROWS)[:, None]
    tl.store(p_x + o_n * D + o_d, b_x, mask=(o_n < N) & (o_d < D))


@triton.jit(do_not_specialize=["N", "L", "K", "row_offset", "seed"])
def flow_sample_kernel(
    p_c,  # [N, C] or none
    p_in,
    p_mid,
    p_out,
    p_b,
    p_sides,
    p_s,  # [D]
    p_x,  # [N, D]
    N,
    L,
    K,
    row_offset: tl.int64,
    seed: tl.int64,
    stride_cn,
    stride_cd,
    D: tl.constexpr,
    C: tl.constexpr,
    C_DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRIOR: tl.constexpr,
    PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISE: tl.constexpr,
    DP: tl.constexpr,
    HP: tl.constexpr,
    STAGES: tl.constexpr,
    CARRIES: tl.constexpr,
):
    o_n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_d = tl.arange(0, DP)[None, :]
    o_q = tl.arange(0, DP // 4)[None, :]
    b_z = noise(o_n + row_offset, o_q, seed, PRIOR, tl.float32, ROWS, DP // 4)
    b_s = scale(p_s, D, DP)
    b_x = tl.where(o_d < D, b_z * tl.exp(-b_s), 0.0)
    b_x = with_context(b_x, p_c, o_n, o_n < N, stride_cn, stride_cd, D, C, C_DENSE, DP)
    b_x = couplings(
        b_x, p_in, p_mid, p_out, p_b, p_sides,
        L, K, True, ACTIVATION, PRODUCTS, PARTS, PRECISE, ROWS, DP, HP, STAGES, CARRIES,
    )  # fmt: skip
    o_n = rows_again(ROWS)[:, None]
    tl.store(p_x + o_n * D + o_d, b_x, mask=(o_n < N) & (o_d < D))


def flow_fwd(
    x: Tensor,
    context: Tensor | None,
    packed: Tensors,
    log_scale: Tensor,
    shape: FlowShape,
    tile: FlowTile | ResidentTile,
    want_z: bool,
    want_log_prob: bool,
) -> tuple[Tensor, Tensor]:
    """``(z [N, D] or empty, log_prob [N] or empty)`` in float32."""
    n, d = x.shape
    x, context = x.resolve_neg(), _numbers(context)
    z = log_prob = x.new_empty(0)
    if want_z:
        z = torch.empty((n, d), dtype=torch.float32, device=x.device)
    if want_log_prob:
        log_prob = torch.empty(n, dtype=torch.float32, device=x.device)
    if n == 0 or not (want_z or want_log_prob):
        return z, log_prob
    if isinstance(tile, ResidentTile):
        outputs = z if want_z else None, log_prob if want_log_prob else None
        flow_resident.run(n, x, context, packed, log_scale, shape, tile, False, *outputs)
        return z, log_prob
    with on_device(x):
        strides = (*x.stride(), *_strides(context))
        launch(
            flow_fwd_kernel, ceil_div(n, tile.rows),
            (x, context, *packed, dense(log_scale), z, log_prob, n, *_depth(shape), *strides),
            (shape, tile, strides, want_z, want_log_prob),
            lambda: {
                "X_DENSE": is_dense(x), "WITH_Z": want_z, "WITH_LOG_PROB": want_log_prob,
                "PRIOR": shape.prior, "HALVES": tile.halves,
                "FOLDS": (tile.features // 8).bit_length() - 1,
                **_constants(context, shape, tile),
            },
        )  # fmt: skip
    return z, log_prob


def flow_inv(
    z: Tensor,
    context: Tensor | None,
    packed: Tensors,
    log_scale: Tensor,
    shape: FlowShape,
    tile: FlowTile | ResidentTile,
) -> Tensor:
    """``x`` [N, D] in float32."""
    n, d = z.shape
    z, context = z.resolve_neg(), _numbers(context)
    x = torch.empty((n, d), dtype=torch.float32, device=z.device)
    if n == 0:
        return x
    if isinstance(tile, ResidentTile):
        flow_resident.run(n, z, context, packed, log_scale, shape, tile, True, x, None)
        return x
    with on_device(z):
        strides = (*z.stride(), *_strides(context))
        launch(
            flow_inv_kernel, ceil_div(n, tile.rows),
            (z, context, *packed, dense(log_scale), x, n, *_depth(shape), *strides),
            (shape, tile, strides),
            lambda: {"X_DENSE": is_dense(z), **_constants(context, shape, tile)},
        )  # fmt: skip
    return x


def flow_sample(
    n: int,
    row_offset: int,
    seed: int,
    context: Tensor | None,
    packed: Tensors,
    log_scale: Tensor,
    shape: FlowShape,
    tile: FlowTile | ResidentTile,
) -> Tensor:
    """``x`` [n, D] in float32: rows ``row_offset`` to ``row_offset + n`` of the sample.

    The context has one row for each of them.
    """
    x = torch.empty((n, shape.features), dtype=torch.float32, device=log_scale.device)
    if n == 0:
        return x
    context = _numbers(context)
    if isinstance(tile, ResidentTile):
        flow_resident.run(
            n, None, context, packed, log_scale, shape, tile, True, x, None, row_offset, seed
        )
        return x
    with on_device(x):
        flow_sample_kernel[(ceil_div(n, tile.rows),)](
            context, *packed, dense(log_scale), x, n, *_depth(shape), row_offset, seed,
            *_strides(context), PRIOR=shape.prior, **_constants(context, shape, tile),
        )  # fmt: skip
    return x


def _numbers(context: Tensor | None) -> Tensor | None:
    """The context with its numbers in memory as they are, not with the opposite sign."""
    return None if context is None else context.resolve_neg()


def _depth(shape: FlowShape) -> tuple[int, int]:
    return shape.couplings, len(shape.hidden)


def _strides(context: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if context is None else context.stride()


def _constants(context: Tensor | None, shape: FlowShape, tile: FlowTile) -> dict[str, object]:
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    return FUSED | limit | {
        "D": shape.features, "C": shape.context,
        "C_DENSE": context is not None and is_dense(context), "ACTIVATION": shape.activation,
        "PRODUCTS": tile.products, "PARTS": PARTS[tile.products],
        "PRECISE": tile.products not in ("bf16", "tf32"), "ROWS": tile.rows,
        "DP": tile.features, "HP": tile.hidden, "STAGES": tile.stages, "CARRIES": tile.carries,
        "num_warps": tile.warps,
    }  # fmt: skip
