"""Every way a kernel is compiled: kernel, tile, dtype, variant and architecture.

A case is a call of the shipped launcher on meta tensors: the launcher chooses the tile, and Triton
itself says how the arguments specialise. Nothing is compiled here, and no GPU is needed.

The default is a covering set: every kernel with every tile :func:`tile` can return, every dtype
and every architecture, the variants of a kernel dealt over them like a deck of cards. ``full``
takes the whole product.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from nicefast.kernels import coupling, dequantise, flow, likelihood, sampling, sides
from nicefast.kernels.tile import Tile, tile
from nicefast.partition import Partition

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
LEVELS = {t: getattr(torch, t) for t in ("uint8", "int16", "int32", "int64")}
WIDTHS = range(1, 100_001)

FLAG = (False, True)
SIDE = ("half", "~half", "alternating", "~alternating", "random")
NARROWER = ("same", "bf16", "fp32")  # dtype of the other operand, where it is allowed
OTHER = (*NARROWER, "fp64")
ROWS = (1_000_000, 1000)  # tensors beyond and below 2 GiB, which AMD's back end tells apart
PRIOR = ("logistic", "normal")
WIDE_LAYOUTS = ("dense", "strided")
NARROW_LAYOUTS = ("dense", "ragged", "offset", "transposed", "expanded")
BIASES = ("none", "first", "second", "both")

_COUPLE: dict[str, tuple[Any, ...]] = {
    "side": SIDE,
    "bias": FLAG,
    "inverse": FLAG,
    "partner": NARROWER,
    "shift": WIDE_LAYOUTS,
    "rows": ROWS,
}
_SCALE: dict[str, tuple[Any, ...]] = {
    "prior": PRIOR,
    "with_z": FLAG,
    "partner": OTHER,
    "rows": ROWS,
}
VARIANTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "couple_kernel": _COUPLE,
    "couple_inplace_kernel": _COUPLE,
    "select_kernel": {
        "side": SIDE,
        "negate": FLAG,
        "column_sums": FLAG,
        "partner": NARROWER,
        "rows": ROWS,
    },
    "scale_log_prob_fwd_kernel": _SCALE,
    "scale_log_prob_bwd_kernel": _SCALE | {"grad_log_prob": ("dense", "expanded")},
    "sample_fwd_kernel": {"prior": PRIOR, "partner": OTHER, "rows": ROWS, "row_offset": (0, 77)},
    "sample_bwd_kernel": {"rows": ROWS},
    "dequantise_kernel": {
        "k": (2, 17, 256, 65536, None),
        "rows": ROWS,
        "row_offset": (0, 77),
    },
    "enter_kernel": {
        "sides": SIDE,
        "biases": BIASES,
        "scaled": FLAG,
        "inverse": FLAG,
        "rows": ROWS,
    },
    "add_kernel": {"biases": BIASES[1:], "inverse": FLAG, "rows": ROWS},
    "leave_kernel": {
        "sides": SIDE,
        "biases": BIASES,
        "outputs": ("log_prob", "z", "both", "coupled"),
        "prior": PRIOR,
        "inverse": FLAG,
        "rows": ROWS,
    },
}
KERNELS = tuple(VARIANTS)
# whose input is what another one has made, or none
DENSE_ALONE = ("sample_fwd_kernel", "add_kernel", "leave_kernel")
# these spilled: gathers of 2-byte types need the most registers (sampled from the full product)
SPILLED = (
    ("couple_inplace_kernel", "sm_80", "fp16", 8, "random True False same strided 1000000 ragged"),
    ("couple_inplace_kernel", "sm_80", "fp16", 136, "random True True same dense 1000 ragged"),
    ("couple_inplace_kernel", "sm_100", "bf16", 79489, "random False True same dense 1000 strided"),
    ("select_kernel", "sm_90", "fp16", 640, "random True True same 1000000 ragged"),
    ("select_kernel", "sm_100", "bf16", 184, "~alternating True True same 1000000 transposed"),
)
_MODULES = {
    "couple": coupling,
    "select": coupling,
    "scale": likelihood,
    "sample": sampling,
    "dequantise": dequantise,
    "flow": flow,
    "enter": sides,
    "add": sides,
    "leave": sides,
}

_OF_BOTH_SIDES = ("couple_kernel", "enter_kernel", "add_kernel", "leave_kernel")

# one access of a kernel: "load" or "store", the tensor, first feature touched, how many
Access = tuple[str, Tensor, int, int]


@dataclass(frozen=True)
class Case:
    """One compilation, and how many 128-bit global accesses it has to contain at least."""

    kernel: str
    arch: str
    dtype: str
    width: int  # D, or the size of the side that the kernel touches
    tile: Tile  # as launched
    variant: tuple[tuple[str, Any], ...]
    signature: tuple[tuple[str, str], ...] = field(repr=False)
    constexprs: tuple[tuple[str, Any], ...] = field(repr=False)
    attrs: tuple[tuple[int, tuple[tuple[str, int], ...]], ...] = field(repr=False)
    options: tuple[tuple[str, Any], ...] = field(repr=False)
    wide_loads: int
    wide_stores: int

    @property
    def name(self) -> str:
        variant = " ".join(f"{k}={v}" for k, v in self.variant)
        size = f"{self.tile.rows}x{self.tile.columns} width={self.width}"
        return f"{self.kernel} {self.arch} {self.dtype} {size} {variant}"


def dtypes_of(kernel: str) -> dict[str, torch.dtype]:
    """Those of the tensors that a kernel reads."""
    if _MODULES[kernel.partition("_")[0]] is sides:
        return {"fp32": torch.float32}
    return LEVELS if kernel == "dequantise_kernel" else DTYPES


def output(dtype: torch.dtype) -> torch.dtype:
    """What a kernel makes of ``dtype``: float32 of levels, and otherwise the same."""
    return dtype if dtype.is_floating_point else torch.float32


@functools.cache
def tile_widths(itemsize: int) -> dict[Tile, tuple[list[int], list[int]]]:
    """Every tile that can be launched, with the widths that get it: those that are multiples of 16
    bytes, and those that are odd (where there are none of a kind, all)."""
    widths: dict[Tile, list[int]] = {}
    for width in WIDTHS:
        widths.setdefault(tile(width, itemsize), []).append(width)
    return {
        t: ([w for w in own if w * itemsize % 16 == 0] or own, [w for w in own if w % 2] or own)
        for t, own in widths.items()
    }


def cases(
    full: bool = False, archs: Iterable[str] = TARGETS, kernels: Iterable[str] = KERNELS
) -> Iterator[Case]:
    """The covering set, or the full product of kernel, tile, dtype, variant and architecture."""
    for kernel in kernels:
        wide = _deck(VARIANTS[kernel], WIDE_LAYOUTS)
        narrow = _deck(VARIANTS[kernel], NARROW_LAYOUTS)
        random.Random(0).shuffle(wide)  # or a tile has one layout on every architecture
        wide_deal, narrow_deal = itertools.cycle(wide), itertools.cycle(narrow)
        seen, turn = set(), 0
        for name, arch, dtype, width, text in SPILLED:
            if name == kernel and arch in archs:
                case = _case(kernel, arch, dtype, width, _parse(kernel, text))
                seen.add(case.name)
                yield case
        for (position, arch), (dtype, real) in itertools.product(
            enumerate(TARGETS), dtypes_of(kernel).items()
        ):
            for t, (aligned, odd) in tile_widths(output(real).itemsize).items():
                turn += 1
                hand = [(v, aligned) for v in (wide if full else [next(wide_deal)])]
                # dear, and asked for less: each tile on one architecture
                if full or (turn + position) % len(TARGETS) == 0:
                    dealt = narrow if full else [next(narrow_deal)]
                    hand += [(v, odd if v["layout"] == "dense" else aligned) for v in dealt]
                for variant, choice in hand:
                    # smallest, middle and largest width in turn, and the one without padding
                    pick = (turn + turn // 4) % 4
                    width = choice[pick * (len(choice) - 1) // 3]
                    width = t.columns if pick == 1 and t.columns in choice else width
                    width = max(width, 2) if kernel in _OF_BOTH_SIDES else width
                    case = _case(kernel, arch, dtype, width, dict(variant))
                    if arch in archs and case.name not in seen:
                        seen.add(case.name)
                        yield case


def _parse(kernel: str, text: str) -> dict[str, Any]:
    flags = VARIANTS[kernel] | {"layout": NARROW_LAYOUTS + WIDE_LAYOUTS}
    return {
        flag: next(v for v in values if str(v) == word)
        for (flag, values), word in zip(flags.items(), text.split(), strict=True)
    }


def _deck(flags: dict[str, tuple[Any, ...]], layouts: tuple[str, ...]) -> list[dict[str, Any]]:
    """All variants, shuffled, but the layouts always in turn."""
    decks = [
        [
            dict(zip(flags, v, strict=True)) | {"layout": x}
            for v in itertools.product(*flags.values())
        ]
        for x in layouts
    ]
    for i, deck in enumerate(decks):
        random.Random(i).shuffle(deck)
    return [variant for hand in zip(*decks, strict=True) for variant in hand]


class Recorder:
    """Stands in for a kernel and remembers how it was launched."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __getitem__(self, grid: object) -> Any:
        return self._record

    def _record(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


def _case(kernel: str, arch: str, dtype: str, width: int, v: dict[str, Any]) -> Case:
    """Launch the kernel on meta tensors and describe what Triton would compile."""
    module = _MODULES[kernel.partition("_")[0]]
    with (
        mock.patch.object(module, kernel, Recorder()) as recorder,
        mock.patch("nicefast.kernels.tile.WARP_SIZE", TARGETS[arch].warp_size),
    ):
        accesses = _launch(kernel, (DTYPES | LEVELS)[dtype], width, v)
    k = recorder.kwargs
    t = Tile(k["ROWS"], k["COLS"] if "COLS" in k else 4 * k["QUADS"], k["num_warps"])
    threads = t.warps * TARGETS[arch].warp_size
    least = {"load": 0, "store": 0}
    for kind, x, first, count in accesses:
        # where the accessed part of a row begins, ends, and where the next row begins
        edges = (first, count, x.stride(0))
        aligned = v["layout"] in WIDE_LAYOUTS and all(e * x.itemsize % 16 == 0 for e in edges)
        if aligned and t.columns * x.itemsize >= 16:
            least[kind] += t.rows * t.columns * x.itemsize // (16 * threads)
    specialised = specialise(kernel, arch, recorder.args, recorder.kwargs)
    variant = tuple(v.items())
    return Case(kernel, arch, dtype, width, t, variant, *specialised, least["load"], least["store"])


def _launch(kernel: str, dtype: torch.dtype, width: int, v: dict[str, Any]) -> list[Access]:
    """Call the launcher and say what it accesses row by row.

    A variant that never reaches the kernel is replaced in ``v``.
    """
    n, layout, partner = v["rows"], v["layout"], DTYPES.get(v.get("partner", ""), dtype)
    # couplings, and z, are never narrower than what they are made of
    if "side" in v or v.get("with_z"):
        partner = partner if torch.promote_types(dtype, partner) == dtype else dtype
    if partner == dtype and "partner" in v:
        v["partner"] = "same"
    if kernel == "couple_inplace_kernel" and layout == "expanded":
        layout = v["layout"] = "dense"
    # the width is D, but one side's size for the two kernels that touch one side only
    d = 2 * width if kernel in {"couple_inplace_kernel", "select_kernel"} else width
    x, like_x = tensor(n, d, dtype, layout), tensor(n, d, dtype)
    if "side" in v:
        f = _features(v["side"], d)
        lanes = [x] if f.step == 1 else []  # the others are gathered, and narrow
        if kernel == "select_kernel":
            coupling.select(
                x, f.indices, f.start, f.step, f.size, v["negate"], v["column_sums"], partner
            )
            store: Access = ("store", tensor(n, f.size, partner), 0, f.size)
            return [store, *(("load", y, f.start, f.size) for y in lanes)]
        shift = tensor(n, f.size, partner, v["shift"])
        bias = tensor(1, f.size, dtype)[0] if v["bias"] else None
        launch = coupling.couple if kernel == "couple_kernel" else coupling.couple_
        launch(x, shift, bias, f.slots, f.indices, f.start, f.step, v["inverse"])
        if kernel == "couple_kernel":
            return [("load", x, 0, d), ("store", like_x, 0, d)]
        return [(kind, y, f.start, f.size) for y in lanes for kind in ("load", "store")]
    if kernel == "dequantise_kernel":
        dequantise.dequantise_fwd(x, v["k"], v["row_offset"], 1234567, 0.0, 1.0)
        # a thread has four features side by side: 128 bits where levels are as wide as that
        loads: list[Access] = [("load", x, 0, d)] * (dtype.itemsize >= 4)
        return [*loads, ("store", tensor(n, d, output(dtype)), 0, d)]
    log_scale = tensor(1, d, partner)[0]
    if _MODULES[kernel.partition("_")[0]] is sides:
        return _launch_of_sides(kernel, x, log_scale, v)
    if kernel == "scale_log_prob_fwd_kernel":
        likelihood.scale_log_prob_fwd(x, log_scale, v["prior"], v["with_z"])
        return [("load", x, 0, d)] + [("store", like_x, 0, d)] * v["with_z"]
    if kernel == "scale_log_prob_bwd_kernel":
        acc = torch.promote_types(torch.promote_types(dtype, partner), torch.float32)
        grad = tensor(1, n, acc, v["grad_log_prob"])[0]
        grad_z = tensor(n, d, dtype, layout) if v["with_z"] else None
        likelihood.scale_log_prob_bwd(grad_z, grad, x, log_scale, v["prior"])
        return [("load", x, 0, d)] * (1 + v["with_z"]) + [("store", like_x, 0, d)]
    if kernel == "sample_fwd_kernel":
        v["layout"] = "dense"
        sampling.sample_fwd(log_scale, n, v["row_offset"], 1234567, v["prior"], dtype)
        return [("store", like_x, 0, d)]
    sampling.sample_bwd(x, like_x, dtype)
    return [("load", x, 0, d), ("load", like_x, 0, d)]


def _launch_of_sides(kernel: str, x: Tensor, log_scale: Tensor, v: dict[str, Any]) -> list[Access]:
    """The same for those around a wide flow's products."""
    n, d = x.shape
    both = [_features(side, d) for side in _both(v.get("sides", "half"))]
    wanted = {"none": (), "first": (0,), "second": (1,), "both": (0, 1)}[v["biases"]]
    biases = tuple(
        tensor(1, f.size, x.dtype)[0] if i in wanted else None for i, f in enumerate(both)
    )
    y = tensor(n, d, x.dtype)
    whole: list[Access] = [("load", y, 0, d), ("store", y, 0, d)]
    in_order = v.get("sides", "half") == "half"
    if kernel == "enter_kernel":
        sides.enter(x, both, biases, log_scale if v["scaled"] else None, v["inverse"])
        return [("load", x, 0, d)] * in_order + whole[1:]
    v["layout"] = "dense"
    if kernel == "add_kernel":
        sides.add_(y, both[0].size, biases, v["inverse"])
        return whole
    outputs = v["outputs"]
    sides.leave(
        y, both, biases, None if outputs == "coupled" else log_scale, v["prior"], v["inverse"],
        None if outputs == "log_prob" else y,
        tensor(1, n, x.dtype)[0] if outputs in ("log_prob", "both") else None,
    )  # fmt: skip
    return whole[:1] + whole[1:] * (in_order and outputs != "log_prob")


def _both(side: str) -> tuple[str, str]:
    """The other side, then this one: "half" is in the order of features."""
    return (side[1:], side) if side.startswith("~") else (f"~{side}", side)


def tensor(n: int, d: int, dtype: torch.dtype, layout: str = "dense") -> Tensor:
    """[n, d] on the meta device: it has strides and an alignment, but no memory."""
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    if layout == "strided":  # a multiple of 16, which Triton tells the compiler
        return empty(n, d - d % 16 + 32)[:, :d]
    if layout == "ragged":
        return empty(n, d - d % 16 + 17)[:, :d]
    if layout == "offset":
        return empty(n * d + 1)[1:].view(n, d)
    if layout == "transposed":
        return empty(d, n).T
    if layout == "expanded":
        return empty(()).expand(n, d)
    return empty(n, d)


@functools.cache
def _features(side: str, d: int) -> Any:
    name = side.removeprefix("~")
    partition = Partition.random(d, 0) if name == "random" else getattr(Partition, name)(d)
    return (~partition if side != name else partition).locate(torch.device("meta"))


def jit_function(kernel: str) -> JITFunction[Any]:
    """The kernel as the compiler takes it, also where the module holds the interpreter's."""
    function = getattr(_MODULES[kernel.partition("_")[0]], kernel)
    return function if isinstance(function, JITFunction) else JITFunction(function.fn)


@functools.cache
def _binder(kernel: str, arch: str) -> tuple[JITFunction[Any], Any, Any]:
    function, backend = jit_function(kernel), make_backend(TARGETS[arch])
    bind = create_function_from_signature(function.signature, function.params, backend)
    return function, backend, bind


def specialise(
    kernel: str, arch: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    """Signature, constants, alignments and options as ``kernel[grid](...)`` would make them."""
    function, backend, bind = _binder(kernel, arch)
    bound, specialization, options = bind(*args, **kwargs)
    # Triton 3.9 warns where fusion is not spelt out; the options it parses are not used here
    _, signature, constants, attrs = function._pack_args(
        backend, kwargs | {"enable_fp_fusion": True}, bound, specialization, options
    )
    return (
        tuple(signature.items()),
        tuple((function.arg_names[i], value) for (i,), value in constants.items()),
        tuple((i, tuple((k, v) for k, v in pairs)) for (i,), pairs in attrs.items() if pairs),
        tuple(options.items()),
    )
