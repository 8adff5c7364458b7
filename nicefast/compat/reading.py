"""The flows of nflows, normflows, zuko and FrEIA as steps in data -> latent order, and a base.

Parts are known by the names of their classes: no library is imported that a flow is not from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .conditioners import input_width
from .parts import (
    UNKNOWN,
    Event,
    checked_base,
    context_of,
    each,
    kind_of,
    native_steps,
    normflows_half,
    others,
    refused,
    standard_base,
)
from .replacing import PEERS
from .steps import Affine, Base, Coupling, Permutation, Step, inverted, slots, spread


def read(flow: nn.Module, prior: str | None) -> tuple[list[Step], Base, Event]:
    """Steps, base and event shape of a whole flow; errors as of :func:`nicefast.convert`.

    >>> from nflows.flows import SimpleRealNVP
    >>> from nicefast.compat.reading import read
    >>> steps, base, event = read(SimpleRealNVP(4, 8, 3, 1, use_volume_preserving=True), None)
    >>> len(steps), base.kind, event
    (3, 'normal', (4,))
    """
    packages = [base.__module__.partition(".")[0] for base in type(flow).__mro__]
    peer = next((package for package in packages if package in PEERS), None)
    top = {"nflows": _nflows, "normflows": _normflows, "zuko": _zuko, "FrEIA": _freia}
    whole = {
        "nflows": "Flow",
        "normflows": "NormalizingFlow",
        "zuko": "Flow",
        "FrEIA": "SequenceINN",
    }
    names = [base.__name__ for base in type(flow).__mro__]
    if peer is None or whole[peer] not in names:
        wanted = ", ".join(f"{package}'s {name}" for package, name in whole.items())
        raise ValueError(f"flow must be one of {wanted}, got {type(flow).__name__}")
    return top[peer](flow, prior)


# --- nflows: data -> latent


def _nflows(flow: Any, prior: str | None) -> tuple[list[Step], Base, Event]:
    if type(flow._embedding_net) is not nn.Identity:
        raise refused(flow._embedding_net, "_embedding_net", "has no place in a NICE")
    if type(flow)._log_prob.__module__.partition(".")[0] != "nflows":
        raise refused(flow, "flow", "has a _log_prob of its own")
    base = flow._distribution
    kind = kind_of(base, "nflows")
    event = tuple(getattr(base, "_shape", getattr(base, "shape", ())))
    known = None
    if kind in ("StandardNormal", "Logistic"):
        known = standard_base("normal" if kind == "StandardNormal" else "logistic", event)
    elif kind == "DiagonalNormal":
        loc, scale = base.mean_.view(event), base.log_std_.double().exp().view(event)
        known = Base("normal", spread(loc, event), spread(scale, event))
    known = checked_base(base, "_distribution", prior, known)
    return _nflows_steps(flow._transform, "_transform", event), known, event


def _nflows_steps(part: Any, where: str, event: Event) -> list[Step]:
    kind, channels = kind_of(part, "nflows"), (-1, *(1,) * (len(event) - 1))
    if kind == "CompositeTransform":
        return each(_nflows_steps, part._transforms, f"{where}._transforms", event)
    if kind == "InverseTransform":
        return inverted(_nflows_steps(part._transform, f"{where}._transform", event))
    if kind == "IdentityTransform":
        return []
    if kind in ("Permutation", "RandomPermutation", "ReversePermutation"):
        index = slots(event).index_select(part._dim - 1, part._permutation.cpu())
        return [Permutation(index.flatten())]
    if kind in ("PointwiseAffineTransform", "AffineTransform"):
        return [Affine(spread(part._scale, event), spread(part._shift, event))]
    if kind == "ActNorm":
        if not part.initialized:
            raise refused(part, where, "has not been initialised by a first batch")
        scale, shift = part.log_scale.double().exp().view(channels), part.shift.view(channels)
        return [Affine(spread(scale, event), spread(shift, event))]
    if kind == "BatchNorm":
        if part.training:
            raise refused(part, where, "depends on the batch in training mode: call eval() first")
        scale = part.weight.double() / (part.running_var.double() + part.eps).sqrt()
        shift = part.bias - part.running_mean * scale
        return [Affine(spread(scale, event), spread(shift, event))]
    if kind == "AdditiveCouplingTransform":
        if part.unconditional_transform is not None:
            raise refused(part, where, "has a transform of its conditioning features")
        if event[0] != part.features:
            raise refused(part, where, f"is for {part.features} features, the base has {event[0]}")
        given, rest = part.identity_features.cpu(), part.transform_features.cpu()
        c, s = (slots(event)[index].flatten() for index in (given, rest))
        shape = (len(given), *event[1:])
        net = part.transform_net
        if getattr(net, "context_channels", None):
            raise refused(net, where, "has a context of images: a context is one vector")
        return [Coupling(c, s, net, shape, context=context_of(net), passes="always")]
    native = native_steps(part, "nflows", event)
    if native is None:
        raise refused(part, where, UNKNOWN)
    return native


# --- normflows: latent -> data


def _normflows(flow: Any, prior: str | None) -> tuple[list[Step], Base, Event]:
    if type(flow).log_prob.__module__.partition(".")[0] != "normflows":
        raise refused(flow, "flow", "has a log_prob of its own")
    base = flow.q0
    kind = kind_of(base, "normflows")
    event = tuple(getattr(base, "shape", ()))
    known = None
    if kind == "Logistic":
        known = standard_base("logistic", event)
    elif kind == "DiagGaussian":
        scale = base.log_scale[0].double().exp() * (base.temperature or 1)
        known = Base("normal", spread(base.loc[0], event), spread(scale, event))
    known = checked_base(base, "q0", prior, known)
    return inverted(each(_normflows_steps, flow.flows, "flows", event)), known, event


def _normflows_steps(part: Any, where: str, event: Event) -> list[Step]:
    kind = kind_of(part, "normflows")
    if kind == "Composite":
        return each(_normflows_steps, part._flows, f"{where}._flows", event)
    if kind == "Reverse":
        return inverted(_normflows_steps(part.flow, f"{where}.flow", event))
    if kind == "Permute":
        order = slots((part.num_channels,))
        moved = part.perm.cpu() if part.mode == "shuffle" else order.roll(-(len(order) // 2))
        return [Permutation(slots(event)[moved].flatten())]
    if kind in ("AffineConstFlow", "ActNorm"):
        if kind == "ActNorm" and not part.data_dep_init_done > 0:
            raise refused(part, where, "has not been initialised by a first batch")
        scale = part.s[0].double().exp()
        return [Affine(spread(scale, event), spread(part.t[0], event))]
    if kind == "AffineCouplingBlock":
        kinds = [kind_of(inner, "normflows") for inner in part.flows]
        if kinds != ["Split", "AffineCoupling", "Merge"]:
            raise refused(part, where, f"has parts that are not known (hooks?): {list(part.flows)}")
        mode, inner = part.flows[0].mode, part.flows[1]
        if part.flows[2].mode != mode:
            raise refused(part, where, f"splits by {mode} and merges by {part.flows[2].mode}")
        if inner.scale:
            raise refused(part, where, "is affine, not additive: it has scale=True")
        c, shape = normflows_half(mode, event)
        return [Coupling(c, others(c, event), inner.param_map, shape)]
    if kind == "MaskedAffineFlow":
        if part.s is not torch.zeros_like:
            raise refused(part, where, "is affine, not additive: it has an s")
        if part.t is torch.zeros_like:
            return []
        mask = part.b[0].expand(event).flatten().cpu()
        if not ((mask == 0) | (mask == 1)).all():
            raise refused(part, where, "has a mask b of other values than 0 and 1")
        c = mask.nonzero().flatten()
        return [Coupling(c, others(c, event), part.t, event, full=True)]
    native = native_steps(part, "normflows", event)
    if native is None:
        raise refused(part, where, UNKNOWN)
    return inverted(native)


# --- zuko: data -> latent


def _zuko(flow: Any, prior: str | None) -> tuple[list[Step], Base, Event]:
    if type(flow).forward.__module__ != "zuko.lazy":
        raise refused(flow, "flow", "has a forward of its own")
    base = flow.base
    kind, known, event = kind_of(base, "zuko"), None, (0,)
    if kind in ("UnconditionalDistribution", "Logistic"):
        found = base(None)
        event = tuple(found.event_shape)
        while isinstance(found, torch.distributions.Independent):
            found = found.base_dist
        name = type(found).__name__
        if name in ("Normal", "Logistic"):
            known = Base(name.lower(), spread(found.loc, event), spread(found.scale, event))
    known = checked_base(base, "base", prior, known)
    return _zuko_steps(flow.transform, "transform", event), known, event


def _zuko_steps(part: Any, where: str, event: Event) -> list[Step]:
    kind = kind_of(part, "zuko")
    if kind == "LazyComposedTransform":
        return each(_zuko_steps, part.transforms, f"{where}.transforms", event)
    if kind == "LazyInverse":
        return inverted(_zuko_steps(part.transform, f"{where}.transform", event))
    if kind == "GeneralCouplingTransform":
        univariate = (getattr(part.univariate, k, "") for k in ("__module__", "__name__"))
        additive = tuple(univariate) == ("zuko.transforms", "AdditiveTransform")
        if not additive or [tuple(shape) for shape in part.shapes] != [()]:
            raise refused(part, where, "is not additive: its univariate is no AdditiveTransform")
        mask = part.mask.cpu()
        c, s = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        width, shape = input_width(part.hyper), (len(c),)
        context = None if width is None else width - len(c)
        if context is not None and context < 0:
            raise refused(part, where, f"has a hyper of {width} inputs, and {len(c)} condition")
        return [Coupling(c, s, part.hyper, shape, context=context, passes="joined")]
    if kind == "UnconditionalTransform" or (
        kind == "ElementWiseTransform" and hasattr(part, "phi")
    ):
        return _transform(part(None), where, event)
    native = native_steps(part, "zuko", event)
    if native is None:
        raise refused(part, where, UNKNOWN)
    return native


def _transform(t: Any, where: str, event: Event) -> list[Step]:
    """A transform of zuko or of torch.distributions without parameters to condition on."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    kind = type(t).__name__
    if kind in ("DependentTransform", "IndependentTransform"):
        return _transform(getattr(t, "base", None) or t.base_transform, where, event)
    if kind in ("ComposedTransform", "ComposeTransform"):
        return [s for p in getattr(t, "transforms", t) for s in _transform(p, where, event)]
    if kind == "IdentityTransform":
        return []
    if kind == "PermutationTransform":
        return [Permutation(t.order.cpu())]
    if kind == "MonotonicAffineTransform":
        return [Affine(spread(t.scale, event), spread(t.shift, event))]
    if kind == "AdditiveTransform":
        return [Affine(spread(one, event), spread(t.shift, event))]
    if kind == "AffineTransform":
        return [Affine(*(spread(one * v, event) for v in (t.scale, t.loc)))]
    raise refused(t, where, "is no permutation or element-wise affine map")


# --- FrEIA: data -> latent


def _freia(flow: Any, prior: str | None) -> tuple[list[Step], Base, Event]:
    if prior is None:
        raise ValueError("prior must be given for a SequenceINN: 'logistic' or 'normal'")
    if type(flow).forward.__module__.partition(".")[0] != "FrEIA":
        raise refused(flow, "flow", "has a forward of its own")
    used = sorted({c for c in flow.conditions if c is not None})
    if len(used) > 1:
        raise refused(flow, "flow", f"has several conditions, {used}: a NICE has one context")
    event = tuple(flow.shapes[0])
    steps = each(_freia_steps, flow.module_list, "module_list", event)
    return steps, standard_base(prior, event), event


def _freia_steps(part: Any, where: str, event: Event) -> list[Step]:
    kind = kind_of(part, "FrEIA")
    if kind == "NICECouplingBlock":
        if part.conditional and len(event) > 1:
            raise refused(part, where, "has a condition of images: a context is one vector")
        first, second = slots(event)[: part.split_len1], slots(event)[part.split_len1 :]
        known, passes = part.condition_length, "joined" if part.conditional else "never"
        return [
            Coupling(c.flatten(), s.flatten(), net, tuple(c.shape), 1, False, known, passes)
            for c, s, net in ((second, first, part.F), (first, second, part.G))
        ]
    if kind == "PermuteRandom":
        return [Permutation(slots(event)[part.perm.cpu()].flatten())]
    if kind == "LearnedElementwiseScaling":
        scale = spread(part.s[0].double().exp(), event)
        return [Affine(scale, torch.zeros_like(scale))]
    if kind == "ActNorm":
        if part.init_on_next_batch:
            raise refused(part, where, "has not been initialised by a first batch")
        return [Affine(spread(part.scale[0].double().exp(), event), spread(part.bias[0], event))]
    native = native_steps(part, "FrEIA", event)
    if native is None:
        raise refused(part, where, UNKNOWN)
    if any(len(shape) > 1 for shape in part.dims_c):
        raise refused(part, where, "has a condition of images: a context is one vector")
    known, passes = (part.dims_c[0][0], "argument") if part.dims_c else (0, "never")
    return [
        replace(step, context=known, passes=passes) if isinstance(step, Coupling) else step
        for step in native
    ]
