"""The least time in which a flow can be computed: what a call has to do, what a device can do.

:func:`layers_work` counts a call's work from shapes alone; the ceilings of a device are measured by
:func:`ceilings`, or published, in :data:`DEVICES`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

DIRECTIONS = ("log_prob", "forward", "inverse", "sample", "training")
PRECISIONS = ("bf16", "tf32", "tf32x3", "fp32")  # of products, as the kernels name them


class Ceilings(NamedTuple):
    """Floating-point operations a second of products, bytes a second of a copy (read + written)."""

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The larger of the two times: no implementation is faster."""
        return max(flops / self.flops, moved / self.bytes)


class Work(NamedTuple):
    """Operations of matrix products (a multiply-add is 2), and bytes to and from memory.

    In the order in which :meth:`Ceilings.seconds` takes them: ``ceilings.seconds(*work)``.
    """

    flops: float
    bytes: float


class Published(NamedTuple):
    """What a vendor publishes of a device: peak rates, dense (no sparsity counted).

    Attributes:
        bf16, tf32: operations a second of matrix units, float32 sums.
        fp32: operations a second in float32 outside of matrix units.
        bytes: bytes a second of device memory.
        host: bytes a second from the host over PCIe x16, in one direction.
    """

    bf16: float
    tf32: float
    fp32: float
    bytes: float
    host: float

    def ceilings(self, precision: str) -> Ceilings:
        """Of products in ``precision``: bf16, tf32, tf32x3 or fp32; ValueError for another.

        tf32x3 is float32 made of three TF32 products, for which fp32 is no ceiling.

        >>> from nicefast.roofline import DEVICES
        >>> DEVICES["A100 80GB SXM"].ceilings("tf32x3").flops
        52000000000000.0
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        flops = {"bf16": self.bf16, "tf32": self.tf32, "tf32x3": self.tf32 / 3, "fp32": self.fp32}
        return Ceilings(flops[precision], self.bytes)


_GEN4, _GEN5 = 32e9, 64e9  # 16 lanes of 16 and 32 GT/s, the encoding not taken off

# Published, dense. Where a sheet gives a rate with sparsity alone, half of it stands here.
DEVICES: dict[str, Published] = {
    # NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM
    "A100 80GB SXM": Published(312e12, 156e12, 19.5e12, 2.039e12, _GEN4),
    # NVIDIA H100 Tensor Core GPU architecture whitepaper, H100 SXM5; memory from the datasheet
    "H100 SXM": Published(989.4e12, 494.7e12, 66.9e12, 3.35e12, _GEN5),
    # NVIDIA H200 Tensor Core GPU datasheet: the same rates, rounded there, and other memory
    "H200": Published(989.4e12, 494.7e12, 66.9e12, 4.8e12, _GEN5),
    # NVIDIA HGX B200 specifications, an eighth of the 8 GPUs; memory from the DGX B200 datasheet
    "B200": Published(2250e12, 1125e12, 75e12, 8e12, _GEN5),
    # AMD Instinct MI300X accelerator data sheet, fp32 as its vector rate
    "MI300X": Published(1307.4e12, 653.7e12, 163.4e12, 5.3e12, _GEN5),
}


def layers_work(
    rows: int, features: int, widths: Sequence[Sequence[int]], direction: str, context: int = 0
) -> Work:
    """The products, and the least bytes, of one call of a :class:`nicefast.NICE`.

    ``widths`` are those of each coupling's layers, from the conditioning features and the context
    to the shifted features. All numbers in memory are float32. Bytes are those that no fusion
    saves, of N rows, D features, K of context and P parameters (log_scale among them):

        log_prob           4 N (D + K) + 4 N + 4 P    x and context read, log_prob written
        forward, inverse   8 N D + 4 N K + 4 P        rows and context read, rows written
        sample             4 N D + 4 N K + 4 P        context read, rows written
        training           8 N (D + K) + 4 N + 12 P   x and context read in the forward and once
                           more in the backward pass, log_prob written, parameters read in
                           both, their gradients written once

    Training is a log_prob and its gradient with respect to the parameters: each product once
    forwards and twice backwards, but none for the gradients of x (the first product's input) and
    of the context, which nobody needs. Nothing is computed twice, activations stay on the chip,
    and the optimizer is not counted; neither is anything element-wise.

    ValueError for another direction.

    >>> from nicefast.roofline import layers_work
    >>> layers_work(10, 4, [(2, 3, 2), (2, 3, 2)], "log_prob")
    Work(flops=480, bytes=352)
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    weights, unneeded, parameters = 0, 0, features
    for i, own in enumerate(widths):
        weights += sum(a * b for a, b in itertools.pairwise(own))
        parameters += sum(own[1:])
        unneeded += (context if i else own[0]) * own[1]
    parameters += weights
    flops = 2 * rows * weights
    if direction == "training":
        flops = 3 * flops - 2 * rows * unneeded
    n_x, n_context = 4 * rows * features, 4 * rows * context
    moved = {
        "log_prob": n_x + n_context + 4 * rows + 4 * parameters,
        "forward": 2 * n_x + n_context + 4 * parameters,
        "inverse": 2 * n_x + n_context + 4 * parameters,
        "sample": n_x + n_context + 4 * parameters,
        "training": 2 * (n_x + n_context) + 4 * rows + 12 * parameters,
    }
    return Work(flops, moved[direction])


def product_calls(
    dtype: torch.dtype, size: int, device: torch.device
) -> tuple[dict[str, Callable[[], object]], int]:
    """A product of two square matrices by each library that PyTorch has for it, and the
    floating-point operations of one: on the CPU, ``torch.mm`` may be slower than oneDNN.

    >>> import torch
    >>> from nicefast.roofline import product_calls
    >>> calls, operations = product_calls(torch.float32, 8, torch.device("cpu"))
    >>> "torch.mm" in calls, operations
    (True, 1024)
    """
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls: dict[str, Callable[[], object]] = {"torch.mm": lambda: torch.mm(a, b, out=out)}
    onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not in every build
    serves = device.type == "cpu" and onednn is not None
    if serves and dtype == torch.bfloat16:  # an error on processors without AVX-512
        serves = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if serves:
        packed = torch.ops.mkldnn._reorder_linear_weight(b.t().contiguous(), size)
        calls["oneDNN"] = lambda: onednn(a, packed, None, "none", [], "")
    return calls, 2 * size**3


@cache
def ceilings(device: torch.device, bfloat16: bool, matmul_precision: str) -> Ceilings:
    """Measured once (a tenth of a second) for each device and precision of products, by the
    fastest library of :func:`product_calls`.

    ``matmul_precision`` is that in force, ``torch.get_float32_matmul_precision()``.

    >>> import torch
    >>> from nicefast.roofline import ceilings
    >>> ceilings(torch.device("cpu"), False, "highest").flops > 1e9
    True
    """
    size = 1024 if device.type == "cpu" else 4096
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        calls, operations = product_calls(dtype, size, device)
        flops = operations / min(_best(call, device) for call in calls.values())
        numbers = 1 << (24 if device.type == "cpu" else 26)
        source = torch.randn(numbers, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        moved = 2 * source.numel() * 4 / _best(lambda: target.copy_(source), device)
    return Ceilings(flops, moved)


LONG = 0.25  # seconds of a call that is made once: bfloat16 on a processor without it


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of four calls, after one to warm up; of one call that takes long."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
        if times[-1] > LONG:
            break
    return min(times[1:] or times)
