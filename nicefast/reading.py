"""A flow's couplings as plain tensors, read again only where something about them has changed.

Before each call :mod:`nicefast.path` has to know of every module what it computes, so that no
change to a flow goes unseen; with few rows that costs as much as the products do. So what was read
is kept, with everything it was read from, and to see that this is still the same takes less time:
modules, their types, hooks and settings, which parameters they have, of which dtype, device and
shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain as concatenated
from itertools import repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import cast

import torch
from torch import nn

from . import watchers
from .fused.chain import NARROW, Chain, Layers
from .layers import HOOKS, MLP, AdditiveCoupling, is_watched, plain_layers

REBUILD_WIDTH = NARROW  # up to this hidden width the backward pass rebuilds activations

_inside = itemgetter("_modules", "_parameters", *HOOKS)  # of any module's dictionary,
_of_coupling = itemgetter("partition", "grid")  # of a coupling's,
_of_mlp = itemgetter("activation", "context", "training", "dropout")  # and of its conditioner's
_of_tensor = attrgetter("dtype", "device", "shape")
_PLACE = "_nicefast_reading"  # in the dictionary of a list of couplings


class _Reading:
    """What was read, and from what. It lies with the list of couplings, which it does not hold, and
    no deep copy of the list has it. Every call asks :meth:`is_of`: its loops are in C."""

    def __init__(self, couplings: nn.ModuleList, chain: Chain) -> None:
        self.chain, self.in_bfloat16 = chain, replace(chain, bfloat16=True)
        own = list(couplings)
        mlps = [_mlp(coupling) for coupling in own]
        lists = [mlp.linears for mlp in mlps]
        self._modules = [*own, *mlps, *lists, *concatenated.from_iterable(lists)]
        self._insides, self._settings = self._look(couplings)
        self._tensors = list(map(_of_tensor, chain.parameters))

    def is_of(self, couplings: nn.ModuleList, device: torch.device) -> bool:
        """Whether to read again would find the same."""
        insides, settings = self._look(couplings)
        return (
            self.chain.device == device
            and len(insides) == len(self._insides)
            and all(map(is_, insides, self._insides))  # tensors have an == of their own
            and settings == self._settings
            and list(map(_of_tensor, self.chain.parameters)) == self._tensors
        )

    def _look(self, couplings: nn.ModuleList) -> tuple[list[object], list[object]]:
        """What modules have in them: modules, parameters, hooks; and what else counts."""
        count, own = len(self.chain.couplings), list(map(vars, self._modules))
        own.append(vars(couplings))
        insides = filter(None, concatenated.from_iterable(map(_inside, own)))
        return list(concatenated.from_iterable(map(dict.values, insides))), [
            *map(type, self._modules),
            *map(type, self.chain.parameters),
            *map(contains, own, repeat("forward")),
            *map(_of_coupling, own[:count]),
            *map(_of_mlp, own[count : 2 * count]),
        ]

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def read(couplings: nn.ModuleList, device: torch.device, bfloat16: bool) -> Chain | str:
    """The couplings as plain tensors on ``device``, or why they can't be seen as such;
    ``bfloat16``: the operands of products.

    >>> import torch, nicefast as nf
    >>> from nicefast.reading import read
    >>> flow = nf.NICE(4, hidden=(8,))
    >>> read(flow.couplings, torch.device("cpu"), False).products
    8
    >>> _ = flow.couplings[1].register_forward_hook(lambda *_: None)
    >>> read(flow.couplings, torch.device("cpu"), False)
    'coupling 1: hooks, or a forward of its own'
    """
    if nn.modules.module._has_any_global_hook():
        return "global module hooks"
    keeps = type(couplings) is nn.ModuleList
    reading = vars(couplings).get(_PLACE) if keeps else None
    if reading is None or not reading.is_of(couplings, device):
        if reading is not None:
            vars(couplings).pop(_PLACE, None)  # another thread may have done it
        found = _read(list(couplings), device)
        if isinstance(found, str):
            return found
        if not (keeps and _is_lasting(found)):
            return replace(found, bfloat16=bfloat16)
        reading = vars(couplings)[_PLACE] = _Reading(couplings, found)
    return reading.in_bfloat16 if bfloat16 else reading.chain


def _is_lasting(chain: Chain) -> bool:
    """Whether this is more than what was put in for one call, or what a mode has made."""
    own = all(type(p) is nn.Parameter and p.is_leaf for p in chain.parameters)
    return own and not watchers.has_modes()


def _read(couplings: Sequence[nn.Module], device: torch.device) -> Chain | str:
    inside = []
    for i, coupling in enumerate(couplings):
        layers = _layers(coupling)
        if isinstance(layers, str):
            return f"coupling {i}: {layers}"
        inside.append(layers)
    known = cast("Sequence[AdditiveCoupling]", couplings)
    first = known[0].partition
    other = ~first
    sides = (first.locate(device, True), first.locate(device, False))
    mlp = _mlp(known[0])
    conditions, float32, strided = [], torch.float32, torch.strided
    for i, (coupling, layers) in enumerate(zip(known, inside, strict=True)):
        own, partition = _mlp(coupling), coupling.partition
        if partition is first or (partition is not other and partition == first):
            side = 0
        elif partition is other or partition == other:
            side = 1
        else:
            return f"coupling {i}: a partition of its own"
        if own.activation != mlp.activation or own.context != mlp.context:
            return f"coupling {i}: another activation or context than the first"
        width, goal = sides[side].size + own.context, sides[1 - side].size
        for weight, bias in layers:
            same = weight.dtype is float32 is bias.dtype
            if not (weight.layout is strided is bias.layout):
                return f"coupling {i}: parameters that are not dense"
            if not same or weight.device != device or bias.device != device:
                return f"coupling {i}: parameters that are no float32 tensors on {device}"
            out = bias.shape[0]
            if weight.shape != (out, width):
                return f"coupling {i}: weights {tuple(weight.shape)} for {width} inputs"
            width = out
        if width != goal:
            return f"coupling {i}: {width} outputs for {goal} shifted features"
        conditions.append(side)
    hidden = max([bias.shape[0] for layers in inside for _, bias in layers[:-1]])
    return Chain(
        couplings=tuple(inside),
        conditions=tuple(conditions),
        sides=sides,
        activation=mlp.activation,
        context=mlp.context,
        bfloat16=False,
        rebuild=hidden <= REBUILD_WIDTH,
    )


def _mlp(coupling: nn.Module) -> MLP:
    return cast("MLP", coupling.__dict__["_modules"]["conditioner"])  # no way round by __getattr__


def _layers(coupling: nn.Module) -> Layers | str:
    """The linear layers of a coupling, or why it can't be computed from them alone."""
    if type(coupling) is not AdditiveCoupling:
        return f"a {type(coupling).__name__}, whose inside is not known"
    mlp = coupling._modules.get("conditioner")
    layers = plain_layers(mlp)
    if isinstance(layers, str):
        return layers
    if is_watched(coupling):
        return "hooks, or a forward of its own"
    if len(layers) < 2:
        return "no hidden layer"
    if cast("MLP", mlp).drops:
        return "dropout, in training mode"
    if coupling.grid is not None:
        return "a grid of its own"
    return tuple(layers)
