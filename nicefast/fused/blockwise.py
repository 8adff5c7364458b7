"""A chain of additive couplings with MLP conditioners as nothing but matrix products, and its
gradient (see :mod:`nicefast.fused.products`).

On the CPU, rows go through the whole chain in blocks that stay in the cache, several blocks in
flight.

The gradient needs the activations. They are kept, or rebuilt, a block of rows at a time: that costs
one product more for the three of a plain step, and makes what has to be stored independent of the
number of couplings. They are rebuilt from the chain's input, for the same products as from its
output: going back, rounding errors can grow with every coupling until the gradient is another
flow's (64 couplings with weights that double a vector's length are enough in float32).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..blocks import Blocks
from .chain import Chain, put_together, take_apart
from .products import Kept, Products
from .sums import Gradients, Sum, merge

BLOCK_BYTES = 1 << 22  # of one activation: few enough for the cache, and threads seldom meet
LEAST_FLOPS = 1 << 30  # below this, a batch is not worth the hand-over to threads
ROWS_PER_WIDTH = 16
REBUILT_ELEMENTS = 1 << 25  # of all activations of a block: 128 MiB a thread in float32
GPU_ELEMENTS = 1 << 28  # of one activation on a GPU


def go_alone(chain: Chain, rows: int) -> bool:
    """Whether rows are so few for the size of the weights that each product should have all
    threads: each thread by itself would have to read all of the weights."""
    return rows < ROWS_PER_WIDTH * chain.width


def cut(chain: Chain, rows: int, device: torch.device, training: bool = False) -> Blocks:
    """The blocks in which so many rows go through the chain."""
    on_cpu, alone = device.type == "cpu", go_alone(chain, rows)
    if on_cpu and training and not chain.rebuild:
        return Blocks(rows, max(1, rows), rows, device)  # what is kept goes through memory anyway
    together = torch.get_num_threads() if alone else 1  # at work on one block
    elements = together * BLOCK_BYTES // (2 if chain.bfloat16 else 4)
    most = (elements if on_cpu else GPU_ELEMENTS) // chain.width
    if training and chain.rebuild:
        most = min(most, (REBUILT_ELEMENTS if on_cpu else GPU_ELEMENTS) // chain.kept)
    return Blocks(rows, max(1, most), rows if alone else LEAST_FLOPS // chain.flops, device)


@dataclass
class Activations:
    """What is kept for the backward pass: by block, one entry for each coupling as computed, and
    the weights as products take them (see :class:`Products`)."""

    cut: Blocks
    kept: dict[int, list[Kept]] = field(default_factory=dict)
    products: Products | None = None


def couple(
    chain: Chain,
    x: Tensor,
    context: Tensor | None,
    inverse: bool,
    activations: Activations | None = None,
) -> Tensor:
    """``x`` [N, D] through all couplings, or back through them; a new float32 tensor.

    What the gradient needs goes into ``activations``, where they are given.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = cut(chain, len(x), x.device) if activations is None else activations.cut
    products = Products(chain, x.device, inverse, training=activations is not None)
    if activations is not None:
        activations.products = products

    def work(share: Iterable[int]) -> None:
        for i in share:
            rows = blocks[i]
            pair = take_apart(x[rows], chain.sides)
            kept = None if activations is None else activations.kept.setdefault(i, [])
            products.run(pair, None if context is None else context[rows], kept)
            put_together(y[rows], pair, chain.sides)

    blocks.hand_out(work)
    return y


def couple_backward(
    chain: Chain,
    grad_y: Tensor,
    x: Tensor,
    context: Tensor | None,
    inverse: bool,
    activations: Activations | None = None,
    wants_x: bool = True,
    wants_context: bool = True,
) -> Gradients:
    """Gradients of :func:`couple` from that of its result, at ``x``; activations as they were left.

    Those of the parameters are summed over the blocks of a thread, then over threads, in a fixed
    order: the same bits every time.
    """
    if activations is None:
        blocks, products = cut(chain, len(x), x.device, training=True), None
    else:
        blocks, products = activations.cut, activations.products
    if products is None:
        products = Products(chain, x.device, inverse, training=True)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_x else None
    grad_c = None
    if context is not None and wants_context:
        grad_c = torch.zeros(context.shape, dtype=torch.float32, device=x.device)

    def work(share: range) -> list[list[Sum]]:
        sums = products.sums()
        for i in share:
            rows = blocks[i]
            c = None if context is None else context[rows]
            if activations is not None:
                kept = activations.kept[i]
            else:
                kept = []
                products.run(take_apart(x[rows], chain.sides), c, kept, to_the_end=False)
            g = [t.clone() for t in take_apart(grad_y[rows], chain.sides)]  # written over
            products.back(g, c, None if grad_c is None else grad_c[rows], kept, sums, wants_x)
            if grad_x is not None:
                put_together(grad_x[rows], g, chain.sides)
        return sums

    total, *others = blocks.deal(work)
    for sums in others:
        merge(total, sums)
    return Gradients(grad_x, grad_c, products.gathered(total))
