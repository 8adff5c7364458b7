"""Scaling + prior + row sum on the CPU, in blocks of rows that stay in the cache.

What :func:`nicefast.reference.scale_log_prob` and its gradient say, in float32, with a handful of
operations on blocks that are used again and again: large temporaries would cost more in page
faults than in arithmetic. With the logistic prior,

    log p(z) = -softplus(z) - softplus(-z) = -|z| + 2 log sigmoid(|z|)

where the sigmoids, none below a half, are multiplied before the logarithm is taken, many at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .blocks import Blocks

BLOCK_ELEMENTS = 1 << 18
FACTORS = 64  # of one product: from a half to one each, it stays far from where numbers end
LEAST_ELEMENTS = 1 << 18  # below this, rows are not worth the hand-over to threads


def serves(*tensors: Tensor | None) -> bool:
    """Whether these are what the functions here compute: float32, on the CPU."""
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)


def scale_log_prob(
    h: Tensor, log_scale: Tensor, prior: str, return_z: bool
) -> tuple[Tensor, Tensor]:
    """``(z (N, D), log_prob (N,))`` of ``h`` (N, D), in nats; z is empty unless asked for."""
    n, d = h.shape
    scale = log_scale.exp()
    if n * d <= BLOCK_ELEMENTS:
        z = torch.mul(h, scale, out=torch.empty((n, d), dtype=h.dtype, device=h.device))
        log_prob = of_few(z, log_scale, prior, keeps_z=return_z)
        return z if return_z else h.new_empty(0), log_prob
    z = h.new_empty((n, d) if return_z else (0,))
    log_prob = h.new_empty(n)
    rest = constant(log_scale, prior)
    cut = _blocks(h)

    def work(share: Iterable[int]) -> None:
        first, second = h.new_empty(cut.size, d), h.new_empty(cut.size, d)
        for i in share:
            rows, out = cut[i], log_prob[cut[i]]
            count = len(out)
            b_z = torch.mul(h[rows], scale, out=z[rows] if return_z else first[:count])
            sum_log_prior(b_z, prior, 1, out, first[:count], second[:count])
            out += rest

    cut.hand_out(work)
    return z, log_prob


def of_few(z: Tensor, log_scale: Tensor, prior: str, keeps_z: bool = True, dim: int = 1) -> Tensor:
    """log_prob (N,) of rows that are scaled already, z (N, D), in nats, with as few calls as can
    be; ``z`` is written over unless it is to be kept, and ``dim`` is the one of features."""
    out = torch.empty(z.shape[1 - dim], dtype=z.dtype, device=z.device)
    sum_log_prior(z, prior, dim, out, torch.empty_like(z) if keeps_z else z, torch.empty_like(z))
    return out.add_(constant(log_scale, prior))


def constant(log_scale: Tensor, prior: str) -> Tensor:
    """What :func:`sum_log_prior` leaves out of log_prob, the same for every row."""
    if prior == "logistic":
        return log_scale.sum()
    return log_scale.sum() - log_scale.numel() / 2 * math.log(2 * math.pi)


def sum_log_prior(
    z: Tensor, prior: str, dim: int, out: Tensor, first: Tensor, second: Tensor
) -> None:
    """The prior's log-density of ``z`` summed over ``dim``, but for constants, to ``out``.

    Buffers of z's shape are written over; ``first`` may be z itself.
    """
    if prior == "logistic":
        size = torch.abs(z, out=first)
        torch.sum(size, dim, out=out).neg_()
        out.add_(_log_of_product(torch.sigmoid(size, out=second), dim), alpha=2)
    else:
        # halved first: a square overflows long before its half does
        torch.sum(torch.mul(z, -0.5, out=second).mul_(z), dim, out=out)


def _log_of_product(factors: Tensor, dim: int) -> Tensor:
    """The sum of the logarithms of numbers from a half to one over ``dim``, the first or the
    last."""
    count = factors.shape[dim]
    if count <= FACTORS:
        return torch.prod(factors, dim).log_()
    whole = count - count % FACTORS
    many, rest = factors.split((whole, count - whole), dim)
    total = torch.prod(many.unflatten(dim, (-1, FACTORS)), dim + 1).log_().sum(dim)
    return total.add_(_log_of_product(rest, dim)) if whole < count else total


def scale_log_prob_backward(
    grad_z: Tensor | None, grad_log_prob: Tensor, h: Tensor, log_scale: Tensor, prior: str
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``h`` (N, D) and ``log_scale`` (D,)."""
    n, d = h.shape
    grad_h, scale = h.new_empty(n, d), log_scale.exp()
    cut = _blocks(h)

    def work(share: range) -> Tensor:
        total = h.new_zeros(d)
        first, second = h.new_empty(cut.size, d), h.new_empty(cut.size, d)
        for i in share:
            rows = cut[i]
            g = grad_log_prob[rows, None]
            b_z = torch.mul(h[rows], scale, out=first[: len(g)])
            b_a = score(b_z, prior, out=second[: len(g)]).mul_(g)
            if grad_z is not None:
                b_a += grad_z[rows]
            torch.mul(b_a, scale, out=grad_h[rows])
            total += b_a.mul_(b_z).sum(0) + g.sum()
        return total

    total, *others = cut.deal(work)
    for other in others:
        total += other
    return grad_h, total


def score(z: Tensor, prior: str, out: Tensor | None = None) -> Tensor:
    """The derivative of the prior's log-density at each entry of ``z``; a new tensor or ``out``."""
    if prior == "logistic":  # -tanh(z / 2), at a third of its price
        return torch.sigmoid(z, out=out).mul_(-2).add_(1)
    return torch.neg(z, out=out)


def _blocks(h: Tensor) -> Blocks:
    n, d = h.shape
    return Blocks(n, max(1, BLOCK_ELEMENTS // d), LEAST_ELEMENTS // d, h.device)
