"""What :meth:`nicefast.NICE.explain` says of a plan, for people."""

from __future__ import annotations

import torch

from ..roofline import DEVICES, ceilings, layers_work
from ..runtime import backend
from ..runtime.precision import matmul_precision
from .exact import ExactEngine
from .plan import KERNEL_PRECISION, Plan


def explanation(
    plan: Plan, rows: int, features: int, device: torch.device, frozen: bool = False
) -> str:
    """Engine, tile or blocks, precision, products, bytes, and the least time of ``rows`` rows; what
    the gradient does; and what single operations run on."""
    first = f"{plan.name}: {plan.reason}" + ("; frozen" if frozen else "")
    elementwise = f"element-wise operations: {backend.describe(device)}"
    engine = plan.engine
    if engine is None or isinstance(engine, ExactEngine):
        return f"{first}\n{elementwise}"
    stack = engine.stack
    bfloat16 = stack.dtype == torch.bfloat16
    operands = "bfloat16" if bfloat16 else "float32"
    widths = [(w[0][0].shape[1], *(b.shape[0] for _, b in w)) for w in stack.couplings]
    work = layers_work(rows, features, widths, "log_prob", stack.context)
    precision = matmul_precision(device)
    measured = ceilings(device, bfloat16, precision)
    kind = "bf16" if bfloat16 else KERNEL_PRECISION[precision]
    tile = getattr(engine, "tile", None)  # of the kernel engine, captured or not
    if tile is not None:
        kind = "fp32" if tile.products == "ieee" else tile.products
    if kind == "tf32x3":
        # three products of TF32, each at half the rate of bfloat16
        sixth = ceilings(device, True, precision).flops / 6
        measured = measured._replace(flops=max(measured.flops, sixth))
    elsewhere = ", ".join(
        f"{name} {published.ceilings(kind).seconds(*work) * 1e3:.3g} ms"
        for name, published in DEVICES.items()
    )
    lines = [
        first,
        engine.describe(rows),
        f"{stack.products} products, {operands} operands, float32 sums and stream, "
        f"float32 matmul precision '{precision}'",
        f"log_prob: {work.flops:,} flop of products, {work.bytes:,} bytes (x and parameters "
        f"in, log_prob out): at least {measured.seconds(*work) * 1e3:.3g} ms here, by "
        f"{measured.flops / 1e9:.3g} GFLOP/s and {measured.bytes / 1e9:.3g} GB/s, measured",
        f"at least, by published rates of {kind} products: {elsewhere}",
    ]
    if not frozen:
        kept = rows * stack.residual_bytes / 2**20
        how = "saves" if engine.saves(rows) else "recomputes"
        lines.append(f"with gradients: the engine {how} {kept:,.0f} MiB of residuals")
    return "\n".join([*lines, elementwise])
