"""A wide flow on a GPU: cuBLAS's products, and three kernels for a whole flow of four couplings.

The rows go to the two sides of the partition once, at the boundary, and each last product adds to
one of them in place. Its bias goes with the next kernel that has to run anyhow: what a side gets
may be added to it at any time between the couplings that read it, so that the kernel at the
boundary takes the first coupling's, one kernel those of two couplings, and the one that ends in
log_prob the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend
from ..ops import check_log_scale
from ..threads import alone
from .blockwise import cut
from .casts import with_kept_casts
from .chain import Chain
from .epilogue import gives_numbers, keeps_nan
from .flow import FusedFlow
from .products import Products


@dataclass(frozen=True)
class WideFlow(FusedFlow):
    """Couplings, scaling and prior, for float32 rows where kernels run. No gradients."""

    chain: Chain
    prior: str

    def pieces(self, rows: int) -> str:
        return cut(self.chain, rows, self.chain.device).describe()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        want_z: bool = False,
        want_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor]:
        check_log_scale(log_scale)
        none = _empty(x, 0)
        z = _empty(x, *x.shape) if want_z else none
        log_prob = _empty(x, len(x)) if want_log_prob else none
        self._run(
            x, context, False, log_scale, z if want_z else None, log_prob if want_log_prob else None
        )  # fmt: skip
        return z, log_prob

    def inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        check_log_scale(log_scale)
        x = _empty(z, *z.shape)
        self._run(z, context, True, log_scale, x)
        return x

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        y = _empty(x, *x.shape)
        self._run(x, context, inverse, None, y)
        return y

    def _run(
        self,
        x: Tensor,
        context: Tensor | None,
        inverse: bool,
        log_scale: Tensor | None,
        out: Tensor | None,
        log_prob: Tensor | None = None,
    ) -> None:
        """Rows x through the flow (``inverse``: back) to ``out`` and ``log_prob``, if given."""
        kernels, sides = backend.kernels(), self.chain.sides
        # a NaN that is given is in log_prob, whatever became of it among the other features
        asked = out is None and self.chain.activation == "relu" and not keeps_nan(x.device)
        numbers = asked and gives_numbers(self.chain)
        products = Products(with_kept_casts(self.chain), x.device, inverse, numbers=numbers)
        blocks = cut(self.chain, len(x), x.device)
        before, after = (log_scale, None) if inverse else (None, log_scale)
        with alone(x.device):
            for i in range(len(blocks)):
                rows = blocks[i]
                c = None if context is None else context[rows]
                y, due = self._through(x[rows], c, products, before)
                kernels.leave(
                    y, sides, due, after, self.prior, inverse,
                    None if out is None else out[rows],
                    None if log_prob is None else log_prob[rows],
                )  # fmt: skip

    def _through(
        self, x: Tensor, context: Tensor | None, products: Products, log_scale: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """The sides after all couplings, but for the biases that come with them."""
        kernels, chain, inverse = backend.kernels(), self.chain, products.inverse
        due: list[Tensor | None] = [None, None]  # of each side

        def take() -> tuple[Tensor | None, Tensor | None]:
            found = due[0], due[1]
            due[:] = None, None
            return found

        y, pair = x, ()
        for index in products.steps:
            reads = chain.conditions[index]
            shifts, bias = 1 - reads, chain.couplings[index][-1][1]
            late = due[shifts] is not None  # of the coupling before, to the same side
            if not late:
                due[shifts] = bias
            if not pair:
                y = kernels.enter(x, chain.sides, take(), log_scale, inverse)
                pair = y.split([f.size for f in chain.sides], 1)
            elif late or due[reads] is not None:
                kernels.add_(y, chain.sides[0].size, take(), inverse)
            if late:
                due[shifts] = bias
            products.shift_(pair[reads], pair[shifts], index, context)
        return y, take()


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
