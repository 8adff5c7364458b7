"""Scaling + prior + row sum on the CPU, in blocks of rows that stay in the cache.

What :func:`nicefast.reference.scale_log_prob` and its gradient say, in float32, with a handful of
operations on blocks that are used again and again: large temporaries would cost more in page
faults than in arithmetic. With the logistic prior,

    log p(z) = -softplus(z) - softplus(-z) = 2 log sigmoid(|z|) - |z|
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import Blocks

BLOCK_ELEMENTS = 1 << 18
LEAST_ELEMENTS = 1 << 18  # below this, rows are not worth the hand-over to threads


def serves(*tensors: Tensor | None) -> bool:
    """Whether these are what the functions here compute: float32, on the CPU."""
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)


def scale_log_prob(
    h: Tensor, log_scale: Tensor, prior: str, return_z: bool
) -> tuple[Tensor, Tensor]:
    """``(z (N, D), log_prob (N,))`` of ``h`` (N, D), in nats; z is empty unless asked for."""
    n, d = h.shape
    z = h.new_empty((n, d) if return_z else (0,))
    log_prob = h.new_empty(n)
    scale = log_scale.exp()
    constant = log_scale.sum() - (0 if prior == "logistic" else d / 2 * math.log(2 * math.pi))
    cut = _blocks(h)

    def work(share: range) -> None:
        first, second, third = (h.new_empty(cut.size, d) for _ in range(3))
        for i in share:
            rows = cut[i]
            count = len(log_prob[rows])
            b_z = torch.mul(h[rows], scale, out=z[rows] if return_z else first[:count])
            if prior == "logistic":
                b_a = torch.abs(b_z, out=first[:count])
                torch.ops.aten.log_sigmoid_forward.output(
                    b_a, output=second[:count], buffer=third[:count]
                )
                torch.sum(second[:count], 1, out=log_prob[rows]).mul_(2).sub_(b_a.sum(1))
            else:
                squares = torch.mul(b_z, b_z, out=second[:count])
                torch.sum(squares, 1, out=log_prob[rows]).mul_(-0.5)
            log_prob[rows] += constant

    cut.deal(work)
    return z, log_prob


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
            b_a = second[: len(g)]
            if prior == "logistic":
                torch.mul(b_z, 0.5, out=b_a).tanh_().mul_(-g)
            else:
                torch.mul(b_z, -g, out=b_a)
            if grad_z is not None:
                b_a += grad_z[rows]
            torch.mul(b_a, scale, out=grad_h[rows])
            total += b_a.mul_(b_z).sum(0) + g.sum()
        return total

    total, *others = cut.deal(work)
    for other in others:
        total += other
    return grad_h, total


def _blocks(h: Tensor) -> Blocks:
    n, d = h.shape
    return Blocks(n, max(1, BLOCK_ELEMENTS // d), LEAST_ELEMENTS // d, h.device)
