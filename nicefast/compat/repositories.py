"""from_state_dict: weights of the NICE repositories people have trained with, as nicefast flows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..architecture import partition_chain
from ..flow import NICE
from ..partition import Partition
from ..reference import check_prior
from .convert import assemble
from .steps import Affine, Base, Coupling, Step, inverted

State = Mapping[str, Tensor]


class Found(NamedTuple):
    """What a state_dict holds: the modules of each conditioner, and the scaling's factors."""

    conditioners: list[list[nn.Module]]
    scale: Tensor
    partition: Partition | None = None  # by the repository's convention, then its complement
    full: bool = False  # conditioners see all features, masked
    inverse: bool = False  # latent -> data


def from_state_dict(
    state_dict: Mapping[str, Any],
    source: str,
    *,
    prior: str = "logistic",
    partition: Partition | Sequence[Partition] | None = None,
    activation: nn.Module | None = None,
) -> NICE:
    """A flow from the ``state_dict`` of one of these repositories, with the density that it has
    there in evaluation mode (on preprocessed data; preprocessing stays where it is).

    =========================  ==================  ===========================  ==================
    source                     activation          conditioning features        also
    =========================  ==================  ===========================  ==================
    fmu2/NICE                  ReLU                odd ones first (as its       a whole checkpoint,
                                                   ``mask_config`` 1 says)      with mask_config
    DakshIdnani/pytorch-nice   LeakyReLU(0.2)      odd ones first               masked nets
    paultsw/nice_pytorch       ReLU                odd ones first               BatchNorm is folded
                                                                                by its statistics
    aai-institute/VeriFlow     ReLU                none: ``partition``          ``use_lu=False``
    =========================  ==================  ===========================  ==================

    Sizes are read off the tensors; results are of their dtype, on their device, and share no
    memory with them. Where the activation is none of nicefast's, as with the second, conditioners
    are plain Sequentials, and calls go layer by layer. USFlows is the later name of VeriFlow.

    Args:
        state_dict: names and tensors.
        source: ``"owner/repository"``, as above.
        prior: ``"logistic"`` or ``"normal"``: no state_dict says it. Of VeriFlow, a standard base.
        partition: where the masks were not the repository's default: one Partition, used in turn
            with its complement, or one for each coupling in the order of the repository's layers
            (VeriFlow's go from latent to data; its mask's ones are conditioning).
        activation: where it was not the repository's default.

    Raises:
        ValueError: an unknown source or prior; names or shapes that are not those of the source; a
            missing partition; a VeriFlow with LU layers, which mix all features.
        TypeError: a partition or activation of another kind.

    >>> import torch
    >>> from nicefast.compat import from_state_dict
    >>> state = {"scaling.scale": torch.zeros(1, 4)}
    >>> for i, (a, b) in {"in_block.0": (2, 8), "out_block": (8, 2)}.items():
    ...     state |= {f"coupling.0.{i}.weight": torch.randn(b, a)}
    ...     state |= {f"coupling.0.{i}.bias": torch.zeros(b)}
    >>> from_state_dict(state, "fmu2/NICE").sample(3).shape
    torch.Size([3, 4])
    """
    if source not in _SOURCES:
        raise ValueError(f"source must be one of {', '.join(_SOURCES)}, got {source!r}")
    check_prior(prior)
    if activation is not None and not isinstance(activation, nn.Module):
        raise TypeError(f"activation must be a torch.nn.Module, got {type(activation).__name__}")
    try:
        found = _SOURCES[source](state_dict, activation)
    except KeyError as problem:
        raise ValueError(
            f"state_dict must be that of a NICE of {source}: it has no {problem}"
        ) from None
    except RuntimeError as problem:
        raise ValueError(f"state_dict has shapes that do not fit: {problem}") from None
    scale = found.scale.detach().to("cpu", torch.float64).flatten()
    if not found.conditioners or len(scale) < 2:
        raise ValueError(f"state_dict must be that of a NICE of {source}: it has no couplings")
    partition = found.partition if partition is None else partition
    if partition is None:
        raise ValueError(f"partition must be given: a state_dict of {source} has no masks")
    partitions = partition_chain(partition, (len(scale),), len(found.conditioners))
    steps: list[Step] = []
    for k, (own, modules) in enumerate(zip(partitions, found.conditioners, strict=True)):
        c, s = own.conditioning, own.shifted
        linears = [m for m in modules if isinstance(m, nn.Linear)]
        ends = linears[0].in_features, linears[-1].out_features
        wanted = (len(scale),) * 2 if found.full else (len(c), len(s))
        chained = itertools.pairwise(linears)
        if ends != wanted or any(a.out_features != b.in_features for a, b in chained):
            raise ValueError(
                f"state_dict does not fit: coupling {k} maps {ends[0]} to {ends[1]} features, "
                f"expected {wanted[0]} to {wanted[1]}"
            )
        net = nn.Sequential(*modules)
        steps.append(Coupling(c, s, net, (ends[0],), full=found.full))
    steps.append(Affine(scale, torch.zeros_like(scale)))
    zero = torch.zeros_like(scale)
    return assemble(
        inverted(steps) if found.inverse else steps,
        Base(prior, zero, zero + 1),
        (len(scale),),
        cast("nn.Linear", found.conditioners[0][0]).weight,
    )


def _linear(state: State, name: str) -> nn.Linear:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return _made(weight, bias)


def _made(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return linear


def _net(linears: Sequence[nn.Module], activation: nn.Module) -> list[nn.Module]:
    return [m for linear in linears for m in (linear, activation)][:-1]


def _numbers(state: State, pattern: str) -> list[int]:
    """The numbers that the one group of ``pattern`` has among the names, ascending."""
    found = (re.match(pattern, name) for name in state)
    return sorted({int(match[1]) for match in found if match})


def _fmu2(state: Mapping[str, Any], activation: nn.Module | None) -> Found:
    parity = int(state.get("mask_config", 1))
    state = state.get("model_state_dict", state)
    conditioners = []
    for i in _numbers(state, r"coupling\.(\d+)\."):
        own = f"coupling.{i}"
        middle = _numbers(state, rf"coupling\.{i}\.mid_block\.(\d+)\.")
        names = [f"{own}.in_block.0", *(f"{own}.mid_block.{j}.0" for j in middle)]
        linears = [_linear(state, name) for name in (*names, f"{own}.out_block")]
        conditioners.append(_net(linears, activation or nn.ReLU()))
    log_scale = state["scaling.scale"]
    partition = Partition.alternating(log_scale.numel(), parity % 2)
    return Found(conditioners, log_scale.double().exp(), partition)


def _dakshidnani(state: State, activation: nn.Module | None) -> Found:
    conditioners = []
    for i in _numbers(state, r"coupling_layers\.(\d+)\."):
        at = _numbers(state, rf"coupling_layers\.{i}\.m\.(\d+)\.weight")
        linears = [_linear(state, f"coupling_layers.{i}.m.{j}") for j in at or [0]]
        conditioners.append(_net(linears, activation or nn.LeakyReLU(0.2)))
    log_scale = state["scaling_layer.log_scale_vector"]
    partition = Partition.alternating(log_scale.numel(), 1)
    return Found(conditioners, log_scale.double().exp(), partition, full=True)


def _paultsw(state: State, activation: nn.Module | None) -> Found:
    """Two linear layers come first, with nothing between them; then activation, BatchNorm, linear
    in turn: what BatchNorm does in evaluation mode goes into the linear layer behind it."""
    conditioners = []
    for i in (1, 2, 3, 4):
        own = f"layer{i}.nonlinearity"
        linears: list[nn.Module] = []
        before: nn.Linear | None = _linear(state, f"{own}.0")
        scale = shift = torch.empty(0, dtype=torch.float64, device="cpu")
        for j in _numbers(state, rf"layer{i}\.nonlinearity\.(\d+)\.")[1:]:
            name = f"{own}.{j}"
            if f"{name}.running_mean" in state:
                mean, var = (state[f"{name}.running_{k}"].double() for k in ("mean", "var"))
                scale = state[f"{name}.weight"].double() / (var + nn.BatchNorm1d(1).eps).sqrt()
                shift = state[f"{name}.bias"].double() - mean * scale
                continue
            weight, bias = (state[f"{name}.{k}"].double() for k in ("weight", "bias"))
            if before is not None:
                bias = bias + weight @ before.bias.double()
                weight = weight @ before.weight.double()
            else:
                bias, weight = bias + weight @ shift, weight * scale
            like = state[f"{name}.weight"].dtype
            linears.append(_made(weight.to(like), bias.to(like)))
            before = None
        conditioners.append(_net(linears, activation or nn.ReLU()))
    log_scale = state["scaling_diag"]
    partition = Partition.alternating(log_scale.numel(), 1)
    return Found(conditioners, log_scale.double().exp(), partition)


def _veriflow(state: State, activation: nn.Module | None) -> Found:
    layers = _numbers(state, r"trainable_layers\.(\d+)\.")
    if any(name.endswith(("L_raw", "U_raw")) for name in state):
        raise ValueError(
            "state_dict has LU layers, which mix all features: a NICE has nothing of that kind "
            "(train with use_lu=False)"
        )
    conditioners = []
    for i in layers[:-1]:
        own = f"trainable_layers.{i}.conditioner.layers"
        at = _numbers(state, rf"trainable_layers\.{i}\.conditioner\.layers\.(\d+)\.")
        linears = [_linear(state, f"{own}.{j}") for j in at or [0]]
        conditioners.append(_net(linears, activation or nn.ReLU()))
    scale = state[f"trainable_layers.{layers[-1] if layers else 0}.scale"]
    return Found(conditioners, scale, None, full=True, inverse=True)


_SOURCES: dict[str, Callable[[Any, nn.Module | None], Found]] = {
    "fmu2/NICE": _fmu2,
    "DakshIdnani/pytorch-nice": _dakshidnani,
    "paultsw/nice_pytorch": _paultsw,
    "aai-institute/VeriFlow": _veriflow,
    "aai-institute/USFlows": _veriflow,
}
