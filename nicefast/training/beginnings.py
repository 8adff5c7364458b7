"""Where training begins: the conditioners' last layers and the scaling."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from .. import priors
from ..checks import check_choice, check_number, check_tensor, check_type
from ..flow import NICE
from ..layers import MLP, AdditiveCoupling
from .recipe import STARTS


@torch.no_grad()
def init_scaling(
    model: NICE, x: Tensor, limit: float = math.inf, weights: Tensor | None = None
) -> None:
    """Set ``log_scale`` to ``log(prior standard deviation / data standard deviation)``.

    With couplings that begin near the identity, latent features then begin at the prior's own
    spread, which makes training several times shorter than beginning at ``log_scale = 0``.

    Args:
        model: the flow.
        x: (N, \\*event_shape), two or more rows.
        limit: most that log_scale is set to.
        weights: (N,), by which the standard deviation is taken; None for equal ones.

    Raises ValueError where a feature of ``x`` is constant or not finite, or the limit is NaN;
    TypeError for arguments of a wrong kind.

    >>> model = NICE(2, hidden=(8,), prior="normal")
    >>> init_scaling(model, torch.tensor([[0.0, 10.0], [2.0, 30.0], [1.0, 20.0]]))
    >>> model.scaling.log_scale.exp()
    tensor([1.0000, 0.1000], grad_fn=<ExpBackward0>)
    """
    check_type("model", model, NICE, "a nicefast.NICE")
    check_tensor("x", x)
    check_number("limit", limit, finite=False)
    deviation = _deviation(x.flatten(1).double(), weights)
    unusable = (~(deviation > 0) | ~deviation.isfinite()).nonzero().flatten().tolist()
    if unusable:
        raise ValueError(
            f"x must vary in every feature and be finite, but {len(unusable)} of its "
            f"{len(deviation)} features do not, the first of them feature {unusable[0]}"
        )
    log_scale = model.scaling.log_scale
    prior = priors.standard(model.prior_name, torch.float32, "cpu")
    found = prior.stddev.double().log().to(deviation.device) - deviation.log()
    log_scale.copy_(found.clamp(max=limit))


@torch.no_grad()
def initialise(
    model: NICE,
    start: str,
    x: Tensor,
    limit: float = math.inf,
    weights: Tensor | None = None,
) -> None:
    """Where training begins: see ``start`` of :class:`Recipe`; ``x`` are preprocessed rows.

    ``limit`` and ``weights`` are those of :func:`init_scaling`.
    """
    check_type("model", model, NICE, "a nicefast.NICE")
    check_choice("start", start, STARTS)
    for coupling in model.couplings:
        linears = cast("MLP", cast("AdditiveCoupling", coupling).conditioner).linears
        for linear in linears[-1:] if start == "data" else linears:
            layer = cast("nn.Linear", linear)
            if start == "data":
                nn.init.zeros_(layer.weight)
            else:
                nn.init.uniform_(layer.weight, -0.01, 0.01)
            nn.init.zeros_(layer.bias)
    if start == "data":
        init_scaling(model, x, limit, weights)
    else:
        model.scaling.log_scale.zero_()


def _deviation(x: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return x.std(0)
    share = (weights.double() / weights.double().sum()).to(x.device)
    unbiased = len(x) / (len(x) - 1)  # as std has it: weights that are all the same change nothing
    return (unbiased * (share @ (x - share @ x) ** 2)).sqrt()
