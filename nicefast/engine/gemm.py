"""The gemm engine: a wide flow on a GPU, cuBLAS's products between kernels of
:mod:`nicefast.kernels.sides`.

A kernel at the boundary writes the rows as the two halves of the partition, and each conditioner's
last product adds to one half in place. A kernel that runs anyway adds the bias of that product,
before or after the product: sums commute, and only the next coupling that reads the half needs it.
If couplings alternate, the kernel at the boundary takes the first coupling's bias, one kernel takes
those of two couplings, and the kernel that ends in log_prob takes the last. The gradient is the row
engine's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..runtime import backend
from .linear import linear
from .rows import Residuals, RowEngine
from .stack import CouplingStack

Biases = tuple[Tensor | None, Tensor | None]
LARGEST = 2.0**30  # the bound holds for rows whose features are at most this
LIMIT = 2.0**126  # no bound may reach this: a quarter of the largest float32, for rounding


class GemmEngine(RowEngine):
    """Couplings, scaling and prior, for float32 rows where kernels run.

    ``fuses_relu``: relu goes into the epilogue of a product. cuBLAS's epilogue makes 0 of NaN, so
    that this needs :func:`gives_numbers`.
    """

    name = "gemm"
    fuses_relu = False

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, save: list[Residuals] | None = None
    ) -> Tensor:
        if save is not None:
            return super().log_prob(x, context, save)
        log_prob = torch.empty(len(x), dtype=x.dtype, device=x.device)
        self._run(x, context, False, self.checked_log_scale(), None, log_prob)
        return log_prob

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._rows(x, context, False, self.checked_log_scale())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._rows(z, context, True, self.checked_log_scale())

    def couple(
        self,
        x: Tensor,
        context: Tensor | None = None,
        inverse: bool = False,
        save: list[Residuals] | None = None,
    ) -> Tensor:
        if save is not None:
            return super().couple(x, context, inverse, save)
        return self._rows(x, context, inverse, None)

    def _rows(
        self, x: Tensor, context: Tensor | None, inverse: bool, log_scale: Tensor | None
    ) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._run(x, context, inverse, log_scale, out, None)
        return out

    def _run(
        self,
        x: Tensor,
        context: Tensor | None,
        inverse: bool,
        log_scale: Tensor | None,
        out: Tensor | None,
        log_prob: Tensor | None,
    ) -> None:
        """Rows x through the flow (``inverse``: back) to ``out`` and ``log_prob``, if given."""
        kernels, halves = backend.kernels(), self.stack.halves
        before, after = (log_scale, None) if inverse else (None, log_scale)
        # relu in the epilogue is safe in log_prob: a NaN in x stays in its own feature and makes
        # log_prob NaN; rows that are returned would lose it
        fuses_relu = self.fuses_relu and out is None
        for rows in self.blocks(len(x)):
            c = None if context is None else context[rows]
            y, due = self._through(x[rows], c, inverse, before, fuses_relu)
            kernels.leave(
                y, halves, due, after, self.prior, inverse,
                None if out is None else out[rows],
                None if log_prob is None else log_prob[rows],
            )  # fmt: skip

    def _through(
        self,
        x: Tensor,
        context: Tensor | None,
        inverse: bool,
        log_scale: Tensor | None,
        fuses_relu: bool,
    ) -> tuple[Tensor, Biases]:
        """``(y (N, D), biases)``: the halves after all couplings, the first half's columns first,
        and the biases that are still to be added to each half."""
        kernels, stack = backend.kernels(), self.stack
        sizes = [half.size for half in stack.halves]
        due: list[Tensor | None] = [None, None]  # of each half

        def take() -> Biases:
            found = due[0], due[1]
            due[:] = None, None
            return found

        y, pair = x, ()
        for i in self.steps(inverse):
            reads = stack.conditioning[i]
            shifts, bias = 1 - reads, stack.couplings[i][-1][1]
            late = due[shifts] is not None  # of the coupling before, to the same half
            if not late:
                due[shifts] = bias
            if not pair:
                y = kernels.enter(x, stack.halves, take(), log_scale, inverse)
                pair = y.split(sizes, 1)
            elif late or due[reads] is not None:
                kernels.add_(y, sizes[0], take(), inverse)
            if late:
                due[shifts] = bias
            self._shift_(i, pair[reads], pair[shifts], context, inverse, fuses_relu)
        return y, take()

    def _shift_(
        self,
        i: int,
        x1: Tensor,
        x2: Tensor,
        context: Tensor | None,
        inverse: bool,
        fuses_relu: bool,
    ) -> None:
        """Coupling i without its last bias, to ``x2``, wherever that lies."""
        *hidden, (last, _) = self.layers[i]
        h = x1 if context is None else torch.cat((x1, context), 1)
        h = h.to(self.stack.dtype)
        for weight, bias in hidden:
            if fuses_relu:
                h = torch._addmm_activation(bias, h, weight.t())
            else:
                h = linear(h, weight, bias, self.activation.apply_)
        sign = -1 if inverse else 1
        if h.dtype == x2.dtype:
            x2.addmm_(h, last.t(), alpha=sign)
        elif gives_float32(x2.device):  # the shift is not rounded to bfloat16 before it is added
            x2.add_(torch.mm(h, last.t(), out_dtype=x2.dtype), alpha=sign)
        else:
            x2.add_(torch.mm(h, last.t()), alpha=sign)


def gives_float32(device: torch.device) -> bool:
    """Whether PyTorch's product of bfloat16 matrices can be float32 there: cuBLAS's alone can.

    >>> gives_float32(torch.device("cpu"))
    False
    """
    return device.type == "cuda" and torch.version.hip is None


def gives_numbers(stack: CouplingStack) -> bool:
    """Whether no product of a row without NaN gives NaN.

    ``|W h + b| <= |W| |h| + |b|``, with Euclidean norms, bounds every activation. The norms are
    read by the host, which waits for the device.
    """
    if stack.activation != "relu" or stack.context:
        return False
    sizes = torch.stack([torch.linalg.vector_norm(p.detach()) for p in stack.parameters]).tolist()
    each = iter(zip(sizes[::2], sizes[1::2], strict=True))
    total = math.sqrt(stack.features) * LARGEST
    for layers in stack.couplings:
        size = total
        for weight, bias in (next(each) for _ in layers):
            size = weight * size + bias
            if not size < LIMIT:  # nor of NaN
                return False
        total += size
    return total < LIMIT
