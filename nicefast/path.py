"""Which way a call takes through a flow, and why: decided here and nowhere else.

    whole flow       one kernel launch from x to log_prob (nicefast.kernels.flow): where kernels
                     run, for narrow MLPs
    products         the couplings as nothing but matrix products, by the way in nicefast.fused that
                     is fastest for so many rows of this width here
    exact            flows with a grid: arithmetic that has the same bits everywhere
    layer by layer   every module called in turn: any conditioner, any dtype, any transformation

A path is chosen from the flow's structure, from shapes, device, dtype and precision: the user
never has to.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from . import backend, watchers
from .fused.casts import forget_casts
from .fused.chain import Chain
from .fused.few import FewFlow
from .fused.flow import DifferentiableFlow, FusedFlow, SamplingFlow
from .fused.handful import Handful
from .fused.onepiece import OnePiece
from .fused.sideways import SidewaysFlow
from .fused.whole import WholeFlow
from .fused.wide import WideFlow
from .layers import PLAIN, Scaling, is_plain_scaling, plain_layers
from .precision import matmul_precision
from .reading import read

LAYERS = "layer by layer"
EXACT = "exact"
KERNEL_PRECISION = {"highest": "fp32", "high": "tf32", "medium": "bf16"}


class Path(NamedTuple):
    """The way a call takes: ``chain`` where the couplings go through products, as they do in the
    gradient of a whole flow; ``fused`` is what takes rows all the way from x to log_prob;
    ``recorded``: autograd records what happens to them (nobody asks where there is no chain)."""

    name: str
    reason: str
    chain: Chain | None = None
    fused: FusedFlow | None = None
    recorded: bool = False

    @property
    def whole(self) -> WholeFlow | None:
        """The kernel that does everything."""
        return self.fused if isinstance(self.fused, WholeFlow) else None

    @property
    def sampler(self) -> WholeFlow | SamplingFlow | None:
        """What draws a sample, noise and all."""
        return self.fused if isinstance(self.fused, WholeFlow | SamplingFlow) else None

    @property
    def differentiable(self) -> DifferentiableFlow | None:
        """What also has the gradient of log_prob."""
        return self.fused if isinstance(self.fused, DifferentiableFlow) else None


class Flow(Protocol):
    """What is asked of a :class:`nicefast.NICE`, which lives one floor up."""

    couplings: nn.ModuleList
    scaling: Scaling
    prior_name: str

    @property
    def grid(self) -> float | None: ...


def choose_path(flow: Flow, x: Tensor, context: Tensor | None = None) -> Path:
    """The path of rows ``x`` (N, D), with context (N, K) or none, through ``flow``, and why.

    ``.name`` and ``.reason`` are for people. What no faster path serves goes layer by layer: that
    is never an error (but ValueError for an unknown NICEFAST_BACKEND).

    >>> import torch, nicefast as nf
    >>> flow = nf.NICE(4, hidden=(8,))
    >>> nf.choose_path(flow, torch.zeros(1, 4)).name
    'products'
    >>> nf.choose_path(flow, torch.zeros(1, 4).double()).reason
    'float64 rows'
    """
    if not watchers.is_compiled():
        forget_casts()  # of a block of autocast that has ended: every call comes here
    if flow.grid is not None:
        return Path(EXACT, _why_exact(flow, flow.grid))
    reason = _why_call_needs_layers(x, context)
    if reason is not None:
        return Path(LAYERS, reason)
    chain = read(flow.couplings, x.device, _uses_bfloat16(x))
    if not isinstance(chain, Chain):
        return Path(LAYERS, chain)
    if (context is None) != (chain.context == 0):
        return Path(LAYERS, "the context is missing or unexpected")
    reason = "every coupling is an MLP's, on one partition"
    recorded = watchers.records(x, context, flow.scaling.log_scale, *chain.parameters)
    if not backend.uses_kernels(x.device):
        fused = _on_cpu(chain, flow, x, recorded)
        return Path("products", reason, chain if fused is None else fused.chain, fused, recorded)
    whole = _whole(chain, flow, x)
    if isinstance(whole, WholeFlow):
        return Path("whole flow", f"{reason}, and narrow", whole.chain, whole, recorded)
    if backend.interprets(x.device):  # kernels were asked for, and products use none
        return Path(LAYERS, f"no whole-flow kernel: {whole}")
    apart = recorded or _why_scaling_is_apart(flow.scaling, x.shape[1]) is not None
    wide = None if apart else WideFlow(chain, flow.prior_name)
    return Path("products", f"{reason}; no whole-flow kernel: {whole}", chain, wide, recorded)


def _whole(chain: Chain, flow: Flow, x: Tensor) -> WholeFlow | str:
    """The kernel for the whole flow, or why there is none."""
    reason = _why_scaling_is_apart(flow.scaling, x.shape[1])
    if reason is not None:
        return reason
    hidden = [tuple(b.shape[0] for _, b in layers[:-1]) for layers in chain.couplings]
    for i, own in enumerate(hidden):
        if own != hidden[0]:
            return f"coupling {i} has other hidden layers than the first"
    precision = "bf16" if chain.bfloat16 else KERNEL_PRECISION[matmul_precision(x.device)]
    if precision == "bf16" and backend.interprets(x.device):
        return "Triton's interpreter gets bfloat16 wrong"
    kernels = backend.kernels()
    shape = kernels.FlowShape(
        features=x.shape[1],
        context=chain.context,
        hidden=hidden[0],
        couplings=len(chain.couplings),
        activation=chain.activation,
        prior=flow.prior_name,
    )
    tile = kernels.flow_tile(shape, precision, backend.architecture(x.device))
    if isinstance(tile, str):
        return tile
    # whatever the width: the kernel leaves no activations
    return WholeFlow(chain.rebuilding, shape, tile, x.device)


def _on_cpu(chain: Chain, flow: Flow, x: Tensor, recorded: bool) -> FusedFlow | None:
    """The whole flow in one pass, where a CPU is fastest so."""
    if not x.is_cpu or _why_scaling_is_apart(flow.scaling, x.shape[1]) is not None:
        return None
    rows = x.shape[0]
    for kind in (Handful, FewFlow, OnePiece):
        if kind.serves(chain, rows, recorded):
            return kind(chain.keeping, flow.prior_name)
    return SidewaysFlow(chain, flow.prior_name) if SidewaysFlow.serves(chain, recorded) else None


def _why_scaling_is_apart(scaling: nn.Module, features: int) -> str | None:
    """Why nothing but a call of the module itself can be trusted to scale."""
    if not is_plain_scaling(scaling):
        return "the scaling is a module of its own, or has hooks"
    log_scale = cast("Scaling", scaling).log_scale
    if log_scale.dtype != torch.float32 or log_scale.shape != (features,):
        return f"log_scale is {log_scale.dtype} of shape {tuple(log_scale.shape)}"
    return None


def _why_exact(flow: Flow, grid: float) -> str:
    """How a flow with a grid is computed: kernels and fused products round as the batch has it."""
    for i, coupling in enumerate(flow.couplings):
        layers = plain_layers(coupling._modules.get("conditioner"))
        if isinstance(layers, str):
            return f"a grid of {grid:g}; one row at a time, since coupling {i} has {layers}"
    return f"a grid of {grid:g}; products of integers in float64"


def _why_call_needs_layers(x: Tensor, context: Tensor | None) -> str | None:
    if watchers.is_compiled():
        return "torch.compile sees every operation"
    if watchers.is_traced():
        return "a trace of every operation"
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
