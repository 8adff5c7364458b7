"""A flow on the CPU from x to log_prob in one pass over blocks of rows laid on their side.

For up to 512 hidden units; with gradients, up to 256.

A block's matrix has one row of memory for each feature. Whatever the partition, a side is a slice
of it, every loop runs along the batch, and a product with a handful of features goes as fast as
any. Between the sides stand a row of ones and the context::

    x_0 | 1 | context | x_1

so that either side, with what its conditioner takes besides, is a slice too, and a bias is one more
column of its weights: a layer is one product. Of the batch only x is read from memory and only the
result written; in between, the same buffers serve block after block.

The gradient rebuilds activations a block at a time, from the chain's input (see
:mod:`nicefast.fused.blockwise`): what is stored does not grow with the number of couplings. Only
where more than 128 hidden units would make that dear, every block is kept as it is. In training
there is no need for either: where the last two log_probs of a flow were each followed by a
gradient that is the same for every row, as that of a mean is, the next one takes each block
forwards and back at once, and its gradient, when it comes, is a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import likelihood
from ..blocks import Blocks
from ..ops import check_log_scale
from .blockwise import REBUILT_ELEMENTS
from .chain import Chain
from .columns import Block, Columns, Totals
from .flow import DifferentiableFlow
from .sums import Gradients

BLOCK_ELEMENTS = 1 << 18  # of one activation: a few of them stay in a core's own cache
LEAST_FLOPS = 1 << 28  # below this, a batch is not worth the hand-over to threads


Start = Callable[[Block, Block, slice], list[Tensor]]
ENOUGH = 2  # log_probs in a row that were followed by a gradient which is the same for every row


@dataclass
class _Learnt:
    """How many such log_probs there were last, and whether the gradient of one more may come."""

    steps: int = 0
    waits: bool = True


_learnt: WeakKeyDictionary[Chain, _Learnt] = WeakKeyDictionary()


@dataclass
class Left:
    """What :meth:`SidewaysFlow.log_prob` leaves for its gradient besides h: the layers; every
    block, by its first row, where they are kept; and the gradients of its sum over rows, where they
    are known already; the last is log_scale's."""

    layers: Columns
    kept: dict[int, Block] | None = None
    of_sum: tuple[Gradients, Tensor] | None = None


@dataclass(frozen=True)
class SidewaysFlow(DifferentiableFlow):
    """Couplings, scaling and prior of a flow of MLPs, for float32 rows on the CPU.

    Gradients are what the methods for them say; none are recorded.
    """

    chain: Chain
    prior: str

    @staticmethod
    def serves(chain: Chain, recorded: bool) -> bool:
        """Whether rows that are not few are best so; ``recorded``: for a gradient."""
        return chain.sideways(recorded)

    def pieces(self, rows: int) -> str:
        return f"{self._cut(rows).describe()}, each on its side"

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        want_z: bool = False,
        want_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor]:
        z = x.new_empty(x.shape) if want_z else None
        log_prob = x.new_empty(len(x)) if want_log_prob else None
        self._forward(x, context, log_scale, None, z, log_prob)
        none = x.new_empty(0)
        return none if z is None else z, none if log_prob is None else log_prob

    def log_prob(
        self, x: Tensor, context: Tensor | None, log_scale: Tensor
    ) -> tuple[Tensor, Tensor, Left]:
        """log_prob of rows x (N, D); h (N, D), the rows after the couplings; and what else its
        gradient takes."""
        log_prob, h = x.new_empty(len(x)), x.new_empty(x.shape)
        learnt = _learnt.setdefault(self.chain, _Learnt())
        if learnt.waits:  # in vain
            learnt.steps = 0
        learnt.waits = True
        if learnt.steps >= ENOUGH:
            left = self._forward_and_back(x, context, log_scale, h, log_prob)
        else:
            cut = self._cut(len(x), training=True)  # as its gradient will be
            kept: dict[int, Block] | None = None if self.chain.rebuild else {}
            layers = self._forward(x, context, log_scale, h, None, log_prob, cut, kept)
            left = Left(layers, kept)
        return log_prob, h, left

    def _forward(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        h: Tensor | None,
        z: Tensor | None,
        log_prob: Tensor | None,
        cut: Blocks | None = None,
        kept: dict[int, Block] | None = None,
    ) -> Columns:
        """Rows x into those of h, z and log_prob that are given; blocks into ``kept``."""
        check_log_scale(log_scale)
        scales, cut = self._scales(log_scale), cut or self._cut(len(x))
        layers = Columns(self.chain, inverse=False)

        def work(share: Iterable[int]) -> None:
            density = None
            if log_prob is not None:
                density = self._density(log_scale, scales, cut.size)
            for rows, block in self._blocks(cut, share, kept=kept):
                block.take(x[rows], None if context is None else context[rows])
                layers.run(block)
                if h is not None:
                    block.put(h[rows])
                if density is not None and log_prob is not None:
                    density(block, log_prob[rows])
                if z is not None:
                    block.scale(scales)
                    block.put(z[rows])

        cut.hand_out(work)
        return layers

    def log_prob_backward(
        self,
        grad: Tensor,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        h: Tensor,
        left: Left,
        wants_x: bool = True,
        wants_context: bool = True,
    ) -> tuple[Gradients, Tensor]:
        """Gradients of :meth:`log_prob` from that of its result; the last is log_scale's.

        Those of a sum, times a factor, where it is the same for every row: to the last bit the
        same, whether they were known already or not.
        """
        scales = self._scales(log_scale)

        def back_from(grad: Tensor) -> tuple[Gradients, Tensor]:
            def start(back: Block, block: Block, rows: slice) -> list[Tensor]:
                back.take(h[rows])
                return self._scored(back, back.features, scales, grad[rows])

            gradients, found = self._backward(
                x, context, False, lambda _: start, wants_x, wants_context, left.layers, left.kept
            )
            return gradients, self._of_log_scale(found)

        if len(grad) and bool((grad == grad[0]).all()):
            learnt = _learnt.setdefault(self.chain, _Learnt())
            if learnt.waits:
                learnt.steps, learnt.waits = min(ENOUGH, learnt.steps + 1), False
            gradients, total = left.of_sum or back_from(torch.ones_like(grad))
            factor, parameters = grad[0], gradients.parameters
            rows = (t for t in (gradients.x, gradients.context) if t is not None)
            every = (total, *parameters, *rows)
            if all(math.isfinite(t.sum().item()) for t in every):  # no overflow
                return Gradients(
                    None if gradients.x is None or not wants_x else gradients.x * factor,
                    None if gradients.context is None else gradients.context * factor,
                    [g * factor for g in parameters],
                ), total * factor
        return back_from(grad)

    def _forward_and_back(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        h: Tensor,
        log_prob: Tensor,
    ) -> Left:
        """Rows x into those of h and log_prob, and the gradients of log_prob's sum."""
        check_log_scale(log_scale)
        scales, layers = self._scales(log_scale), Columns(self.chain, inverse=False)

        def begin(most: int) -> Start:
            density, ones = self._density(log_scale, scales, most), log_prob.new_ones(most)

            def start(back: Block, block: Block, rows: slice) -> list[Tensor]:
                block.put(h[rows])
                density(block, log_prob[rows])
                return self._scored(back, block.features, scales, ones[: block.rows])

            return start

        wants_context = context is not None and context.requires_grad
        gradients, found = self._backward(
            x, context, False, begin, x.requires_grad, wants_context, layers, to_the_end=True
        )
        return Left(layers, of_sum=(gradients, self._of_log_scale(found)))

    def _scored(
        self, back: Block, h: Iterable[Tensor], scales: list[Tensor], grad: Tensor
    ) -> list[Tensor]:
        """The gradient of h's two sides from that of log_prob, into ``back``'s (which may be h);
        log_scale's is returned."""
        found, total = [], grad.sum()
        for into, side, scale in zip(back.features, h, scales, strict=True):
            z = side * scale
            score = likelihood.score(z, self.prior).mul_(grad)
            torch.mul(score, scale, out=into)
            found.append(z.mul_(score).sum(1).add_(total))
        return found

    def _of_log_scale(self, found: list[Tensor]) -> Tensor:
        """Its gradient, from the two sides' (none without rows)."""
        sides = self.chain.sides
        total = torch.zeros(self.chain.features, device="cpu", dtype=torch.float32)
        for f, own in zip(sides, found, strict=bool(found)):
            total[f.columns] = own
        return total

    def inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        check_log_scale(log_scale)
        return self._couple(z, context, True, self._scales(-log_scale.detach()))

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        return self._couple(x, context, inverse, None)

    def _couple(
        self, x: Tensor, context: Tensor | None, inverse: bool, scales: list[Tensor] | None
    ) -> Tensor:
        y, cut = x.new_empty(x.shape), self._cut(len(x))
        layers = Columns(self.chain, inverse)

        def work(share: Iterable[int]) -> None:
            for rows, block in self._blocks(cut, share):
                block.take(x[rows], None if context is None else context[rows])
                if scales is not None:
                    block.scale(scales)
                layers.run(block)
                block.put(y[rows])

        cut.hand_out(work)
        return y

    def couple_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        context: Tensor | None,
        inverse: bool,
        wants_x: bool = True,
        wants_context: bool = True,
    ) -> Gradients:
        """Gradients of :meth:`couple` from that of its result, at ``x``."""

        def start(back: Block, block: Block, rows: slice) -> list[Tensor]:
            back.take(grad_y[rows])
            return []

        return self._backward(x, context, inverse, lambda _: start, wants_x, wants_context)[0]

    def _backward(
        self,
        x: Tensor,
        context: Tensor | None,
        inverse: bool,
        begin: Callable[[int], Start],
        wants_x: bool,
        wants_context: bool,
        layers: Columns | None = None,
        kept: dict[int, Block] | None = None,
        to_the_end: bool = False,
    ) -> tuple[Gradients, list[Tensor]]:
        """Back through the couplings from what ``start(back, block, rows)`` writes to ``back``, the
        gradient of the rows after them (``to_the_end``: ``block`` are those; ``kept``: they were
        there already); and the sums over blocks of what it returns. Each thread has its own,
        ``start = begin(most rows of a block)``.

        All sums are over the blocks of a thread, then over threads, in a fixed order: the same bits
        every time.
        """
        chain, steps = self.chain, self.chain.steps(inverse)
        cut = self._cut(len(x), training=True)
        layers = Columns(chain, inverse) if layers is None else layers
        grad_x = x.new_empty(x.shape) if wants_x else None
        grad_c = None
        if context is not None and wants_context:
            grad_c = context.new_zeros(context.shape, dtype=torch.float32)

        def work(share: range) -> tuple[Totals, list[Tensor]]:
            totals, start = Totals(chain), begin(cut.size)
            found: list[Tensor] = []
            blocks = self._blocks(cut, share, keep=True)
            for rows, grad in self._blocks(cut, share):
                if kept is not None:
                    block = kept[rows.start]
                else:
                    _, block = next(blocks)
                    block.take(x[rows], None if context is None else context[rows])
                    layers.run(block, to_the_end)
                more = start(grad, block, rows)
                found = [a.add_(b) for a, b in zip(found, more, strict=True)] if found else more
                grad.context.zero_()
                for index in reversed(steps):
                    wanted = index != steps[0] or wants_x or grad_c is not None
                    layers.backward(block, grad, index, totals, wanted)
                totals.end_block()
                if grad_x is not None:
                    grad.put(grad_x[rows])
                if grad_c is not None:
                    grad_c[rows] = grad.context.t()
            return totals, found

        (totals, found), *others = cut.deal(work)
        for other, more in others:
            totals.merge(other)
            for a, b in zip(found, more, strict=True):
                a.add_(b)
        return Gradients(grad_x, grad_c, totals.gathered()), found

    def _cut(self, rows: int, training: bool = False) -> Blocks:
        chain = self.chain
        most = BLOCK_ELEMENTS // chain.width
        if training:
            most = min(most, REBUILT_ELEMENTS // chain.kept)
        cpu = torch.device("cpu")
        return Blocks(rows, max(1, most), LEAST_FLOPS // chain.flops, cpu)

    def _blocks(
        self,
        cut: Blocks,
        share: Iterable[int],
        keep: bool = False,
        kept: dict[int, Block] | None = None,
    ) -> Iterator[tuple[slice, Block]]:
        """The rows of each block of a share, and buffers for them: the same again and again, or,
        into ``kept``, each its own. ``keep``: with all that a gradient needs."""
        block = None
        for i in share:
            rows = cut[i]
            count = rows.stop - rows.start
            if block is None or block.rows != count or kept is not None:
                block = Block(self.chain, count, keep or kept is not None)
            if kept is not None:
                kept[rows.start] = block
            yield rows, block

    def _scales(self, log_scale: Tensor) -> list[Tensor]:
        """exp(log_scale) of each side, a column."""
        scale = log_scale.detach().exp()
        return [scale[f.columns][:, None] for f in self.chain.sides]

    def _density(
        self, log_scale: Tensor, scales: list[Tensor], rows: int
    ) -> Callable[[Block, Tensor], None]:
        """What writes the log_prob of a block's rows, before they are scaled."""
        features, first = self.chain.features, self.chain.sides[0].size
        buffers = [torch.empty(features, rows, device="cpu", dtype=torch.float32) for _ in range(2)]
        constant = likelihood.constant(log_scale.detach(), self.prior)

        def write(block: Block, out: Tensor) -> None:
            z, other = (b[:, : block.rows] for b in buffers)
            for side, scale, into in zip(
                block.features, scales, (z[:first], z[first:]), strict=True
            ):
                torch.mul(side, scale, out=into)
            likelihood.sum_log_prior(z, self.prior, 0, out, z, other)
            out += constant

        return write
