"""A kernel's launch without a GPU: the shipped launcher called on meta tensors, and recorded.

The launcher chooses the tile, and Triton itself says how the arguments specialise: together what
would be compiled. Nothing is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from nicefast.kernels import coupling, dequantise, flow, flow_resident, likelihood, sampling, sides
from nicefast.partition import Partition

TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 103, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
LEVELS = {t: getattr(torch, t) for t in ("uint8", "int16", "int32", "int64")}
MODULES = {
    "couple": coupling,
    "select": coupling,
    "scale": likelihood,
    "sample": sampling,
    "dequantise": dequantise,
    "flow": flow,
    "resident": flow_resident,
    "enter": sides,
    "add": sides,
    "leave": sides,
}

# one access of a kernel: "load" or "store", the tensor, first feature touched, how many
Access = tuple[str, Tensor, int, int]


class Recorder:
    """Stands in for a kernel and remembers how it was launched."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __getitem__(self, grid: object) -> Any:
        return self._record

    def _record(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


def output(dtype: torch.dtype) -> torch.dtype:
    """What a kernel makes of ``dtype``: float32 of levels, and otherwise the same."""
    return dtype if dtype.is_floating_point else torch.float32


def launch(kernel: str, dtype: torch.dtype, width: int, v: dict[str, Any]) -> list[Access]:
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
    if MODULES[kernel.partition("_")[0]] is sides:
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
    side = v.get("sides", "half")
    split = both[0].size if side.endswith("alternating") and d > 2 else 0
    in_order = side == "half" or split > 0
    if kernel == "enter_kernel":
        sides.enter(x, both, biases, log_scale if v["scaled"] else None, v["inverse"])
        return [("load", x, 0, d)] * in_order + [("store", y, split, d - split)]
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
    return [("load", y, split, d - split)] + whole[1:] * (in_order and outputs != "log_prob")


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
    function = getattr(MODULES[kernel.partition("_")[0]], kernel)
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
    _, signature, constants, attrs = function._pack_args(
        backend, kwargs, bound, specialization, options
    )
    return (
        tuple(signature.items()),
        tuple((function.arg_names[i], value) for (i,), value in constants.items()),
        tuple((i, tuple((k, v) for k, v in pairs)) for (i,), pairs in attrs.items() if pairs),
        tuple(options.items()),
    )
