"""A batch on the CPU from x to log_prob in one piece: each operation on all rows, by all threads.

Few rows cost less than the calls that compute them: here are as few of those as can be. With
products in bfloat16, as fast as those are, that holds for many rows, too. And where the activations
of a wide flow are kept for a gradient, blocks of rows would save nothing: what is kept goes through
memory anyway. Flows up to 256 hidden units, which have another way, keep 64 MiB at most, however
many couplings there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import devices, likelihood, watchers
from ..ops import check_log_scale
from ..threads import alone
from .blockwise import go_alone
from .casts import with_casts
from .chain import Chain, put_together, take_apart
from .flow import DifferentiableFlow
from .products import Kept, Products
from .sums import Gradients

KEPT_ELEMENTS = 1 << 24  # of all activations of a batch: more are rebuilt, or go in blocks
AT_ONCE_ELEMENTS = 1 << 22  # the same where nothing is recorded and blocks lie on their side,
AMD_AT_ONCE_ELEMENTS = 1 << 23  # on AMD's processors, whose caches are larger,
BFLOAT16_ELEMENTS = 1 << 22  # and of one activation in bfloat16: few calls gain more than blocks do
SEEN_ELEMENTS = 1 << 26  # the same where a mode looks at operators, of which blocks take many more


@dataclass
class Left:
    """What :meth:`OnePiece.log_prob` leaves for its gradient besides z."""

    products: Products
    kept: list[Kept]


@dataclass(frozen=True)
class OnePiece(DifferentiableFlow):
    """Couplings, scaling and prior of a flow of MLPs on the CPU, all rows at once.

    Gradients are what the methods for them say; none are recorded.
    """

    chain: Chain
    prior: str

    @staticmethod
    def serves(chain: Chain, rows: int, recorded: bool) -> bool:
        """Whether so many rows are best at once; ``recorded``: for a gradient."""
        if recorded:
            blocks = chain.rebuild or (chain.sideways(recorded) and not go_alone(chain, rows))
            return not blocks or rows * chain.kept <= KEPT_ELEMENTS
        if watchers.has_modes():
            return rows * chain.width <= SEEN_ELEMENTS
        if chain.bfloat16:
            return rows * chain.width <= BFLOAT16_ELEMENTS
        if not chain.rebuild and go_alone(chain, rows):
            return True
        most = KEPT_ELEMENTS
        if chain.sideways(recorded):
            most = AMD_AT_ONCE_ELEMENTS if devices.is_amd() else AT_ONCE_ELEMENTS
        return rows * chain.kept <= most

    def pieces(self, rows: int) -> str:
        return f"{rows} rows in one piece"

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        want_z: bool = False,
        want_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if watchers.has_modes() and not want_z:
            # a mode that looks at operators sees one for all but the products; to call that costs
            # as much as a few of what it is made of
            h = self.couple(x, context, inverse=False)
            with alone(x.device):
                return torch.ops.nicefast.scale_log_prob(h, log_scale, self.prior, False)
        chain, none = with_casts(self.chain), empty(0)
        with alone(x.device):
            z = self._latent(x, context, log_scale, Products(chain, x.device, False), None)
            log_prob = none
            if want_log_prob:
                log_prob = likelihood.of_few(z, log_scale, self.prior)
            return self._in_rows(z) if want_z else none, log_prob

    def log_prob(
        self, x: Tensor, context: Tensor | None, log_scale: Tensor
    ) -> tuple[Tensor, Tensor, Left]:
        """log_prob of rows x (N, D), as :meth:`forward` gives it; and what its gradient takes:
        z (N, D), one side after the other, and what else is left."""
        with alone(x.device):
            left = Left(Products(self.chain, x.device, False, training=True), [])
            z = self._latent(x, context, log_scale, left.products, left.kept)
            return likelihood.of_few(z, log_scale, self.prior), z, left

    def log_prob_backward(
        self,
        grad: Tensor,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        z: Tensor,
        left: Left,
        wants_x: bool = True,
        wants_context: bool = True,
    ) -> tuple[Gradients, Tensor]:
        """Gradients of :meth:`log_prob` from that of its result; the last is log_scale's."""
        products, grad_c = left.products, None
        with alone(x.device):
            if context is not None and wants_context:
                grad_c = context.new_zeros(context.shape, dtype=torch.float32)
            score = likelihood.score(z, self.prior).mul_(grad[:, None])
            total = torch.mul(z, score).sum(0).add_(grad.sum())
            grads = self._sides(score.mul_(self._in_sides(log_scale.exp())))
            sums = products.sums()
            products.back(grads, context, grad_c, left.kept, sums, wants_x)
            grad_x = self._joined(grads) if wants_x else None
            found = Gradients(grad_x, grad_c, products.gathered(sums))
            return found, self._in_rows(total[None])[0]

    def inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        check_log_scale(log_scale)
        with torch.no_grad():
            h = torch.mul(z, log_scale.neg().exp_())
        return self.couple(h, context, inverse=True)

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        chain = with_casts(self.chain)
        with alone(x.device):
            pair = take_apart(x, chain.sides)
            Products(chain, x.device, inverse).run(pair, context, None)
            return self._joined(pair)

    def _latent(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        products: Products,
        kept: list[Kept] | None,
    ) -> Tensor:
        """z, one side after the other."""
        check_log_scale(log_scale)
        pair = take_apart(x, self.chain.sides)
        products.run(pair, context, kept)
        return torch.cat(pair, 1).mul_(self._in_sides(log_scale.exp()))

    @property
    def _side_by_side(self) -> bool:
        """Whether the features of one side come after all those of the other."""
        first, second = self.chain.sides
        return first.step == second.step == 1 and first.start == 0

    def _in_sides(self, features: Tensor) -> Tensor:
        """A value for each feature (D,), one side after the other."""
        if self._side_by_side:
            return features
        return torch.cat(take_apart(features[None], self.chain.sides), 1)

    def _sides(self, rows: Tensor) -> list[Tensor]:
        return list(rows.split([f.size for f in self.chain.sides], 1))

    def _in_rows(self, rows: Tensor) -> Tensor:
        """Rows whose sides come one after the other, in the order of features."""
        return rows if self._side_by_side else self._joined(self._sides(rows))

    def _joined(self, pair: list[Tensor]) -> Tensor:
        if self._side_by_side:
            return torch.cat(pair, 1)
        out = empty(len(pair[0]), self.chain.features)
        put_together(out, pair, self.chain.sides)
        return out


def empty(*shape: int) -> Tensor:
    """For what is computed here, whatever the default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
