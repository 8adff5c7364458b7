"""convert: a peer's flow of additive couplings as a nicefast flow of its own."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..flow import NICE
from ..layers import MLP
from ..partition import Partition
from ..reference import check_prior
from .conditioners import Fit, adapt, needs_context
from .reading import read
from .steps import Affine, Base, Coupling, Permutation, Step


def convert(
    flow: nn.Module,
    prior: str | None = None,
    sequential: type[nn.Module] | Sequence[type[nn.Module]] = (),
    context: int | None = None,
) -> NICE:
    """A flow of nflows, normflows, zuko or FrEIA as an :class:`nicefast.NICE` of the same density.

    Weights are copied: both flows live on. Additive couplings become couplings, permutations new
    names of the features, element-wise affine maps (scalings, activation normalisation, loc and
    scale of the base), wherever they are, become part of the linear layers beside them and of the
    scaling: ``log_prob`` is the same to rounding. Latents and noise differ, by a permutation,
    signs and shifts. Everything is folded in float64 and kept in the flow's own dtype; no random
    number is drawn.

    Conditioners that are linear layers with one activation (relu, leaky_relu of slope 0.01, tanh,
    gelu, silu, elu) between them become :class:`nicefast.MLP`, and with one partition and its
    complement in turn take the fast paths; dropout is left out of them, where the module is set to
    evaluate. Any others are kept, as copies, and are called layer by layer, with the flow's context
    wherever the library hands it to them. Its features are known of ResidualNets, nicefast.MLPs,
    zuko's MLPs and FrEIA's conditions; where no conditioner shows them, one that uses a context
    (a copy of it is called once, on zeros, to see) needs ``context``.

    In training mode, a flow with dropout gives random densities before and after: each call draws
    anew, and not the same units. Call ``eval()`` first where densities are to be compared.

    FrEIA 0.2's ``LearnedElementwiseScaling`` scales the values rightly but gives the
    log-determinant of its inverse a wrong sign; the converted flow has the right one.

    Args:
        flow: an nflows Flow, a normflows NormalizingFlow, a zuko Flow or a FrEIA SequenceINN;
            also after :func:`nicefast.accelerate`.
        prior: ``"logistic"`` or ``"normal"``, for a SequenceINN, which has no base (its forward
            is taken to be data -> latent).
        sequential: classes of your own, derived from ``nn.Sequential``, whose ``forward`` does what
            Sequential's does (and ignores a context, say), to be seen as such.
        context: features of the context, where no conditioner shows them; 0 for a flow that is
            called without one, though its conditioners could take one.

    Raises:
        TypeError: ``flow`` is no ``torch.nn.Module``.
        ValueError: a part that is no additive coupling, permutation or element-wise affine map
            (where it is, what it is and why); a base that is neither normal nor logistic; a prior
            that is missing or not needed; a feature that is moved but never coupled; a context
            whose features are not known, or differ from those of another conditioner.

    >>> import torch, nicefast as nf
    >>> from nicefast.compat import convert
    >>> from nflows.flows import SimpleRealNVP
    >>> flow = SimpleRealNVP(4, 16, 3, 1, use_volume_preserving=True)
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(convert(flow).log_prob(x), flow.log_prob(x), atol=1e-5)
    True
    """
    if not isinstance(flow, nn.Module):
        raise TypeError(f"flow must be a torch.nn.Module, got {type(flow).__name__}")
    if prior is not None:
        check_prior(prior)
    if context is not None:
        context = operator.index(context)
        context = check_count("context", context)
    classes = (sequential,) if isinstance(sequential, type) else tuple(sequential)
    steps, base, event = read(flow, prior)
    floating = [t.detach() for t in flow.parameters() if t.is_floating_point()]
    like = floating[0] if floating else torch.empty(0, device="cpu")
    return assemble(steps, base, event, like, classes, context).train(flow.training)


def assemble(
    steps: Sequence[Step],
    base: Base,
    event: tuple[int, ...],
    like: Tensor,
    sequential: tuple[type[nn.Module], ...] = (),
    context: int | None = None,
) -> NICE:
    """The flow of ``steps``; its scaling has dtype and device of ``like``.

    Slot i of the running h is ``a[i] * u[at[i]] + b[i]``, where u are the features of the flow that
    is made: couplings add ``sign / a`` times what the conditioner sees in ``a * u + b``.

    >>> import torch
    >>> from nicefast.compat.convert import assemble
    >>> from nicefast.compat.steps import Affine, Base, Coupling
    >>> zero, two = torch.zeros(2), torch.full((2,), 2.0)
    >>> coupling = Coupling(torch.tensor([1]), torch.tensor([0]), torch.nn.Linear(1, 1), (1,))
    >>> flow = assemble([coupling, Affine(two, zero)], Base("normal", zero, two), (2,), zero)
    >>> flow.scaling.log_scale.tolist(), flow.couplings[0].partition
    ([0.0, 0.0], Partition.from_mask(2 features: .x))
    """
    d = math.prod(event)
    at = torch.arange(d, device="cpu")
    a = torch.ones(d, dtype=torch.float64, device="cpu")
    b = torch.zeros_like(a)
    fits: list[Fit] = []
    features: list[tuple[Tensor, Tensor]] = []  # conditioning and shifted ones of each
    for step in (*steps, Affine(1 / base.scale, -base.loc / base.scale)):
        if isinstance(step, Permutation):
            at, a, b = at[step.index], a[step.index], b[step.index]
        elif isinstance(step, Affine):
            a, b = step.scale * a, step.scale * b + step.shift
            if not (a.isfinite() & b.isfinite() & (a != 0)).all():
                raise ValueError(
                    "flow cannot be converted: a scale is zero, or a scale or shift is not finite"
                )
        else:
            columns, rows = at[step.conditioning].argsort(), at[step.shifted].argsort()
            c, s = step.conditioning[columns], step.shifted[rows]
            if step.full:
                columns, rows = c, s
            scale_out = step.sign / a[s]
            fits.append(Fit(step, columns, rows, a[c], b[c], scale_out, torch.zeros_like(a[s])))
            features.append((at[c], at[s]))
    if not fits:
        raise ValueError("flow cannot be converted: it has no additive coupling")
    order = at.argsort()
    at, a, b = at[order], a[order], b[order]
    _move(fits, features, b / a)
    log_scale = a.abs().log().to(like.device, like.dtype)
    known = _context([fit.coupling for fit in fits], context)
    return _build(fits, features, base.kind, event, log_scale, sequential, known)


def _move(fits: list[Fit], features: list[tuple[Tensor, Tensor]], c: Tensor) -> None:
    """Have the couplings end at u + c: by the last bias that shifts each feature."""
    for d in c.nonzero().flatten().tolist():
        shifting = [k for k, (_, shifted) in enumerate(features) if (shifted == d).any()]
        if not shifting:
            raise ValueError(
                f"flow cannot be converted: feature {d} is moved by a constant, but no coupling "
                f"shifts it, and a NICE has no other way to"
            )
        k = shifting[-1]
        fits[k].shift_out[features[k][1] == d] += c[d]
        for later in range(k + 1, len(fits)):
            fit, seen = fits[later], features[later][0] == d
            fits[later] = fit._replace(shift_in=fit.shift_in - seen * fit.scale_in * c[d])


def _context(couplings: Sequence[Coupling], asked: int | None) -> int:
    """The features of the context of a flow: as its conditioners show, or as ``asked``."""
    given = [c for c in couplings if c.passes != "never"]
    shown = {c.context for c in given if c.context is not None}
    if asked is not None:
        shown.add(asked)
    if len(shown) > 1:
        also = "" if asked is None else f" (context={asked} was asked for)"
        raise ValueError(
            f"flow cannot be converted: its couplings take contexts of {sorted(shown)} features, "
            f"and the library hands one context to all of them{also}"
        )
    known = shown.pop() if shown else None
    hidden = [] if known or asked is not None else [c for c in given if c.context is None]
    for coupling in hidden:
        if needs_context(coupling):
            raise ValueError(
                f"flow cannot be converted: a conditioner, a {type(coupling.conditioner).__name__},"
                " takes a context whose features it does not show: give their number as context=, "
                "or context=0 where the flow is called without one"
            )
    return known or 0


def _build(
    fits: list[Fit],
    features: list[tuple[Tensor, Tensor]],
    prior: str,
    event: tuple[int, ...],
    log_scale: Tensor,
    sequential: tuple[type[nn.Module], ...],
    context: int,
) -> NICE:
    partitions = []
    for conditioning, _ in features:
        mask = torch.zeros(math.prod(event), dtype=torch.bool, device="cpu")
        mask[conditioning] = True
        partitions.append(Partition.from_mask(mask))
    conditioners = [adapt(fit, context, sequential) for fit in fits]
    mlps = [m for m in conditioners if type(m) is MLP]
    hidden: Any = [
        [m.out_features for m in list(c.linears)[:-1]] if isinstance(c, MLP) else []
        for c in conditioners
    ]
    activation = mlps[0].activation if mlps else "relu"
    with torch.device("meta"):  # for its structure: all parameters are put in
        flow = NICE(event, hidden, len(fits), prior, partitions, activation, context)
    for coupling, conditioner in zip(flow.couplings, conditioners, strict=True):
        coupling.conditioner = conditioner
    flow.scaling.log_scale = nn.Parameter(log_scale)
    return flow
