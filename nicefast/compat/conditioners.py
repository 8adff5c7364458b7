"""Conditioners taken over from other libraries: as an MLP wherever they are one."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..layers import MLP, runs_more_than_forward
from .steps import Coupling

MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}
_SEQUENCES = (("zuko.nn", "MLP"), ("torch.nn.modules.container", "Sequential"))


class Fit(NamedTuple):
    """What a conditioner of nicefast has that of ``coupling`` do, in float64.

    Its input x1 is ``scale_in * x1 + shift_in`` of the old one's features ``columns``; its output
    ``scale_out * old + shift_out`` of the old one's outputs ``rows``.
    """

    coupling: Coupling
    columns: Tensor
    rows: Tensor
    scale_in: Tensor
    shift_in: Tensor
    scale_out: Tensor
    shift_out: Tensor


class Adapted(nn.Module):
    """A conditioner of any kind, its inputs and outputs reordered and rescaled.

    Shapes: x1 (N, C), context (N, K) or none -> (N, S).

    >>> import torch
    >>> from nicefast.compat.conditioners import Adapted, Fit
    >>> from nicefast.compat.steps import Coupling
    >>> reverse, one = torch.tensor([1, 0]), torch.ones(2, dtype=torch.float64)
    >>> coupling = Coupling(torch.tensor([1, 0]), torch.tensor([2, 3]), torch.nn.Identity(), (2,))
    >>> fit = Fit(coupling, reverse, torch.arange(2), one, 0 * one, 2 * one, 0 * one)
    >>> Adapted(fit)(torch.tensor([[1.0, 5.0]]))
    tensor([[10.,  2.]])
    """

    def __init__(self, fit: Fit) -> None:
        super().__init__()
        coupling = fit.coupling
        self.conditioner = copy.deepcopy(coupling.conditioner)
        self.shape, self.passes = coupling.shape, coupling.passes
        self.width = torch.Size(coupling.shape).numel()
        like = next((p for p in self.conditioner.parameters() if p.is_floating_point()), None)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        device = torch.device("cpu") if like is None else like.device
        for name in ("columns", "rows"):
            self.register_buffer(name, getattr(fit, name).to(device))
        for name in ("scale_in", "shift_in", "scale_out", "shift_out"):
            self.register_buffer(name, getattr(fit, name).to(device, dtype))

    def forward(self, x1: Tensor, context: Tensor | None = None) -> Tensor:
        own = cast("dict[str, Tensor]", self._buffers)
        h = x1 * own["scale_in"] + own["shift_in"]
        placed = h.new_zeros(len(h), self.width).index_copy(1, own["columns"], h)
        h = placed.view(-1, *self.shape)
        if self.passes == "never":
            context = None  # this one has none, where another coupling has
        if self.passes == "always":
            shift = self.conditioner(h, context)
        elif context is None:
            shift = self.conditioner(h)
        elif self.passes == "joined":
            shift = self.conditioner(torch.cat((h, context), 1))
        else:
            shift = self.conditioner(h, context)
        return shift.flatten(1)[:, own["rows"]] * own["scale_out"] + own["shift_out"]


def adapt(fit: Fit, context: int, sequential: tuple[type[nn.Module], ...] = ()) -> nn.Module:
    """A conditioner of its own weights for one coupling of a flow with ``context`` features.

    An :class:`nicefast.MLP` where the old one is linear layers with one activation between them;
    otherwise a Sequential where it begins and ends with a linear layer; otherwise an
    :class:`Adapted` copy.

    >>> import torch
    >>> from nicefast.compat.conditioners import Fit, adapt
    >>> from nicefast.compat.steps import Coupling
    >>> one, first, last = torch.ones(1).double(), torch.tensor([0]), torch.tensor([1])
    >>> net = torch.nn.Sequential(*map(torch.nn.Linear, (1, 4), (4, 1)))
    >>> coupling = Coupling(first, last, net, (1,))
    >>> type(adapt(Fit(coupling, first, first, one, 0 * one, one, 0 * one), 0)).__name__
    'Sequential'
    """
    coupling = fit.coupling
    layers = None if len(coupling.shape) > 1 else sequence(coupling.conditioner, sequential)
    own = coupling.context or 0  # what is a sequence takes none that it does not show
    width = torch.Size(coupling.shape).numel() + own
    if not layers or not (_is_linear(layers[0]) and _is_linear(layers[-1])):
        return Adapted(fit)
    if cast("nn.Linear", layers[0]).weight.shape[1] != width:
        return Adapted(fit)  # it broadcasts, or does what is not known
    if cast("nn.Linear", layers[-1]).weight.shape[0] <= int(fit.rows.max()):
        return Adapted(fit)
    name = _activation(layers)
    if name is None and context:
        return Adapted(fit)
    made = [_linear(m) if _is_linear(m) else copy.deepcopy(m) for m in layers]
    first, last = cast("nn.Linear", made[0]), cast("nn.Linear", made[-1])
    old = first.weight.detach().to("cpu", torch.float64)
    known = old[:, fit.columns]
    extra = old[:, width - own :]
    if not own:
        extra = old.new_zeros(len(old), context)
    bias = first.bias.detach().to("cpu", torch.float64) + known @ fit.shift_in
    _put(first, torch.cat((known * fit.scale_in, extra), 1), bias)
    old, bias = (t.detach().to("cpu", torch.float64) for t in (last.weight, last.bias))
    _put(
        last,
        fit.scale_out[:, None] * old[fit.rows],
        fit.scale_out * bias[fit.rows] + fit.shift_out,
    )
    if name is None:
        return nn.Sequential(*made)
    linears = cast("list[nn.Linear]", [m for m in made if isinstance(m, nn.Linear)])
    hidden = [m.out_features for m in linears[:-1]]
    with torch.device("meta"):
        mlp = MLP(len(fit.columns), hidden, len(fit.rows), name, context)
    mlp.linears = nn.ModuleList(linears)
    return mlp


def sequence(module: nn.Module, also: tuple[type[nn.Module], ...] = ()) -> list[nn.Module] | None:
    """What a conditioner calls one after the other, without what does nothing; None if unknown.

    >>> import torch
    >>> from nicefast.compat.conditioners import sequence
    >>> sequence(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(torch.nn.Tanh())))
    [Tanh()]
    """
    if runs_more_than_forward(module):
        return None
    kind = (type(module).__module__, type(module).__name__)
    inner: list[nn.Module]
    if isinstance(module, nn.Sequential) and (kind in _SEQUENCES or type(module) in also):
        inner = list(module)
    elif kind == ("normflows.nets.mlp", "MLP"):
        inner = [cast("nn.Module", module.net)]
    elif kind == ("nflows.nn.nets.mlp", "MLP"):
        own = cast("Any", module)
        activation = _called(own._activation)
        if activation is None or own._activate_output or len(own._in_shape) > 1:
            return None
        linears = [own._input_layer, *own._hidden_layers, own._output_layer]
        inner = [m for linear in linears for m in (linear, activation())][:-1]
    elif type(module) is MLP:
        units = [MODULES[module.activation](), nn.Dropout(module.dropout)]
        units[1].train(module.training)
        inner = [m for linear in module.linears for m in (linear, *units)][:-2]
    elif type(module) is nn.Identity or (
        type(module) is nn.Dropout and (module.p == 0 or not module.training)
    ):
        return []
    elif isinstance(module, nn.Sequential):
        return None
    else:
        return [module]
    found = [sequence(m, also) for m in inner]
    if any(m is None for m in found):
        return None
    return list(itertools.chain(*cast("list[list[nn.Module]]", found)))


class _IsUsed(Exception):  # noqa: N818
    """A conditioner did something with its context."""


class _Context(Tensor):
    """A context that nothing can be done with."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise _IsUsed


def needs_context(coupling: Coupling) -> bool:
    """Whether a conditioner that does not show its context does something with one, or can't be
    called without: a copy of it is called once, on two rows of zeros, in evaluation mode.

    >>> import torch
    >>> from nicefast.compat.conditioners import needs_context
    >>> from nicefast.compat.steps import Coupling
    >>> class Net(torch.nn.Linear):
    ...     def forward(self, x, context=None):
    ...         return super().forward(x if context is None else x + context)
    >>> one = torch.tensor([0])
    >>> needs_context(Coupling(one, one + 1, Net(1, 1), (1,), context=None, passes="always"))
    True
    """
    net = copy.deepcopy(coupling.conditioner).eval()
    like = next((p for p in net.parameters() if p.is_floating_point()), None)
    dtype = torch.get_default_dtype() if like is None else like.dtype
    device = torch.device("cpu") if like is None else like.device
    x = torch.zeros(2, *coupling.shape, dtype=dtype, device=device)
    context = torch.zeros(2, 1, dtype=dtype, device=device).as_subclass(_Context)
    given = (x, context) if coupling.passes == "always" else (x,)
    with torch.no_grad(), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        try:
            net(*given)
        except Exception:  # of whatever kind, its own: what it takes is not known
            return True
    return False


def input_width(net: Any) -> int | None:
    """The features that a conditioner takes, where it shows them."""
    layers = sequence(net)
    if layers and _is_linear(layers[0]):
        return cast("Tensor", layers[0].weight).shape[1]
    found = getattr(net, "in_features", None)
    return found if isinstance(found, int) else None


def _activation(layers: list[nn.Module]) -> str | None:
    """The one activation between linear layers, by nicefast's name; None where it has none."""
    if len(layers) % 2 == 0 or not all(map(_is_linear, layers[::2])):
        return None
    names = {_name(m) for m in layers[1::2]} or {"relu"}
    return names.pop() if len(names) == 1 else None


def _name(module: nn.Module) -> str | None:
    own = cast("Any", module)
    if type(module) is nn.LeakyReLU:
        return {0.0: "relu", 0.01: "leaky_relu"}.get(own.negative_slope)
    if type(module) is nn.GELU and own.approximate != "none":
        return None
    if type(module) is nn.ELU and own.alpha != 1:
        return None
    return next((name for name, kind in MODULES.items() if type(module) is kind), None)


def _called(function: Any) -> type[nn.Module] | None:
    """The module that does what a function of torch does."""
    f = nn.functional
    for kind, names in {
        nn.ReLU: (f.relu, torch.relu),
        nn.Tanh: (f.tanh, torch.tanh),
        nn.SiLU: (f.silu,),
        nn.GELU: (f.gelu,),
        nn.ELU: (f.elu,),
        nn.LeakyReLU: (f.leaky_relu,),
    }.items():
        if function in names:
            return kind
    return type(function) if type(function) in MODULES.values() else None


def _is_linear(module: nn.Module) -> bool:
    kind = type(module)
    theirs = (kind.__module__, kind.__name__) == ("zuko.nn", "Linear")
    return kind is nn.Linear or (theirs and cast("Tensor", module.weight).dim() == 2)


def _linear(module: nn.Module) -> nn.Linear:
    """A linear layer of its own weights, with a bias, whichever library it was from."""
    weight, bias = cast("Tensor", module.weight).detach(), cast("Tensor | None", module.bias)
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight = nn.Parameter(weight.clone())
    made.bias = nn.Parameter(
        weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
    )
    return made.train(module.training)


def _put(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    like = linear.weight
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.to(like.device, like.dtype))
    linear.bias = nn.Parameter(bias.to(like.device, like.dtype))
