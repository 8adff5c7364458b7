"""Matrix products inside kernels, with a weight tile from memory and a bias.

bf16      operands rounded to bfloat16        tf32x3   three of TF32, accurate as float32
tf32      operands rounded to TF32            ieee     float32
"""

import triton
import triton.language as tl


@triton.jit
def operand(b_a, PRODUCTS: tl.constexpr):
    """At once, not before its product: a value that waits takes half as many registers."""
    if PRODUCTS == "bf16":
        b_a = b_a.to(tl.bfloat16)
    return b_a


@triton.jit
def to_tf32(b_a):
    """Rounded to the 11 significant bits of TF32 (NaN may become anything)."""
    return ((b_a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def weight(p_w, i_w, OUT: tl.constexpr, IN: tl.constexpr):
    """The weight [OUT, IN] number i_w, transposed."""
    # the number is in the offset, not in the pointer: no address is kept across a loop
    o_w = tl.arange(0, IN)[:, None] + (i_w * OUT + tl.arange(0, OUT)[None, :]) * IN
    return tl.load(p_w + o_w)


@triton.jit
def times(b_a, b_w, b_p, PRODUCTS: tl.constexpr):
    """``b_p`` and the operand times a transposed weight of one part."""
    if PRODUCTS == "tf32":
        # the hardware would cut off what is too much, always towards 0
        b_a = tl.where(b_a == b_a, to_tf32(b_a), b_a)
    else:
        tl.static_assert(PRODUCTS == "bf16")
    return tl.dot(b_a, b_w, b_p, input_precision="tf32")


@triton.jit
def linear(
    b_a,  # [ROWS, IN]
    p_w,  # [..., OUT, IN]
    i_w,
    p_b,  # [OUT]
    PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """Operand times transposed weight, plus bias, accumulated in float32.

    Three products of TF32 halves are as accurate as float32: what is left out is below its last
    bit.
    """
    b_w = weight(p_w, i_w, OUT, IN)
    b_p = tl.zeros((ROWS, OUT), dtype=tl.float32)
    if PRODUCTS == "bf16" or PRODUCTS == "tf32":
        b_p = times(b_a, b_w, b_p, PRODUCTS)
    elif PRODUCTS == "tf32x3":
        b_high = to_tf32(b_a)
        b_p = tl.dot(b_a - b_high, b_w, b_p, input_precision="tf32")
        b_p = tl.dot(b_high, weight(p_w, i_w + 1, OUT, IN), b_p, input_precision="tf32")
        b_p = tl.dot(b_high, b_w, b_p, input_precision="tf32")
    else:
        tl.static_assert(PRODUCTS == "ieee")
        b_p = tl.dot(b_a, b_w, b_p, input_precision="ieee")
    # minus its negative: the compiler turns a sum into an accumulator that starts as the bias,
    # which is then alive while the last accumulator still is
    return b_p - tl.load(p_b + tl.arange(0, OUT))[None, :]
