"""Every way a kernel is compiled: kernel, tile, dtype, variant and architecture.

A case is one launch (see :mod:`bench.launches`); nothing is compiled here.

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

from nicefast.kernels import sides
from nicefast.kernels.tile import Tile, tile

from .launches import DTYPES, LEVELS, MODULES, TARGETS, Recorder, launch, output, specialise

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
_OF_BOTH_SIDES = ("couple_kernel", "enter_kernel", "add_kernel", "leave_kernel")


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
    if MODULES[kernel.partition("_")[0]] is sides:
        return {"fp32": torch.float32}
    return LEVELS if kernel == "dequantise_kernel" else DTYPES


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
        seen, turn, dealt_out = set(), 0, 0
        for name, arch, dtype, width, text in SPILLED:
            if name == kernel and arch in archs:
                case = simple_case(kernel, arch, dtype, width, _parse(kernel, text))
                seen.add(case.name)
                yield case
        dtypes = dtypes_of(kernel)
        single = len(dtypes) == 1
        for (position, arch), (dtype, real) in itertools.product(
            enumerate(TARGETS), dtypes.items()
        ):
            for t, (aligned, odd) in tile_widths(output(real).itemsize).items():
                turn += 1
                hand = [(v, aligned) for v in (wide if full else [next(wide_deal)])]
                # dear, and asked for less: where there are many, each tile on every fourth
                # architecture, and every second of those, which still takes the layouts in turn
                if full or single or (turn + position) % 4 == 0:
                    dealt = narrow if full else [next(narrow_deal)]
                    dealt_out += 1
                    if not (full or single) and dealt_out % 2:
                        dealt = []
                    hand += [(v, odd if v["layout"] == "dense" else aligned) for v in dealt]
                for variant, choice in hand:
                    # smallest, middle and largest width in turn, and the one without padding
                    pick = (turn + turn // 4) % 4
                    width = choice[pick * (len(choice) - 1) // 3]
                    width = t.columns if pick == 1 and t.columns in choice else width
                    width = max(width, 2) if kernel in _OF_BOTH_SIDES else width
                    case = simple_case(kernel, arch, dtype, width, dict(variant))
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


def simple_case(kernel: str, arch: str, dtype: str, width: int, v: dict[str, Any]) -> Case:
    """Launch the kernel on meta tensors and describe what Triton would compile."""
    module = MODULES[kernel.partition("_")[0]]
    with (
        mock.patch.object(module, kernel, Recorder()) as recorder,
        mock.patch("nicefast.kernels.tile.WARP_SIZE", TARGETS[arch].warp_size),
    ):
        accesses = launch(kernel, (DTYPES | LEVELS)[dtype], width, v)
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
