"""The couplings of a flow as plain tensors.

:func:`read` takes them from the modules at each call. Nothing is cached: a change of the flow, in
whatever way it is made, is seen by the next call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from ..layers import MLP, AdditiveCoupling, plain_layers, runs_more_than_forward
from ..partition import Features, Partition

Layers = Sequence[tuple[Tensor, Tensor]]  # (weight, bias) of each linear layer of a conditioner


@dataclass(frozen=True, eq=False)
class CouplingStack:
    """Additive couplings with MLP conditioners; each conditions on one half of the same partition
    and shifts the other.

    Attributes:
        couplings: the linear layers of each conditioner.
        partition: ``halves[0]`` are its conditioning features, ``halves[1]`` the others.
        conditioning: coupling l conditions on ``halves[conditioning[l]]`` and shifts the other.
        halves: where the features of both halves lie.
        activation: of the conditioners.
        context: number of context features, 0 for none.
        dtype: of the operands of products; everything else is float32.
    """

    couplings: Sequence[Layers] = field(repr=False)
    partition: Partition
    conditioning: tuple[int, ...]
    halves: tuple[Features, Features] = field(repr=False)
    activation: str
    context: int
    dtype: torch.dtype

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Weight and bias of each layer of each coupling, in this order."""
        return [t for layers in self.couplings for pair in layers for t in pair]

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def features(self) -> int:
        return self.halves[0].size + self.halves[1].size

    @cached_property
    def hidden(self) -> int:
        """Units of the widest hidden layer, 0 without one."""
        return max((b.shape[0] for layers in self.couplings for _, b in layers[:-1]), default=0)

    @cached_property
    def width(self) -> int:
        """Columns of the widest result of a product."""
        return max([b.shape[0] for layers in self.couplings for _, b in layers])

    @property
    def products(self) -> int:
        """Matrix products of one pass."""
        return sum(len(layers) for layers in self.couplings)

    @property
    def flops(self) -> int:
        """Floating-point operations of all products for one row."""
        return 2 * sum(w.numel() for layers in self.couplings for w, _ in layers)

    @cached_property
    def residual_bytes(self) -> int:
        """Bytes of one row's residuals: of the operands of all products, twice where gradients of
        activations need their inputs."""
        each = 2 if ACTIVATIONS[self.activation].from_input else 1
        numbers = each * sum(w.shape[1] for layers in self.couplings for w, _ in layers)
        return numbers * self.dtype.itemsize

    @property
    def in_order(self) -> bool:
        """Whether the features of the first half all come before those of the second."""
        first, second = self.halves
        return first.step == 1 == second.step and first.start == 0

    def split(self, x: Tensor) -> list[Tensor]:
        """The halves of rows x (N, D): views where their features are adjacent."""
        found = []
        for half in self.halves:
            columns = half.columns
            if isinstance(columns, Tensor):
                found.append(x.index_select(1, columns))
            else:
                found.append(x[:, columns] if half.step == 1 else x[:, columns].contiguous())
        return found

    def join(self, halves: Sequence[Tensor], out: Tensor) -> Tensor:
        """The halves of rows, written to out (N, D)."""
        if self.in_order:
            return torch.cat(list(halves), 1, out=out)
        for half, features in zip(halves, self.halves, strict=True):
            columns = features.columns
            if isinstance(columns, Tensor):
                out.index_copy_(1, columns, half)
            else:
                out[:, columns] = half
        return out

    def by_half(self, t: Tensor) -> Tensor:
        """A number for each feature (D,), those of the first half before those of the second."""
        return t if self.in_order else torch.cat([t[half.columns] for half in self.halves])

    def by_feature(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`by_half`."""
        sizes = [half.size for half in self.halves]
        return self.join(t[None].split(sizes, 1), torch.empty_like(t)[None])[0]


def read(
    couplings: Iterable[nn.Module], device: torch.device, dtype: torch.dtype
) -> CouplingStack | str:
    """The couplings as plain tensors on ``device``, or the reason why tensors do not describe them.

    ``dtype`` is that of the operands of products.

    >>> import torch, nicefast as nf
    >>> from nicefast.engine.stack import read
    >>> flow = nf.NICE(4, hidden=(8,))
    >>> read(flow.couplings, torch.device("cpu"), torch.float32).products
    8
    >>> _ = flow.couplings[1].register_forward_hook(lambda *_: None)
    >>> read(flow.couplings, torch.device("cpu"), torch.float32)
    'coupling 1: hooks, or a forward of its own'
    """
    modules = list(couplings)
    if not modules:
        return "no coupling"
    found: list[Layers] = []
    for i, module in enumerate(modules):
        layers = _layers(module)
        if isinstance(layers, str):
            return f"coupling {i}: {layers}"
        found.append(layers)
    known = cast("list[AdditiveCoupling]", modules)
    conditioning, partition, first = [], known[0].partition, _mlp(known[0])
    activation, context = first.activation, first.context
    halves = partition.locate(device, conditioning=True), partition.locate(device)
    for i, (coupling, layers) in enumerate(zip(known, found, strict=True)):
        side, mlp = _side(coupling.partition, partition), _mlp(coupling)
        if side is None:
            return f"coupling {i}: a partition of its own"
        if mlp.activation != activation or mlp.context != context:
            return f"coupling {i}: another activation or context than the first"
        reason = _why_not(layers, device, halves[side].size + context, halves[1 - side].size)
        if reason is not None:
            return f"coupling {i}: {reason}"
        conditioning.append(side)
    return CouplingStack(found, partition, tuple(conditioning), halves, activation, context, dtype)


def _layers(coupling: nn.Module | None) -> Layers | str:
    """The linear layers of a coupling, or why it cannot be computed from them alone."""
    if type(coupling) is not AdditiveCoupling:
        return f"a {type(coupling).__name__}, whose inside is not known"
    if runs_more_than_forward(coupling):
        return "hooks, or a forward of its own"
    mlp = coupling._modules.get("conditioner")
    layers = plain_layers(mlp)
    if isinstance(layers, str):
        return layers
    if not layers:
        return "a conditioner without layers"
    if cast("MLP", mlp).drops:
        return "dropout, in training mode"
    if coupling.grid is not None:
        return "a grid of its own"
    return layers


def _mlp(coupling: AdditiveCoupling) -> MLP:
    return cast("MLP", coupling._modules["conditioner"])


def _side(partition: Partition, first: Partition) -> int | None:
    """Which half of the first coupling's partition this one conditions on; None for neither."""
    other = ~first
    if partition is first or partition is other:  # most are: comparing costs more
        return int(partition is other)
    return 0 if partition == first else 1 if partition == other else None


def _why_not(layers: Layers, device: torch.device, inputs: int, outputs: int) -> str | None:
    """The reason why these are not dense float32 layers on ``device`` with so many inputs and
    outputs; None if they are."""
    float32, strided, width = torch.float32, torch.strided, inputs
    for weight, bias in layers:
        if not (weight.layout is strided is bias.layout):
            return "parameters that are not dense"
        if not (weight.dtype is float32 is bias.dtype):
            return f"parameters that are no float32 tensors on {device}"
        if weight.device != device or bias.device != device:
            return f"parameters that are no float32 tensors on {device}"
        shape = weight.shape
        if len(shape) != 2 or shape[1] != width or bias.shape != shape[:1]:
            return f"weights {tuple(shape)}, bias {tuple(bias.shape)} for {width} inputs"
        width = shape[0]
    return None if width == outputs else f"{width} outputs for {outputs} transformed features"
