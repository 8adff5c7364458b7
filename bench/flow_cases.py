"""Every way a whole-flow kernel is compiled: kernel, tile, variant and architecture.

The numbers of couplings and layers are no constants of the kernels that load weights for each tile
of rows, so one compilation stands for flows of any depth. Of those whose weights stay on the chip
the deepest flow is compiled, which needs the most.

The default is a covering set: every tile that :func:`flow_tile` can return on every architecture,
the kernels in turn and the variants by chance. ``full`` takes the whole product.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from nicefast.kernels import flow, flow_resident
from nicefast.kernels.flow_tile import (
    ACTIVATIONS,
    FEATURES,
    HIDDEN,
    PARTS,
    PRECISIONS,
    PRIORS,
    RESIDENT_CONTEXT,
    RESIDENT_COUPLINGS,
    RESIDENT_LAYERS,
    RESIDENT_SIDE,
    FlowShape,
    FlowTile,
    ResidentTile,
    Side,
    flow_tile,
)
from nicefast.kernels.tile import Tile

from .cases import ROWS, Case
from .launches import TARGETS, Recorder, specialise, tensor

# what a matrix instruction is called in the assembly; any of them will do
PRODUCTS = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), ("mma.sync",)),
    "sm_90": ("wgmma.mma_async",),
    **dict.fromkeys(("sm_100", "sm_103"), ("tcgen05.mma", "mma.sync")),
    "gfx942": ("v_mfma",),
}
DOTS = {"bf16": 1, "tf32": 1, "tf32x3": 3, "ieee": 1}  # for one product
DENSE = ("dense", "strided")  # 16-byte accesses where D allows
_FLOW: dict[str, tuple[Any, ...]] = {
    "activation": ACTIVATIONS,
    "prior": PRIORS,
    "context": (0, 3),
    "width": ("full", "odd"),
    "rows": ROWS,
    "layout": ("dense", "ragged", "strided", "transposed"),
}
VARIANTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "flow_fwd_kernel": _FLOW | {"outputs": ("log_prob", "z", "both")},
    "flow_inv_kernel": _FLOW,
    "flow_sample_kernel": _FLOW,
    "resident_kernel": {k: vs for k, vs in _FLOW.items() if k != "context"}
    | {
        "call": ("log_prob", "z", "both", "inverse", "sample"),
        "sides": ("half", "alternating", "random"),
    },
}
KERNELS = tuple(VARIANTS)
MASKED = KERNELS[:-1]


@dataclasses.dataclass(frozen=True)
class FlowCase(Case):
    """A case with matrix products."""

    flow: FlowTile | ResidentTile = None  # type: ignore[assignment]
    instructions: tuple[str, ...] = ()
    least_products: int = 0

    @property
    def name(self) -> str:
        variant = " ".join(f"{k}={v}" for k, v in self.variant)
        t = self.flow
        columns = f"{t.features}" if isinstance(t, FlowTile) else f"2*{t.half}+{t.context}"
        size = f"{t.rows}x{columns}x{t.hidden} {t.products} width={self.width}"
        return f"{self.kernel} {self.arch} {self.dtype} {size} {variant}"


@functools.cache
def flow_tiles(arch: str) -> list[tuple[str, FlowTile]]:
    """Every precision and tile that can be launched, but those of :func:`resident_tiles`."""
    found = []
    for precision, d, h in itertools.product(PRECISIONS, FEATURES, HIDDEN):
        tile = flow_tile(FlowShape(d, 0, (h,), 1, "relu", "logistic"), precision, arch)
        if not isinstance(tile, str):
            found.append((precision, tile))
    return found


@functools.cache
def resident_tiles(arch: str) -> list[tuple[str, ResidentTile]]:
    """Every precision and tile of flows whose weights stay on the chip."""
    found = []
    for precision, h, c in itertools.product(PRECISIONS, HIDDEN, (0, RESIDENT_CONTEXT)):
        shape = resident_shape(2 * RESIDENT_SIDE, c, h, 1, "relu", "logistic", "half")
        tile = flow_tile(shape, precision, arch)
        if isinstance(tile, ResidentTile):
            found.append((precision, tile))
    return found


def resident_shape(
    d: int, c: int, hidden: int, couplings: int, activation: str, prior: str, sides: str
) -> FlowShape:
    """A shape whose couplings read either side in turn."""
    step = {"half": 1, "alternating": 2, "random": 0}[sides]
    first, second = d - d // 2, {"half": d - d // 2, "alternating": 1, "random": 0}[sides]
    both = Side(first, 0, step), Side(d // 2, second, step)
    layers = (hidden,) * RESIDENT_LAYERS
    reads = tuple(i % 2 for i in range(couplings))
    return FlowShape(d, c, layers, couplings, activation, prior, both, reads)


def flow_cases(
    full: bool = False, archs: Iterable[str] = TARGETS, kernels: Iterable[str] = KERNELS
) -> Iterator[FlowCase]:
    """The covering set, or the full product of kernel, tile, variant and architecture."""
    kernels = list(kernels)
    for arch in TARGETS:
        todo = [
            (precision, tile, kernel)
            for turn, (precision, tile) in enumerate(flow_tiles(arch))
            for kernel in (MASKED if full else [MASKED[turn % len(MASKED)]])
        ]
        for precision, tile, kernel in [
            *todo, *((*found, "resident_kernel") for found in resident_tiles(arch))
        ]:  # fmt: skip
            if arch in archs and kernel in kernels:
                flags = VARIANTS[kernel]
                hands = itertools.product(*flags.values())
                if not full:
                    chance = random.Random(f"{arch} {precision} {tile}")
                    hands = iter([tuple(chance.choice(v) for v in flags.values())])
                make = resident_case if kernel == "resident_kernel" else flow_case
                for hand in hands:
                    variant = dict(zip(flags, hand, strict=True))
                    yield make(kernel, arch, precision, tile, variant)


def flow_case(
    kernel: str, arch: str, precision: str, tile: FlowTile, v: dict[str, Any]
) -> FlowCase:
    """Call the launcher on meta tensors and describe what Triton would compile."""
    c, layout, couplings, layers = v["context"], v["layout"], 2, 2
    d = tile.features - c if v["width"] == "full" else tile.features // 2 + 1
    shape = FlowShape(d, c, (tile.hidden,) * layers, couplings, v["activation"], v["prior"])
    n, dp, hp, parts = v["rows"], tile.features, tile.hidden, PARTS[tile.products]
    work = torch.bfloat16 if tile.products == "bf16" else torch.float32
    empty = functools.partial(torch.empty, dtype=torch.float32, device="meta")
    packed = (
        empty(couplings, parts, hp, dp, dtype=work),
        empty(couplings * (layers - 1), parts, hp, hp, dtype=work),
        empty(couplings, parts, dp, hp, dtype=work),
        empty(couplings, layers * hp + dp),
        empty(couplings, dp, dtype=torch.int32),
    )
    x = tensor(n, d, torch.float32, layout)
    context = tensor(n, c, torch.float32, layout) if c else None
    with mock.patch.object(flow, kernel, Recorder()) as recorder:
        if kernel == "flow_fwd_kernel":
            outputs = v["outputs"]
            flow.flow_fwd(
                x, context, packed, empty(d), shape, tile, outputs != "log_prob", outputs != "z"
            )
        elif kernel == "flow_inv_kernel":
            flow.flow_inv(x, context, packed, empty(d), shape, tile)
        else:
            flow.flow_sample(n, 77, 1234567, context, packed, empty(d), shape, tile)
    threads = 16 * tile.warps * TARGETS[arch].warp_size
    weights = [dp * hp, dp * hp] + [hp * hp] * (tile.stages == 1)  # else copied asynchronously
    loads, stores = sum(parts * (w * work.itemsize // threads) for w in weights), 0
    if d % 4 == 0 and layout in DENSE:
        loads += (kernel != "flow_sample_kernel") * tile.rows * dp * 4 // threads
        stores += (v.get("outputs") != "log_prob") * tile.rows * dp * 4 // threads
    return FlowCase(
        kernel, arch, precision, d, Tile(tile.rows, dp, tile.warps), tuple(v.items()),
        *specialise(kernel, arch, recorder.args, recorder.kwargs), loads, stores,
        flow=tile, instructions=PRODUCTS[arch],
        least_products=3 * DOTS[tile.products],
    )  # fmt: skip


def resident_case(
    kernel: str, arch: str, precision: str, tile: ResidentTile, v: dict[str, Any]
) -> FlowCase:
    """The same of a flow whose weights stay on the chip."""
    d = 2 * tile.half - (v["width"] == "odd")
    c = tile.context - (v["width"] == "odd" and tile.context > 0)
    shape = resident_shape(
        d, c, tile.hidden, RESIDENT_COUPLINGS, v["activation"], v["prior"], v["sides"]
    )
    n, half, hp = v["rows"], tile.half, tile.hidden
    weights = [hp * size for size in (half, tile.context, *(RESIDENT_LAYERS - 1) * (hp,), half)]
    work = torch.bfloat16 if tile.products == "bf16" else torch.float32
    empty = functools.partial(torch.empty, dtype=torch.float32, device="meta")
    packed = (
        empty(shape.couplings * sum(weights), dtype=work),
        empty(shape.couplings * (RESIDENT_LAYERS * hp + half)),
        empty(2, half, dtype=torch.int32),
    )
    x = tensor(n, d, torch.float32, v["layout"])
    context = tensor(n, c, torch.float32, v["layout"]) if c else None
    rest = context, packed, empty(d), shape, tile
    with mock.patch.object(flow_resident, kernel, Recorder()) as recorder:
        if v["call"] == "inverse":
            flow.flow_inv(x, *rest)
        elif v["call"] == "sample":
            flow.flow_sample(n, 77, 1234567, *rest)
        else:
            flow.flow_fwd(x, *rest, v["call"] != "log_prob", v["call"] != "z")
    threads = 16 * tile.warps * TARGETS[arch].warp_size
    return FlowCase(
        kernel, arch, precision, d, Tile(tile.rows, half, tile.warps), tuple(v.items()),
        *specialise(kernel, arch, recorder.args, recorder.kwargs),
        shape.couplings * sum(w * work.itemsize // threads for w in weights), 0,
        flow=tile, instructions=PRODUCTS[arch],
        least_products=shape.couplings * (RESIDENT_LAYERS + 1),
    )  # fmt: skip
