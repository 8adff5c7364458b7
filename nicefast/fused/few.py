"""Few rows on the CPU, on their side and in one piece: a row of memory for each feature.

Where a product takes about as long as its weight is to read, ``W h^T``, which reads it as it lies,
takes half the time of ``h W^T``. What a coupling shifts is shifted where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import devices, likelihood, watchers
from ..activations import ACTIVATIONS
from ..ops import check_log_scale
from ..threads import alone
from .chain import Chain
from .flow import SamplingFlow
from .onepiece import empty
from .sums import add_product

ROWS = 48  # with more, a large weight takes no longer to turn than to multiply,
NUMBERS = 1 << 16  # and with more numbers in an activation, nor does a small one
SLOW = (2, 3)  # so few columns of a matrix are slower than rows; a single one is not
AMD_NUMBERS = 1 << 14  # the same on processors that MKL is not made for
AMD_SLOW = range(2, 16)


@dataclass(frozen=True)
class FewFlow(SamplingFlow):
    """Couplings, scaling and prior of a flow of MLPs, for few float32 rows on the CPU."""

    chain: Chain
    prior: str

    @staticmethod
    def serves(chain: Chain, rows: int, recorded: bool) -> bool:
        """Whether so many rows are best so; ``recorded``: for a gradient."""
        amd = devices.is_amd()
        most = max(ROWS, (AMD_NUMBERS if amd else NUMBERS) // chain.width)
        if recorded or chain.bfloat16 or rows > most or rows in (AMD_SLOW if amd else SLOW):
            return False
        return not watchers.has_modes()  # a mode is to see products and little else

    def pieces(self, rows: int) -> str:
        return f"{rows} rows in one piece, on its side"

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        want_z: bool = False,
        want_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor]:
        check_log_scale(log_scale)
        none = empty(0)
        with alone(x.device):
            z = self._through(_turned(x), context, False).mul_(log_scale.exp().unsqueeze(1))
            log_prob = none
            if want_log_prob:
                log_prob = likelihood.of_few(z, log_scale, self.prior, want_z, dim=0)
            return _turned(z) if want_z else none, log_prob

    def inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        check_log_scale(log_scale)
        with alone(z.device):
            h = _turned(z).mul_(log_scale.neg().exp_().unsqueeze(1))
            return _turned(self._through(h, context, True))

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        with alone(x.device):
            return _turned(self._through(_turned(x), context, inverse))

    def _through(self, rows: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        """``rows`` (D, N) through all couplings, or back through them, in place."""
        chain, c = self.chain, None if context is None else context.t().float()
        columns = [f.columns for f in chain.sides]
        pair = [  # views where features are evenly spaced
            rows[own] if isinstance(own, slice) else rows.index_select(0, own) for own in columns
        ]
        for index in chain.steps(inverse):
            side, (weight, bias) = chain.conditions[index], chain.couplings[index][-1]
            h, plus = self._hidden(index, pair[side], c), bias.unsqueeze(1)
            add_product(pair[1 - side], weight, h, -1 if inverse else 1, plus)
        for own, half in zip(columns, pair, strict=True):
            if not isinstance(own, slice):
                rows.index_copy_(0, own, half)
        return rows

    def _hidden(self, index: int, h: Tensor, c: Tensor | None) -> Tensor:
        """The last hidden layer of coupling ``index``, which conditions on ``h``."""
        (weight, bias), *others = self.chain.couplings[index][:-1]
        plus = bias.unsqueeze(1)
        if c is not None:
            weight, of_context = weight.split((h.shape[0], self.chain.context), 1)
            plus = torch.addmm(plus, of_context, c)
        activate_ = ACTIVATIONS[self.chain.activation].apply_
        h = activate_(torch.mm(weight, h).add_(plus))  # addmm would copy the bias first
        for weight, bias in others:
            h = activate_(torch.mm(weight, h).add_(bias.unsqueeze(1)))
        return h


def _turned(x: Tensor) -> Tensor:
    """``x^T``, in memory of its own."""
    return x.t().clone(memory_format=torch.contiguous_format)
