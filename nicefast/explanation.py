"""What :meth:`nicefast.NICE.explain` says of a path, for people."""

from __future__ import annotations

import torch

from . import backend
from .fused.blockwise import cut
from .fused.sideways import SidewaysFlow
from .path import KERNEL_PRECISION, Path
from .precision import matmul_precision
from .roofline import DEVICES, ceilings, layers_work


def explanation(path: Path, recorded: Path, rows: int, features: int, device: torch.device) -> str:
    """Path, tile or blocks, precision, products, bytes, and the least time of ``rows`` rows; what
    is ``recorded`` with gradients; and what single operations run on."""
    elementwise = f"element-wise operations: {backend.describe(device)}"
    if path.chain is None:
        return f"{path.name}: {path.reason}\n{elementwise}"
    chain = path.chain
    operands = "bfloat16" if chain.bfloat16 else "float32"
    widths = [(w[0][0].shape[1], *(b.shape[0] for _, b in w)) for w in chain.couplings]
    work = layers_work(rows, features, widths, "log_prob", chain.context)
    precision = matmul_precision(device)
    measured = ceilings(device, chain.bfloat16, precision)
    kind = "bf16" if chain.bfloat16 else KERNEL_PRECISION[precision]
    if path.whole is not None:
        kind = path.whole.tile.products
    if kind == "tf32x3":
        # three products of TF32, each at half the rate of bfloat16
        sixth = ceilings(device, True, precision).flops / 6
        measured = measured._replace(flops=max(measured.flops, sixth))
    elsewhere = ", ".join(
        f"{name} {published.ceilings(kind).seconds(*work) * 1e3:.3g} ms"
        for name, published in DEVICES.items()
    )
    assert recorded.chain is not None  # gradients change how, not whether
    kept = "rebuilds" if recorded.chain.rebuild else "keeps"
    at_once = ", or goes with the forward pass" if isinstance(recorded.fused, SidewaysFlow) else ""
    return "\n".join(
        (
            f"{path.name}: {path.reason}",
            _pieces(path, rows, device),
            f"{chain.products} products, {operands} operands, float32 sums and stream, "
            f"float32 matmul precision '{precision}'",
            f"log_prob: {work.flops:,} flop of products, {work.bytes:,} bytes (x and parameters "
            f"in, log_prob out): at least {measured.seconds(*work) * 1e3:.3g} ms here, by "
            f"{measured.flops / 1e9:.3g} GFLOP/s and {measured.bytes / 1e9:.3g} GB/s, measured",
            f"at least, by published rates of {kind} products: {elsewhere}",
            f"with gradients: {_pieces(recorded, rows, device)}; the backward pass {kept} "
            f"activations ({chain.hidden} hidden units at most){at_once}",
            elementwise,
        )
    )


def _pieces(path: Path, rows: int, device: torch.device) -> str:
    """Tile or blocks."""
    if path.fused is not None:
        return path.fused.pieces(rows)
    assert path.chain is not None
    return cut(path.chain, rows, device).describe()
