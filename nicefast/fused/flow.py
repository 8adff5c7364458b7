"""What a fast way through a flow is asked for, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from .. import noise
from ..ops import check_log_scale
from .chain import Chain
from .sums import Gradients


class FusedFlow(ABC):
    """Couplings, scaling and prior in one: from x to log_prob, and back.

    Rows x and z are (N, D) in float32, context (N, K), log_scale (D,), log_prob (N,) in nats.
    Nothing is recorded for a gradient. ValueError for a non-finite log_scale on the CPU.
    """

    chain: Chain

    @abstractmethod
    def pieces(self, rows: int) -> str:
        """How ``rows`` rows are cut, for people."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        want_z: bool = False,
        want_log_prob: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``(z, log_prob)`` of rows x; empty where not wanted."""

    @abstractmethod
    def inverse(self, z: Tensor, context: Tensor | None, log_scale: Tensor) -> Tensor:
        """x of rows z."""

    @abstractmethod
    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        """Through the couplings alone."""


class SamplingFlow(FusedFlow):
    """One for rows so few that an operator of their own for their noise would cost too much."""

    prior: str

    def sample(
        self, n: int, row_offset: int, seed: int, context: Tensor | None, log_scale: Tensor
    ) -> Tensor:
        """Rows ``row_offset`` to ``row_offset + n`` of the sample that has this seed."""
        check_log_scale(log_scale)
        h = noise.sample_prior(log_scale, n, seed, self.prior, row_offset)
        return self.couple(h, context, inverse=True)


class DifferentiableFlow(FusedFlow):
    """One that has the gradient of log_prob, too."""

    prior: str

    @abstractmethod
    def log_prob(
        self, x: Tensor, context: Tensor | None, log_scale: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """log_prob of rows x; and what its gradient takes: rows (N, D), and what else is left."""

    @abstractmethod
    def log_prob_backward(
        self,
        grad: Tensor,
        x: Tensor,
        context: Tensor | None,
        log_scale: Tensor,
        rows: Tensor,
        left: Any,
        wants_x: bool = True,
        wants_context: bool = True,
    ) -> tuple[Gradients, Tensor]:
        """Gradients of :meth:`log_prob` from that of its result; the last is log_scale's."""
