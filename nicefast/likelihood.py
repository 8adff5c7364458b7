"""Scaling + prior + row sum in float32. :func:`scale_log_prob` and its gradient work on the CPU, in
blocks of rows that stay in the cache; the other functions work on any device.

The definition is :func:`nicefast.reference.scale_log_prob`. Here are few operations on blocks whose
memory is used again: large temporaries would cost more in page faults than in arithmetic. With the
logistic prior,

    log p(z) = -softplus(z) - softplus(-z) = -|z| + 2 log sigmoid(|z|)

where the sigmoids, none of which is below a half, are multiplied before the logarithm is taken: one
logarithm for up to 64 features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .runtime.threads import settle_allocator

BLOCK_ELEMENTS = 1 << 18  # of h in one block: 1 MiB
FACTORS = 64  # of one product: each is between a half and one, so it stays far from underflow


def serves(*tensors: Tensor | None) -> bool:
    """Whether :func:`scale_log_prob` and its gradient compute these: float32, on the CPU."""
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)


def scale_log_prob(
    h: Tensor, log_scale: Tensor, prior: str, return_z: bool
) -> tuple[Tensor, Tensor]:
    """``(z (N, D), log_prob (N,))`` of ``h`` (N, D), in nats; z is empty unless asked for."""
    scale, rest = log_scale.exp(), constant(log_scale.sum(), h.shape[1], prior)
    z = h.new_empty(h.shape if return_z else (0,))
    log_prob = h.new_empty(len(h))
    for rows in _blocks(h):
        b_z = torch.mul(h[rows], scale, out=z[rows]) if return_z else h[rows] * scale
        log_prob[rows] = sum_log_prior(b_z, prior).add_(rest)
    return z, log_prob


def constant(log_det: Tensor, features: int, prior: str) -> Tensor:
    """What :func:`sum_log_prior` leaves out of log_prob, the same for every row: the sum of
    log_scale, ``log_det``, and the normal density's constant."""
    if prior == "logistic":
        return log_det
    return log_det - features / 2 * math.log(2 * math.pi)


def sum_log_prior(z: Tensor, prior: str) -> Tensor:
    """The prior's log-density of rows z (N, D) summed over features, but for constants: (N,)."""
    if prior == "logistic":
        size = z.abs()
        out = size.sum(1).neg_()
        return out.add_(_log_of_product(size.sigmoid_()), alpha=2)
    # halved first: a square overflows long before its half does
    return torch.mul(z, -0.5).mul_(z).sum(1)


def _log_of_product(factors: Tensor) -> Tensor:
    """The sum of the logarithms of numbers from a half to one in each row."""
    count = factors.shape[1]
    if count <= FACTORS:
        return torch.prod(factors, 1).log_()
    whole = count - count % FACTORS
    many, rest = factors.split((whole, count - whole), 1)
    total = torch.prod(many.unflatten(1, (-1, FACTORS)), 2).log_().sum(1)
    return total.add_(_log_of_product(rest)) if whole < count else total


def scale_log_prob_backward(
    grad_z: Tensor | None, grad_log_prob: Tensor, h: Tensor, log_scale: Tensor, prior: str
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``h`` (N, D) and ``log_scale`` (D,)."""
    grad_h, scale = h.new_empty(h.shape), log_scale.exp()
    total = torch.zeros_like(log_scale)
    for rows in _blocks(h):
        g = grad_log_prob[rows, None]
        b_z = h[rows] * scale
        b_a = score(b_z, prior).mul_(g)
        if grad_z is not None:
            b_a += grad_z[rows]
        torch.mul(b_a, scale, out=grad_h[rows])
        total += b_a.mul_(b_z).sum(0) + g.sum()
    return grad_h, total


def score(z: Tensor, prior: str) -> Tensor:
    """The derivative of the prior's log-density at each entry of ``z``: a new tensor."""
    if prior == "logistic":  # -tanh(z / 2), at a third of its price
        return torch.sigmoid(z).mul_(-2).add_(1)
    return torch.neg(z)


def _blocks(h: Tensor) -> list[slice]:
    settle_allocator()
    n, d = h.shape
    size = max(1, BLOCK_ELEMENTS // d)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
