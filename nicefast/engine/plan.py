"""Which way a call takes through a flow, and why: decided here and nowhere else.

    kernel    one kernel launch from x to log_prob: where kernels run, for narrow conditioners
    gemm      cuBLAS's products between kernels at the boundary: where kernels run, for wide ones
    rows      blocks of rows through plain products: on the CPU, and wherever kernels cannot run
    exact     flows with a grid: arithmetic that has the same bits everywhere
    layers    every module is called in turn: any conditioner, dtype, hook or transformation

The choice depends on the flow (structure, hooks, training mode), on the device and dtypes of the
call, and on PyTorch's state (precision, autocast, backend, compilation, torch.func). It does not
depend on earlier calls or on the number of rows. Thresholds stand in :mod:`.thresholds`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ..layers import PLAIN, AdditiveCoupling, Scaling, is_plain_scaling, plain_layers
from ..runtime import backend, watchers
from ..runtime.precision import matmul_precision
from .exact import ExactEngine
from .gemm import GemmEngine
from .kernel import KernelEngine
from .rows import RowEngine
from .stack import CouplingStack, read

KERNEL_PRECISION = {"highest": "fp32", "high": "tf32", "medium": "bf16"}


class Plan(NamedTuple):
    """The way of a call: its name and the reason, for people, and the engine that computes it.

    The engine is None where modules are called in turn. Where its ``log_scale`` is None, it
    computes the couplings alone.
    """

    name: str
    reason: str
    engine: RowEngine | ExactEngine | None = None


class Flow(Protocol):
    """The attributes of a :class:`nicefast.NICE` that :func:`plan` reads."""

    couplings: nn.ModuleList
    scaling: Scaling
    prior_name: str
    recompute: bool

    @property
    def grid(self) -> float | None: ...


def plan(flow: Flow, x: Tensor, context: Tensor | None = None) -> Plan:
    """The way of rows ``x`` (N, D), with context (N, K) or none, through ``flow``, and why.

    What no engine serves goes layer by layer: that is never an error. ValueError for an unknown
    NICEFAST_BACKEND; RuntimeError where the backend "triton" was asked for and cannot run there.

    >>> import torch, nicefast as nf
    >>> from nicefast.engine import plan
    >>> flow = nf.NICE(4, hidden=(8,))
    >>> plan(flow, torch.zeros(1, 4)).name
    'rows'
    >>> plan(flow, torch.zeros(1, 4).double()).reason
    'float64 rows'
    """
    if flow.grid is not None:
        couplings = cast("list[AdditiveCoupling]", list(flow.couplings))
        exact = ExactEngine(couplings, flow.scaling.log_scale, flow.prior_name, flow.grid)
        return Plan("exact", _why_exact(flow, flow.grid), exact)
    reason = why_layers(x, context)
    if reason is not None:
        return Plan("layers", reason)
    dtype = torch.bfloat16 if _uses_bfloat16(x) else torch.float32
    stack = read(flow.couplings, x.device, dtype)
    if isinstance(stack, str):
        return Plan("layers", stack)
    if (context is None) != (stack.context == 0):
        return Plan("layers", "the context is missing or unexpected")
    reason, scaling = "every coupling is an MLP's, on one partition", flow.scaling
    apart = _why_scaling_is_apart(scaling, x.shape[1])
    log_scale = scaling.log_scale if apart is None else None
    if not backend.uses_kernels(x.device):
        return Plan("rows", reason, RowEngine(stack, log_scale, flow.prior_name, flow.recompute))
    found = apart or _tile(stack, flow.prior_name, x.device)
    if not isinstance(found, str):
        engine = KernelEngine(
            stack, scaling.log_scale, flow.prior_name, *found, recompute=flow.recompute
        )
        arch = backend.architecture(x.device)
        tiles = backend.kernels().tiles_of(arch)
        if tiles == arch:
            return Plan("kernel", f"{reason}, and narrow", engine)
        failed = engine.trial()
        if failed is None:
            how = f"{arch} has no tiles of its own and takes those of {tiles}, after a trial"
            return Plan("kernel", f"{reason}, and narrow; {how}", engine)
        found = f"{arch} has no tiles of its own, and with those of {tiles} {failed}"
    if backend.interprets(x.device):  # kernels were asked for, and products use none
        return Plan("layers", f"no whole-flow kernel: {found}")
    reason = f"{reason}; no whole-flow kernel: {found}"
    return Plan("gemm", reason, GemmEngine(stack, log_scale, flow.prior_name, flow.recompute))


def _tile(stack: CouplingStack, prior: str, device: torch.device) -> tuple[Any, Any] | str:
    """Shape and tile of the kernel for the whole flow, or why there is none."""
    hidden = [[b.shape[0] for _, b in layers[:-1]] for layers in stack.couplings]
    if hidden.count(hidden[0]) != len(hidden):
        i = next(i for i, own in enumerate(hidden) if own != hidden[0])
        return f"coupling {i} has other hidden layers than the first"
    bfloat16 = stack.dtype == torch.bfloat16
    precision = "bf16" if bfloat16 else KERNEL_PRECISION[matmul_precision(device)]
    if precision == "bf16" and backend.interprets(device):
        return "Triton's interpreter gets bfloat16 wrong"
    widths, couplings = tuple(hidden[0]), len(stack.couplings)
    side = backend.kernels().Side
    sides = tuple(side(half.size, half.start, half.step) for half in stack.halves)
    shape = (
        stack.features, stack.context, widths, couplings, stack.activation, prior, sides,
        tuple(stack.conditioning),
    )  # fmt: skip
    return _tile_of(shape, precision, backend.kernels().tiles_of(backend.architecture(device)))


@functools.lru_cache(1024)
def _tile_of(shape: tuple[Any, ...], precision: str, arch: str) -> tuple[Any, Any] | str:
    """FlowShape and FlowTile of a whole flow, which depend on nothing else, or why there are none.

    ``shape`` has what a FlowShape has, in the same order.
    """
    kernels = backend.kernels()
    found = kernels.FlowShape(*shape)
    tile = kernels.flow_tile(found, precision, arch)
    return tile if isinstance(tile, str) else (found, tile)


def _why_scaling_is_apart(scaling: nn.Module, features: int) -> str | None:
    """Why nothing but a call of the module itself can be trusted to scale."""
    if not is_plain_scaling(scaling):
        return "the scaling is a module of its own, or has hooks"
    log_scale = cast("Scaling", scaling).log_scale
    if log_scale.dtype != torch.float32 or log_scale.shape != (features,):
        return f"log_scale is {log_scale.dtype} of shape {tuple(log_scale.shape)}"
    return None


def _why_exact(flow: Flow, grid: float) -> str:
    """How the conditioners of a flow with a grid are computed."""
    for i, coupling in enumerate(flow.couplings):
        layers = plain_layers(coupling._modules.get("conditioner"))
        if isinstance(layers, str):
            return f"a grid of {grid:g}; one row at a time, since coupling {i} has {layers}"
    return f"a grid of {grid:g}; products of integers in float64"


def why_layers(x: Tensor, context: Tensor | None) -> str | None:
    """The reason why no engine computes these rows, whatever the flow; None where one may."""
    if watchers.is_compiled():
        return "torch.compile sees every operation"
    if watchers.is_traced():
        return "a trace of every operation"
    if watchers.is_fake():
        return "tensors without numbers"
    if watchers.is_transformed():
        return "torch.func transforms every operation"
    if watchers.has_tangents():
        return "forward-mode derivatives"
    for t in (x,) if context is None else (x, context):
        if type(t) not in PLAIN:
            return f"rows or context of type {type(t).__name__}"
    if x.dtype != torch.float32 or (context is not None and context.dtype == torch.float64):
        wide = x if context is None or x.dtype != torch.float32 else context
        return f"{str(wide.dtype).removeprefix('torch.')} rows"
    if not (x.is_cpu or x.is_cuda):
        return f"device {x.device}"
    if backend.get_backend() == "reference":
        return "backend 'reference' was asked for"
    if _autocast(x) not in (None, torch.bfloat16):
        return f"autocast to {_autocast(x)}"
    return None


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = "cpu" if x.is_cpu else "cuda"  # what x.device.type is takes many times as long to say
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _uses_bfloat16(x: Tensor) -> bool:
    """Whether products take bfloat16 operands: by autocast, or by the float32 matmul precision
    ``"medium"`` where the device has instructions for them."""
    if _autocast(x) is torch.bfloat16:
        return True
    if matmul_precision(x.device) != "medium":
        return False
    return not x.is_cpu or torch.cpu._is_avx512_bf16_supported()
