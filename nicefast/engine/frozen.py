"""An immutable copy of a flow for inference, which owns what each call of the flow prepares anew.

Where an engine computes the flow by its tensors (``rows``, ``kernel``, ``gemm``), a call of a
frozen flow reads no modules and casts, packs or arranges no weights; on a GPU its calls can be
captured as CUDA graphs and replayed. Flows with a grid, and flows computed layer by layer, are only
copied.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count
from ..runtime import backend, watchers
from ..runtime.captures import Graph, can_capture, has_graphs
from ..runtime.threads import without_autograd
from .exact import ExactEngine
from .explanation import explanation
from .gemm import GemmEngine, gives_numbers
from .kernel import KernelEngine
from .linear import input_major, prepared_linear
from .plan import Plan, plan, why_layers
from .rows import Residuals, RowEngine


class FrozenFlow:
    """A flow as it was when it was frozen, for inference: see :meth:`nicefast.NICE.frozen`.

    Arguments, shapes, results and errors are those of the flow's own methods. Freezing fixes the
    dtype of the operands of products (autocast, float32 matmul precision) and switches dropout off.
    TF32 follows the setting in force at each call, but for the whole-flow kernel and CUDA graphs.
    Unpickling freezes anew. ValueError for a call whose gradient would have to be recorded.

    Attributes:
        batch: rows of one CUDA graph, or None.
        event_shape, features, context, dtype: those of the flow.

    >>> import torch, nicefast as nf
    >>> flow, x = nf.NICE(4, hidden=(8,)), torch.randn(3, 4)
    >>> frozen = flow.frozen()
    >>> before = frozen.log_prob(x)
    >>> _ = flow.scaling.log_scale.data.add_(1)
    >>> torch.equal(frozen.log_prob(x), before)
    True
    """

    def __init__(self, flow: Any, batch: int | None = None) -> None:
        own = detached_copy(flow).eval().requires_grad_(False)
        self.batch = batch
        self.event_shape: torch.Size = own.event_shape
        self.features: int = own.features
        self.context: int = own.context
        self.dtype: torch.dtype = own.dtype
        self._flow, self._plan = own, _plan(own, batch)
        own.plan = functools.partial(_choose, self._plan)  # what all of the copy's methods ask
        self._device = own.scaling.log_scale.device
        self._kind = self._device.type  # which takes longer to ask for than most that is asked
        log_scale: Any = getattr(self._plan.engine, "log_scale", None)  # None: modules are called
        self._usual = (
            log_scale is not None
            and not isinstance(self._plan.engine, ExactEngine)
            and not self.context
            and len(self.event_shape) == 1
        )
        self._log_det: float = log_scale.sum().item() if self._usual else math.nan

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """As :meth:`nicefast.NICE.log_prob`: (...), in nats."""
        engine = self._engine_of(x, context)
        return self._call("log_prob", x, context) if engine is None else engine.log_prob(x)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`nicefast.NICE.forward`: ``(z, log_det)``."""
        engine = self._engine_of(x, context)
        if engine is None:
            return self._call("forward", x, context)
        return engine.forward(x), x.new_full((x.shape[0],), self._log_det)

    __call__ = forward

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`nicefast.NICE.inverse`: ``(x, log_det)``."""
        engine = self._engine_of(z, context)
        if engine is None:
            return self._call("inverse", z, context)
        return engine.inverse(z), z.new_full((z.shape[0],), -self._log_det)

    def cell_log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """As :meth:`nicefast.NICE.cell_log_prob`: (...), in nats."""
        return self._call("cell_log_prob", x, context)

    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As :meth:`nicefast.NICE.sample`: (n, \\*event_shape)."""
        return self._flow.sample(n, context, batch_size, generator)

    def explain(self, rows: int = 65_536) -> str:
        """As :meth:`nicefast.NICE.explain`."""
        rows = check_count("rows", rows, 1)
        device = self._flow.scaling.log_scale.device
        return explanation(self._plan, rows, self.features, device, frozen=True)

    def __repr__(self) -> str:
        return f"FrozenFlow({self._flow.extra_repr()}; {self._plan.name})"

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenFlow:
        return self  # immutable

    def __reduce__(self) -> tuple[Any, ...]:
        own = copy.copy(self._flow)
        own.__dict__ = {k: v for k, v in vars(own).items() if k != "plan"}
        return FrozenFlow, (own, self.batch)

    def _engine_of(self, x: Tensor, context: Tensor | None) -> Any:
        """The engine for the usual rows of most calls, which need nothing else; None for all others
        (:meth:`_call` serves them).

        Such rows are (N, D), float32 and without gradient, of a flow without context; nothing but
        autograd watches, autocast is off, and the backend is not the definition.
        """
        if (
            not self._usual
            or context is not None
            or type(x) is not Tensor
            or x.dtype is not torch.float32
            or x.layout is not torch.strided
            or x.ndim != 2
            or x.size(1) != self.features
            or x.requires_grad
            or x.device != self._device
            or torch.is_autocast_enabled(self._kind)
            or watchers.is_watched()
            or backend.get_backend() == "reference"
        ):
            return None
        return self._plan.engine

    def _call(self, method: str, x: Tensor, context: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            if watchers.records(*(t for t in (x, context) if isinstance(t, Tensor))):
                raise ValueError(
                    "a frozen flow records no gradients, and a tensor that was given requires one: "
                    "call the flow that was frozen, or detach the tensor"
                )
            with torch.no_grad():
                return getattr(self._flow, method)(x, context)
        return getattr(self._flow, method)(x, context)


class _CapturedEngine:
    """An engine on a GPU whose calls are replayed, ``batch`` rows at a time."""

    def __init__(self, engine: RowEngine, batch: int) -> None:
        self._engine, self._batch, self._device = engine, batch, engine.stack.device
        self._graphs: dict[Hashable, Graph] = {}
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, save: list[Residuals] | None = None
    ) -> Tensor:
        return self._run("log_prob", self._engine.log_prob, x, context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run("forward", self._engine.forward, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run("inverse", self._engine.inverse, z, context)

    def couple(
        self,
        x: Tensor,
        context: Tensor | None = None,
        inverse: bool = False,
        save: list[Residuals] | None = None,
    ) -> Tensor:
        def call(x: Tensor, c: Tensor | None) -> Tensor:
            return self._engine.couple(x, c, inverse)

        return self._run(f"couple, inverse={inverse}", call, x, context)

    def _run(
        self, name: str, call: Callable[..., Tensor], x: Tensor, context: Tensor | None
    ) -> Tensor:
        if not can_capture(self._device) or not x.size(0):
            return call(x, context)
        key = name if context is None else (name, context.dtype)
        graph = self._graphs.get(key) or self._capture(key, call, x, context)
        return graph(x, context)[0]

    def _capture(
        self, key: Hashable, call: Callable[..., Tensor], x: Tensor, context: Tensor | None
    ) -> Graph:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if key not in self._graphs:  # nor has another thread captured it meanwhile
                self._graphs[key] = Graph(lambda *a: (call(*a),), self._batch, x, context)
            return self._graphs[key]


def _choose(made: Plan, x: Tensor, context: Tensor | None) -> Plan:
    """The plan that was made, where its engine computes such rows."""
    if not isinstance(made.engine, (RowEngine, _CapturedEngine)):
        return made
    reason = why_layers(x, context)
    return made if reason is None else Plan("layers", reason)


def detached_copy(flow: Any) -> Any:
    """A deep copy, also of what a layer computed with gradients and kept, as a pruned one does."""
    kept = (t for module in flow.modules() for t in vars(module).values() if isinstance(t, Tensor))
    return copy.deepcopy(flow, {id(t): t.detach().clone() for t in kept if not t.is_leaf})


def _plan(flow: Any, batch: int | None) -> Plan:
    """The plan of the copy, with an engine whose weights are cast, arranged and packed."""
    like = torch.empty((1, flow.features), dtype=flow.dtype, device=flow.scaling.log_scale.device)
    context = like.new_empty(1, flow.context) if flow.context else None
    found = plan(flow, like, context)
    engine = found.engine
    if not isinstance(engine, RowEngine):
        return found
    with without_autograd(like.device):
        engine.layers = [
            [(input_major(w.detach().contiguous()), b.detach().contiguous()) for w, b in layers]
            for layers in engine.layers
        ]
        if type(engine) is RowEngine and like.is_cpu:
            engine.linear = prepared_linear
            engine.layers = [[(w.t(), b) for w, b in layers] for layers in engine.layers]
        if engine.log_scale is not None:
            _ = engine.density
        if isinstance(engine, KernelEngine):
            _ = engine.packed
        if isinstance(engine, GemmEngine) and like.device.type == "cuda":
            engine.fuses_relu = gives_numbers(engine.stack)
    if batch is not None and has_graphs(like.device):
        return found._replace(engine=_CapturedEngine(engine, batch))  # type: ignore[arg-type]
    return found
