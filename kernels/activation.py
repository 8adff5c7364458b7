"""The conditioners' activations inside kernels.

    relu        max(h, 0)                   gelu    h (1 + erf(h / sqrt 2)) / 2
    leaky_relu  max(h, h / 100)             silu    h / (1 + exp(-h))
    tanh        tanh(h)                     elu     h where h > 0, else exp(h) - 1

NaN gives NaN, and 0 gives 0, so that padded units stay 0. The precise forms keep the relative
precision near 0 that float32 has and that the operands of lower precisions do not; the others are
within 1e-6 and take fewer registers and instructions.
"""

import triton
import triton.language as tl


@triton.jit
def relu(h):
    return tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def leaky_relu(h):
    return tl.maximum(h, 0.01 * h)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, near 0 by Taylor's series."""
    t = 2.48015873e-05 * x + 1.98412698e-04
    t = t * x + 1.38888889e-03
    t = t * x + 8.33333333e-03
    t = t * x + 4.16666667e-02
    t = t * x + 1.66666667e-01
    t = t * x + 0.5
    return tl.where(x > -0.5, (t * x) * x + x, tl.exp(x) - 1.0)


@triton.jit
def _reciprocal(x):
    """1 / x for x > 0, to about 2^-21: two instructions, where a division takes ten."""
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def tanh(h):
    e = tl.exp(-2.0 * tl.abs(h))
    t = (e - 1.0) * _reciprocal(1.0 + e)
    return tl.where(h < 0.0, t, -t)


@triton.jit
def tanh_precise(h):
    e = _expm1(-2.0 * tl.abs(h))
    t = e / (2.0 + e)
    return tl.where(h < 0.0, t, -t)


@triton.jit
def gelu(h):
    """With erf within 2e-7 (Abramowitz and Stegun 7.1.26)."""
    x = 0.7071067811865476 * tl.abs(h)
    t = _reciprocal(1.0 + 0.3275911 * x)
    y = 1.061405429 * t - 1.453152027
    y = y * t + 1.421413741
    y = y * t - 0.284496736
    y = y * t + 0.254829592
    y = y * t * tl.exp(-x * x)  # 1 - erf(x)
    return 0.5 * h * tl.where(h < 0.0, y, 2.0 - y)


@triton.jit
def gelu_precise(h):
    return 0.5 * h * (1.0 + tl.erf(0.7071067811865476 * h))


@triton.jit
def silu(h):
    return 0.5 * h - 0.5 * h * tanh(-0.5 * h)


@triton.jit
def silu_precise(h):
    return h / (1.0 + tl.exp(-h))


@triton.jit
def elu(h):
    return tl.where(h > 0.0, h, tl.exp(h) - 1.0)


@triton.jit
def elu_precise(h):
    return tl.where(h > 0.0, h, _expm1(h))


@triton.jit
def activate(b_h, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr):
    if ACTIVATION == "relu":
        b_a = relu(b_h)
    elif ACTIVATION == "leaky_relu":
        b_a = leaky_relu(b_h)
    elif ACTIVATION == "tanh":
        b_a = tanh_precise(b_h) if PRECISE else tanh(b_h)
    elif ACTIVATION == "gelu":
        b_a = gelu_precise(b_h) if PRECISE else gelu(b_h)
    elif ACTIVATION == "silu":
        b_a = silu_precise(b_h) if PRECISE else silu(b_h)
    else:
        tl.static_assert(ACTIVATION == "elu")
        b_a = elu_precise(b_h) if PRECISE else elu(b_h)
    return b_a
