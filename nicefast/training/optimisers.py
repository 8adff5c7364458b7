"""What changes the weights in a step: optimiser, learning rate, moving average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

SCHEDULES = ("constant", "cosine", "exponential")


class RMSProp(Optimizer):
    """RMSProp as the code released with the paper has it, with momentum.

    ``r <- a r + (1 - a) g^2``, ``v <- m v - lr g / max(sqrt(r), stabiliser)``, ``w <- w + v``:
    :class:`torch.optim.RMSprop` adds the stabiliser where this takes the larger of the two.

    >>> w = nn.Parameter(torch.ones(1))
    >>> w.grad = torch.full((1,), 4.0)
    >>> RMSProp([w], lr=0.1, averaging=0.75, momentum=0.0, stabiliser=1e-2).step()
    >>> w
    Parameter containing:
    tensor([0.8000], requires_grad=True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        averaging: float = 0.95,
        momentum: float = 0.0,
        stabiliser: float = 1e-2,
    ) -> None:
        defaults = {
            "lr": lr,
            "averaging": averaging,
            "momentum": momentum,
            "stabiliser": stabiliser,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            known = [p for p in group["params"] if p.grad is not None]
            for p in known:
                if not self.state[p]:
                    self.state[p]["square"] = torch.zeros_like(p)
                    self.state[p]["velocity"] = torch.zeros_like(p)
            if not known:
                continue
            grads = [p.grad for p in known]
            squares = [self.state[p]["square"] for p in known]
            velocities = [self.state[p]["velocity"] for p in known]
            torch._foreach_mul_(squares, group["averaging"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["averaging"])
            scale = torch._foreach_sqrt(squares)
            torch._foreach_clamp_min_(scale, group["stabiliser"])
            change = torch._foreach_div(grads, scale)
            torch._foreach_mul_(change, group["lr"])
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_sub_(velocities, change)
            torch._foreach_add_(known, velocities)


#: what each kind of optimiser keeps for a parameter
STATES: dict[type[Optimizer], set[str]] = {
    RMSProp: {"square", "velocity"},
    Adam: {"step", "exp_avg", "exp_avg_sq"},
    AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def make_optimiser(
    model: nn.Module,
    name: str,
    lr: float | Tensor,
    momentum: float,
    averaging: float,
    eps: float,
    weight_decay: float,
) -> Optimizer:
    """adam, adamw or rmsprop; ``averaging`` is the decay of the squared gradients' average.

    Weight decay takes weight matrices alone. On a GPU the optimiser can be captured in a graph.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    if name == "rmsprop":
        return RMSProp(model.parameters(), lr, averaging, momentum, eps)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kind = {"adam": Adam, "adamw": AdamW}[name]
    return kind(
        [g for g in groups if g["params"]],
        lr=lr,
        betas=(momentum, averaging),
        eps=eps,
        fused=True,
        capturable=on_gpu,
    )


def learning_rate(
    step: int, steps: int, lr: float, schedule: str, warmup: int, decay: float, least: float
) -> float:
    """Of step ``step`` = 0, 1, ... of ``steps``: linear from 0 over ``warmup`` steps, times

        constant       1
        cosine         (1 + cos(pi step / steps)) / 2
        exponential    decay^step

    and never below ``least`` after the warm-up.

    >>> learning_rate(0, 100, 1.0, "constant", warmup=4, decay=1.0, least=0.0)
    0.25
    >>> learning_rate(50, 100, 1.0, "cosine", warmup=0, decay=1.0, least=0.0)
    0.5
    """
    shape = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))),
        "exponential": decay**step,
    }[schedule]
    return max(lr * shape, least) * min(1.0, (step + 1) / max(warmup, 1))


@torch.no_grad()
def average(into: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """``a <- decay a + (1 - decay) w`` for each pair."""
    torch._foreach_lerp_(list(into), list(weights), 1 - decay)
