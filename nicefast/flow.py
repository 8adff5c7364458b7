"""NICE: couplings, then a scaling, then a factorised prior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from . import functional as F  # noqa: N812
from . import priors
from .architecture import architecture
from .checks import check_choice, check_context, check_count, check_events
from .deprecated import METHODS, GraphedFlow
from .distributions import FlowDistribution, FlowTransform
from .engine import Plan
from .engine import couple as run_couplings
from .engine import log_prob as run_log_prob
from .engine import plan as plan_call
from .engine import transform as run_whole
from .engine.exact import ExactEngine
from .engine.explanation import explanation
from .engine.frozen import FrozenFlow, detached_copy
from .engine.kernel import KernelEngine
from .engine.rows import RowEngine
from .exact.grid import check_grid, round_to_grid
from .fingerprint import Fingerprinted
from .layers import MLP, AdditiveCoupling, Scaling, is_plain_scaling
from .partition import Partition
from .runtime import watchers
from .runtime.precision import at_least_float32


class NICE(Fingerprinted):
    """NICE: ``z = exp(log_scale) * (f_L o ... o f_1)(x)`` with additive couplings f_l.

    ``log p(x) = sum_d log p(z_d) + sum_d log_scale_d``, exact, in nats (Dinh et al. 2014,
    equation 1 and section 3). The defaults are the paper's network for MNIST (section 5.1). A
    fresh flow is close to the identity: log_scale = 0, and each conditioner's last layer is small.

    Args:
        features: D, or an event shape such as (1, 28, 28), flattened row by row inside.
        hidden: widths of each conditioner's hidden layers.
        couplings: how many.
        prior: ``"logistic"`` or ``"normal"``.
        partition: ``"half"``, ``"alternating"``, ``"checkerboard"`` (event shapes (H, W) and
            (C, H, W)) or ``"random"`` (seed 0); a Partition p, then p, ~p, p, ... are used in
            turn, as they are for a name; or one Partition for each coupling.
        activation: of the conditioners, see :class:`nicefast.MLP`.
        context: features of the context, 0 for none.
        dropout: of the conditioners in training mode, see :class:`nicefast.MLP`.
        grid: None, or a positive power of two: the flow is then exact, see :meth:`with_grid`.
        device, dtype: of the parameters; PyTorch's defaults unless given.

    Attributes:
        couplings: ModuleList of :class:`nicefast.AdditiveCoupling`; each ``.conditioner`` may be
            replaced by any module of the same inputs and outputs.
        scaling: :class:`nicefast.Scaling`.
        prior: the prior as a torch distribution of one latent feature (with a grid: of all).
        event_shape: shape of one x.
        recompute: False; set to True, gradients recompute activations, whatever their size, instead
            of saving up to 1 GiB of them: memory does not grow with the number of couplings.
            torch.utils.checkpoint around a flow frees none of them.

    Shapes: x (..., \\*event_shape), context (..., K) with leading dimensions that broadcast to
    those of x; z like x, log_det and log_prob (...). Narrower inputs than float32 run as float32.
    NaN in an x gives NaN for that x and no other.

    Raises:
        TypeError: integer x (dequantise first), or an argument of a wrong kind.
        ValueError: wrong shapes, unknown names, missing or unexpected context, mixed devices,
            non-finite log_scale (on the CPU).

    >>> import torch, nicefast as nf
    >>> flow = nf.NICE(4, hidden=(16,), couplings=3)
    >>> x = torch.randn(5, 4)
    >>> z, log_det = flow(x)
    >>> torch.allclose(flow.log_prob(x), flow.prior.log_prob(z).sum(-1) + log_det, atol=1e-4)
    True
    >>> flow.sample(2).shape
    torch.Size([2, 4])
    """

    couplings: nn.ModuleList
    recompute: bool = False

    def __init__(
        self,
        features: int | Sequence[int],
        hidden: Sequence[int] = (1000,) * 5,
        couplings: int = 4,
        prior: str = "logistic",
        partition: str | Partition | Sequence[Partition] = "alternating",
        activation: str = "relu",
        context: int = 0,
        dropout: float = 0.0,
        grid: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plan = architecture(features, hidden, couplings, prior, partition)
        context = check_count("context", context)
        self.event_shape, partitions, widths, configuration = plan
        self.features = math.prod(self.event_shape)
        self.context = context
        self.prior_name = prior
        conditioner: Any = {"activation": activation, "context": context, "dropout": dropout}
        where: Any = {"device": device, "dtype": dtype}
        self.couplings = nn.ModuleList(
            AdditiveCoupling(
                p, MLP(len(p.conditioning), own, len(p.shifted), **conditioner, **where)
            )
            for p, own in zip(partitions, widths, strict=True)
        )
        for coupling in self._couplings():
            last = cast("nn.Linear", cast("MLP", coupling.conditioner).linears[-1])
            nn.init.uniform_(last.weight, -0.01, 0.01)  # as the original: near the identity
            nn.init.zeros_(last.bias)
        self.scaling = Scaling(self.features, **where)
        #: what __init__ was called with, as plain values: what a saved file rebuilds the flow from
        self.configuration = configuration | {
            "activation": activation,
            "context": context,
            "dropout": float(dropout),
        }
        self._set_grid(grid)

    def with_grid(self, grid: float | None) -> NICE:
        """A copy of the flow whose inverse is exact, bit for bit (None: a copy that is not).

        x is rounded to multiples of ``grid`` once, which moves it by ``grid / 2`` at most, and so
        is every shift (half to even; gradients go straight through). Adding multiples of a power
        of two is exact within 2^24 of them (2^53 in float64), so ``inverse(forward(x))`` is the
        rounded x, at any depth, for any weights, batch size and precision policy, since the
        conditioners are computed in integer arithmetic: see :mod:`nicefast.exact`. A conditioner
        that is no plain :class:`nicefast.MLP` sees one row at a time, and is exact where it does
        the same every time: not with dropout.
        Training keeps nothing but the result: activations are rebuilt, with the same bits.

        A scaling would leave the grid: it lives in the prior, which has the scale
        ``exp(-log_scale)``. So ``forward`` gives ``(h, 0)``, before the scaling; ``log_prob`` is
        what it was, at the rounded x and with rounded shifts; :meth:`cell_log_prob` is that of
        whole cells of the grid. Gradients can be taken once, and not by ``torch.func``.

        Raises:
            TypeError, ValueError: the grid is no number, or no power of two.
            ValueError, by the copy's methods: a value leaves the range in which the grid is exact;
                the message names the coupling and the row.

        >>> import torch, nicefast as nf
        >>> flow = nf.NICE(4, hidden=(16,), couplings=100).with_grid(2**-16)
        >>> x = torch.randn(5, 4)
        >>> z, _ = flow(x)
        >>> torch.equal(flow.inverse(z)[0], (x * 2**16).round() / 2**16)
        True
        """
        flow = detached_copy(self)
        flow._set_grid(grid)
        return flow

    @property
    def grid(self) -> float | None:
        """See :meth:`with_grid`."""
        return self._grid

    def _set_grid(self, grid: float | None) -> None:
        self._grid = None if grid is None else check_grid(grid)
        self.configuration["grid"] = self._grid
        for i, coupling in enumerate(self._couplings()):
            coupling.grid, coupling.label = self._grid, f"coupling {i}"

    @property
    def prior(self) -> Distribution:
        """That of each z_d; with a grid, which is not scaled, of each h_d."""
        log_scale = self.scaling.log_scale
        standard = priors.standard(
            self.prior_name, dtype=at_least_float32(log_scale.dtype), device=log_scale.device
        )
        if self.grid is None:
            return standard
        scale = torch.exp(-log_scale.to(standard.loc.dtype)).view(self.event_shape)
        return type(standard)(torch.zeros_like(scale), scale)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent, ``z = exp(log_scale) h(x)`` with h all couplings: ``(z, log_det)``.

        Shapes, dtypes and errors as :meth:`log_prob`; z is shaped like x, log_det in nats like x
        without its event shape, and the same for every x (Dinh et al. 2014, section 3.3).
        """
        h, c = self.rows("x", x, context)
        plan, log_det = self.plan(h, c), None
        engine = self._engine(plan, h, c)
        if engine is not None:
            z = run_whole(engine, h, c, inverse=False)
        else:
            z, log_det = self.scaling(self._couple(plan, h, c))
        log_det = self._log_det(x) if log_det is None else log_det
        return _shaped(z, x.shape), _shaped(log_det, self._batch_shape(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: ``(x, log_det)`` with the log-determinant of the inverse.

        >>> import torch, nicefast as nf
        >>> flow, x = nf.NICE(4, hidden=(8,)), torch.randn(3, 4)
        >>> torch.allclose(flow.inverse(flow(x)[0])[0], x, atol=1e-5)
        True
        """
        h, c = self.rows("z", z, context)
        plan, log_det = self.plan(h, c), None
        engine = self._engine(plan, h, c)
        if engine is not None:
            h = run_whole(engine, h, c, inverse=True)
        else:
            h, log_det = self.scaling.inverse(h)
            h = self._couple(plan, h, c, inverse=True)
        log_det = -self._log_det(z) if log_det is None else log_det
        return _shaped(h, z.shape), _shaped(log_det, self._batch_shape(z))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Exact log-density of each x, in nats: ``sum_d log p(z_d) + sum_d log_scale_d``
        (Dinh et al. 2014, equations 1 and 4).

        Args:
            x: (..., \\*event_shape), floating point, on the flow's device.
            context: (..., K), with the leading shape of x, where the flow takes one.

        Returns:
            (...), float32 or, of float64 rows or parameters, float64; differentiable.

        Raises:
            TypeError: x or context is no floating-point tensor.
            ValueError: a shape or device that does not fit, a context that is missing or too much,
                a log_scale that is not finite.

        >>> import torch, nicefast as nf
        >>> flow = nf.NICE((1, 4, 4), hidden=(8,))
        >>> flow.log_prob(torch.rand(5, 1, 4, 4)).shape
        torch.Size([5])
        """
        h, c = self.rows("x", x, context)
        plan = self.plan(h, c)
        if plan.engine is not None and plan.engine.log_scale is not None:
            log_prob = run_log_prob(plan.engine, h, c, self.scaling.log_scale)
        else:
            log_prob = self._log_density(self._couple(plan, h, c))
        return _shaped(log_prob, self._batch_shape(x))

    def cell_log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-probability of the grid cell of each x, in nats, <= 0; with a grid alone.

        The cell of x are the points that are rounded to the same multiple of ``grid`` in every
        feature. The exact couplings map cells to cells, one to one, so ``P = prod_d (F(s_d (h_d +
        grid/2)) - F(s_d (h_d - grid/2)))`` with h the rounded x's image, F the prior's
        distribution function and ``s = exp(log_scale)``: over all cells these add up to 1. It is
        a discrete likelihood, as in integer discrete flows (Hoogeboom et al. 2019,
        arXiv 1905.07376): ``-log P / ln 2`` bits are what a lossless coder needs.

        Shapes and errors as :meth:`log_prob`; ValueError for a flow without a grid.

        >>> import torch, nicefast as nf
        >>> flow = nf.NICE(2, hidden=(8,), grid=0.5)
        >>> cells = torch.cartesian_prod(*[torch.arange(-20, 20, 0.5)] * 2)
        >>> flow.cell_log_prob(cells).exp().sum().item() > 0.999
        True
        """
        if self.grid is None:
            raise ValueError("cell_log_prob needs a grid: take flow.with_grid(grid)")
        h, c = self.rows("x", x, context)
        h = self._couple(self.plan(h, c), h, c)
        log_prob = F.cell_log_prob(h, self.scaling.log_scale, self.grid, self.prior_name)
        return _shaped(log_prob, self._batch_shape(x))

    def log_det(self, x: Tensor) -> Tensor:
        """Log-determinant of forward, the same for every x, (...): ``sum(log_scale)``; 0 with a
        grid."""
        check_events("x", x, self.event_shape, self.scaling.log_scale.device)
        return self._log_det(x)

    def _log_det(self, x: Tensor) -> Tensor:
        dtype = at_least_float32(x.dtype, self.dtype)
        if self.grid is None and not is_plain_scaling(self.scaling):  # whatever it does
            origin = torch.zeros(1, self.features, dtype=dtype, device=x.device)
            return self.scaling(origin)[1][0].expand(self._batch_shape(x))
        log_scale = self.scaling.log_scale.to(dtype)
        log_det = log_scale.sum() if self.grid is None else log_scale.new_zeros(())
        return log_det.expand(self._batch_shape(x))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``n`` draws: (n, \\*event_shape), or (..., n, \\*event_shape) for a context (..., K).

        The seed is drawn from ``generator`` (by default torch's own); the same seed draws the same
        noise whatever ``batch_size``, the number of rows computed at a time, is. ValueError for a
        negative ``n``, a ``batch_size`` below 1, or a context that does not fit.

        >>> import torch, nicefast as nf
        >>> flow = nf.NICE(4, hidden=(8,))
        >>> flow.sample(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 4])
        """
        n = check_count("n", n, 0)
        batch, c = self._sample_context(n, context)
        total = math.prod(batch)
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size, 1)
        step = batch_size or max(total, 1)
        seed = F.draw_seed(generator)
        if step >= total:
            return self._draw(total, 0, seed, _repeat(c, n, 0, total)).view(
                *batch, *self.event_shape
            )
        spans = [(start, min(start + step, total)) for start in range(0, total, step)]
        pieces = (self._draw(b - a, a, seed, _repeat(c, n, a, b)) for a, b in spans)
        if watchers.is_transformed():  # other tensors may stand in the place of the pieces
            return torch.cat(list(pieces)).view(*batch, *self.event_shape)
        device = self.scaling.log_scale.device
        out = torch.empty(total, self.features, dtype=self.dtype, device=device)
        for (a, b), piece in zip(spans, pieces, strict=True):
            out[a:b] = piece
        return out.view(*batch, *self.event_shape)

    def _draw(self, n: int, row_offset: int, seed: int | Tensor, context: Tensor | None) -> Tensor:
        """Rows ``row_offset`` to ``row_offset + n`` of a sample."""
        log_scale = self.scaling.log_scale
        like = torch.empty(1, self.features, dtype=self.dtype, device=log_scale.device)
        plan = self.plan(like.expand(n, -1), context)
        if plan.name == "kernel":
            return cast("KernelEngine", plan.engine).sample(
                n, row_offset, cast("int", seed), context
            )
        h = self._noise(n, seed, row_offset)
        # a transformation may have put other tensors in the place of h or of the context alone
        if plan.name != "layers" or watchers.is_transformed():
            return self._couple(plan, h, context, inverse=True)
        for coupling in reversed(self._couplings()):
            if type(coupling) is AdditiveCoupling and "inverse" not in vars(coupling):
                coupling.inverse_(h, context)
            else:
                h, _ = coupling.inverse(h, context)
        return h

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(x, log_prob)`` of ``n`` draws in one pass, with gradients; shapes as for sample.

        >>> import torch, nicefast as nf
        >>> flow = nf.NICE(4, hidden=(8,))
        >>> x, log_prob = flow.sample_and_log_prob(3)
        >>> torch.allclose(flow.log_prob(x), log_prob, atol=1e-4)
        True
        """
        n = check_count("n", n, 0)
        batch, c = self._sample_context(n, context)
        h = self._noise(math.prod(batch), F.draw_seed(generator), 0)
        log_prob = self._log_density(h)
        c = _repeat(c, n, 0, len(h))
        x = self._couple(self.plan(h, c), h, c, inverse=True)
        return x.view(*batch, *self.event_shape), log_prob.view(batch)

    def sample_like(self, batch: torch.Size, context: Tensor | None) -> Tensor:
        """One draw for each entry of ``batch`` (context (\\*batch, K)), with gradients."""
        h = self._noise(math.prod(batch), F.draw_seed(), 0)
        c = None if context is None else context.reshape(-1, self.context)
        x = self._couple(self.plan(h, c), h, c, inverse=True)
        return x.view(*batch, *self.event_shape)

    def frozen(self, batch: int | None = None) -> FrozenFlow:
        """A copy of the flow as it is now, for inference with the least overhead in a call.

        The copy owns its weights, cast, arranged and packed once; later changes of the flow do not
        reach it. It has ``log_prob``, ``forward``, ``inverse``, ``cell_log_prob``, ``sample`` and
        ``explain``, and records no gradients.

        Args:
            batch: on a GPU, calls are captured as CUDA graphs of so many rows and replayed, for any
                number of rows; ignored elsewhere.

        Raises:
            ValueError: batch < 1, or a log_scale that is not finite (on the CPU); by the copy's
                methods, a gradient that would have to be recorded.

        >>> import torch, nicefast as nf
        >>> flow, x = nf.NICE(4, hidden=(8,)), torch.randn(300, 4)
        >>> torch.allclose(flow.frozen().log_prob(x), flow.log_prob(x), atol=1e-5)
        True
        """
        if batch is not None:
            batch = check_count("batch", batch, 1)
        return FrozenFlow(self, batch)

    def graphed(self, batch: int, method: str = "log_prob") -> GraphedFlow:
        """Deprecated: :meth:`frozen` serves small batches; or ``log_prob`` (``forward``,
        ``inverse``) as a CUDA graph that follows the flow's parameters.

        The result is called as the method is, with any number of rows; ``batch`` of them go through
        the graph at a time. No gradients. Follows parameters as they change. Where there is no GPU
        it is the method itself.

        Raises:
            ValueError: batch < 1, or an unknown method.

        >>> import torch, nicefast as nf
        >>> flow, x = nf.NICE(4, hidden=(8,)), torch.randn(300, 4)
        >>> torch.allclose(flow.graphed(256)(x), flow.log_prob(x))
        True
        """
        batch = check_count("batch", batch, 1)
        check_choice("method", method, METHODS)
        warnings.warn(
            "NICE.graphed is deprecated: use NICE.frozen(batch)", DeprecationWarning, stacklevel=2
        )
        return GraphedFlow(self, batch, method)

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """The flow as a ``torch.distributions.Distribution``; batch shape that of the context.

        >>> import torch, nicefast as nf
        >>> d = nf.NICE((1, 4, 4), hidden=(8,)).distribution()
        >>> d.rsample((2, 3)).shape, d.log_prob(torch.zeros(5, 1, 4, 4)).shape
        (torch.Size([2, 3, 1, 4, 4]), torch.Size([5]))
        """
        return FlowDistribution(self, context)

    def transform(self, context: Tensor | None = None) -> FlowTransform:
        """The flow as a ``torch.distributions.Transform`` from data to latent; ``.inv`` goes back.

        >>> import torch, nicefast as nf
        >>> flow = nf.NICE(2, hidden=(8,), prior="normal")
        >>> base = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> d = torch.distributions.TransformedDistribution(base, flow.transform().inv)
        >>> torch.allclose(d.log_prob(torch.ones(3, 2)), flow.log_prob(torch.ones(3, 2)))
        True
        """
        return FlowTransform(self, context)

    def explain(self, rows: int = 65_536) -> str:
        """The plan of a log_prob of ``rows`` rows on the flow's device, and the reason for it.

        Engine, blocks, precision, number of products, work and bytes of all rows, and the least
        time that this device could need for them, by its measured rates. ValueError for rows < 1.

        >>> import nicefast as nf
        >>> print(nf.NICE(4, hidden=(8,)).explain().splitlines()[0])
        rows: every coupling is an MLP's, on one partition
        """
        rows = check_count("rows", rows, 1)
        log_scale = self.scaling.log_scale
        device = log_scale.device
        like = torch.empty(1, self.features, dtype=self.dtype, device=device).expand(rows, -1)
        context = like.new_empty(1, self.context).expand(rows, -1) if self.context else None
        return explanation(self.plan(like, context), rows, self.features, device)

    @property
    def dtype(self) -> torch.dtype:
        """Of samples: that of the parameters, at least float32."""
        return at_least_float32(self.scaling.log_scale.dtype)

    def check_context(self, context: Tensor | None) -> None:
        """TypeError or ValueError for a context that this flow does not take."""
        check_context(context, self.context, self.scaling.log_scale.device)

    def plan(self, x: Tensor, context: Tensor | None = None) -> Plan:
        """Which way rows x (N, D), with context (N, K) or none, take through the flow, and why:
        ``.name`` and ``.reason``. See :mod:`nicefast.engine.plan`.

        >>> import torch, nicefast as nf
        >>> nf.NICE(4, hidden=(8,)).plan(torch.zeros(3, 4)).name
        'rows'
        """
        return plan_call(self, x, context)

    def _engine(
        self, plan: Plan, x: Tensor, context: Tensor | None
    ) -> RowEngine | ExactEngine | None:
        """The engine that computes forward and inverse whole, where there is one."""
        engine = plan.engine
        if isinstance(engine, ExactEngine):
            return engine
        if engine is None or engine.log_scale is None:
            return None
        recorded = (x, context, self.scaling.log_scale, *engine.stack.parameters)
        return None if watchers.records(*recorded) else engine

    def _couple(
        self, plan: Plan, h: Tensor, context: Tensor | None, inverse: bool = False
    ) -> Tensor:
        """Rows through all couplings (inverse: back), as planned."""
        if plan.engine is not None:
            return run_couplings(plan.engine, h, context, inverse)
        for coupling in reversed(self._couplings()) if inverse else self._couplings():
            h, _ = coupling.inverse(h, context) if inverse else coupling(h, context)
        return h

    def _log_density(self, h: Tensor) -> Tensor:
        """log_prob of rows that come out of the couplings."""
        log_scale = self.scaling.log_scale
        if self.grid is not None or is_plain_scaling(self.scaling):
            return F.scale_log_prob(h, log_scale, self.prior_name)
        z, log_det = self.scaling(h)  # whatever it does
        return F.scale_log_prob(z, z.new_zeros(self.features), self.prior_name) + log_det

    def _couplings(self) -> list[AdditiveCoupling]:
        return cast("list[AdditiveCoupling]", list(self.couplings))

    def _batch_shape(self, x: Tensor) -> torch.Size:
        return x.shape[: x.ndim - len(self.event_shape)]

    def rows(self, name: str, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as (N, D) and the context as (N, K), checked, in at least float32."""
        if (
            type(x) is Tensor
            and x.dtype is torch.float32
            and x.layout is torch.strided
            and context is None
            and not self.context
            and x.ndim == 2
            and x.shape[1:] == self.event_shape
            and x.device == self.scaling.log_scale.device
        ):
            return x, None  # most calls: small batches feel what else is asked below
        check_events(name, x, self.event_shape, self.scaling.log_scale.device)
        self.check_context(context)
        batch = self._batch_shape(x)
        rows = x.reshape(math.prod(batch), self.features).to(at_least_float32(x.dtype))
        if context is None:
            return rows, None
        try:
            context = context.expand(*batch, self.context)
        except RuntimeError:
            raise ValueError(
                f"context must have leading dimensions that broadcast to those of {name}, "
                f"{tuple(batch)}, got shape {tuple(context.shape)}"
            ) from None
        return rows, context.reshape(math.prod(batch), self.context)

    def _noise(self, n: int, seed: int | Tensor, row_offset: int) -> Tensor:
        log_scale = self.scaling.log_scale
        plain = self.grid is not None or is_plain_scaling(self.scaling)
        h = F.sample_prior(
            log_scale if plain else torch.zeros_like(log_scale),
            n,
            self.prior_name,
            seed=seed,
            row_offset=row_offset,
            dtype=self.dtype,
        )
        h = h if plain else self.scaling.inverse(h)[0]
        return h if self.grid is None else round_to_grid(h, self.grid)

    def _sample_context(
        self, n: int, context: Tensor | None
    ) -> tuple[tuple[int, ...], Tensor | None]:
        self.check_context(context)
        if context is None:
            return (n,), None
        return (*context.shape[:-1], n), context.reshape(-1, self.context)

    says = "prior"

    def described(self) -> str:
        return f"prior {self.prior_name}"

    def extra_repr(self) -> str:
        grid = "" if self.grid is None else f", grid={self.grid:g}"
        return f"event_shape={tuple(self.event_shape)}, prior={self.prior_name}{grid}"


def _shaped(x: Tensor, shape: torch.Size) -> Tensor:
    """``x`` in this shape; it mostly is, and a view costs a small batch as much as a product."""
    return x if x.shape == shape else x.view(shape)


def _repeat(context: Tensor | None, n: int, start: int, stop: int) -> Tensor | None:
    """Rows ``start`` to ``stop`` of the context with each row repeated ``n`` times."""
    if context is None:
        return None
    return context[torch.arange(start, stop, device=context.device) // max(n, 1)]
