"""What was public in 0.1 and is deprecated: :func:`choose_path`, ``NICE.graphed``."""

from __future__ import annotations

import threading
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from .engine import Flow, Plan, plan
from .engine.rows import RowEngine
from .runtime import captures
from .runtime.backend import get_backend
from .runtime.precision import matmul_precision

_one_at_a_time = threading.Lock()  # of the threads that share a graph, of which one captures it
METHODS = ("log_prob", "forward", "inverse")
NAMES = {  # of 0.1
    "kernel": "whole flow",
    "gemm": "products",
    "rows": "products",
    "layers": "layer by layer",
    "exact": "exact",
}


def choose_path(flow: Flow, x: Tensor, context: Tensor | None = None) -> Plan:
    """Deprecated: use :meth:`nicefast.NICE.plan`, or :meth:`nicefast.NICE.explain`.

    The way of rows ``x`` (N, D), with context (N, K) or none, through ``flow``: ``.name``, one of
    ``"whole flow"``, ``"products"``, ``"layer by layer"`` and ``"exact"``, and ``.reason``.

    >>> import torch, nicefast as nf
    >>> nf.choose_path(nf.NICE(4, hidden=(8,)), torch.zeros(1, 4)).name
    'products'
    """
    warnings.warn(
        "nicefast.choose_path is deprecated: use NICE.plan", DeprecationWarning, stacklevel=2
    )
    found = plan(flow, x, context)
    return found._replace(name=NAMES[found.name])


class Planned(Flow, Protocol):
    """The attributes of a :class:`nicefast.NICE` that :class:`GraphedFlow` uses."""

    event_shape: torch.Size

    def rows(self, name: str, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as (N, D) and the context as (N, K), checked."""
        ...

    def plan(self, x: Tensor, context: Tensor | None) -> Plan:
        """Which way such rows take."""
        ...


class GraphedFlow:
    """``flow.log_prob`` (or forward, or inverse) for rows in pieces of ``batch``, without gradient.

    On a GPU, where an engine computes it, the call is captured once as a CUDA graph and replayed;
    everywhere else it is simply made. The graph reads the parameters where they lie, so results
    follow whatever an optimizer or load_state_dict writes there; where a parameter is replaced or
    moved, or the precision, autocast or the backend changes, it is captured anew.

    Built by :meth:`nicefast.NICE.graphed`. Arguments, results and errors are those of the method.
    """

    def __init__(self, flow: Planned, batch: int, method: str) -> None:
        self.flow, self.batch, self.method = flow, batch, method
        self._graph: captures.Graph | None = None
        self._key: tuple[Any, ...] | None = None
        self._read: tuple[Tensor, ...] = ()  # none of these may go before the graph

    @torch.no_grad()
    def __call__(self, x: Tensor, context: Tensor | None = None) -> Any:
        call = getattr(self.flow, self.method)
        rows, c = self.flow.rows("z" if self.method == "inverse" else "x", x, context)
        engine = self.flow.plan(rows, c).engine
        if (
            not isinstance(engine, RowEngine)
            or engine.log_scale is None
            or not captures.can_capture(rows.device)
            or not len(rows)
        ):
            return call(x, context)

        def on_rows(rows: Tensor, c: Tensor | None) -> captures.Outputs:
            found = call(rows.view(-1, *self.flow.event_shape), c)
            return (found,) if isinstance(found, Tensor) else found

        # what is kept outlives the mode
        with _one_at_a_time, torch.inference_mode(False), torch.no_grad():
            key = _key(engine, rows, c)
            if self._graph is None or self._key != key:
                self._graph = None  # its memory goes before that of the next is taken
                self._graph = captures.Graph(on_rows, self.batch, rows, c)
                self._key, self._read = key, (*engine.stack.parameters, engine.log_scale)
            value, *rest = self._graph(rows, c)
        batch = x.shape[: x.ndim - len(self.flow.event_shape)]
        if self.method == "log_prob":
            return value.view(batch)
        return value.view(x.shape), rest[0].view(batch)


def _key(engine: Any, rows: Tensor, context: Tensor | None) -> tuple[Any, ...]:
    """All that a captured graph takes for granted."""
    stack = engine.stack
    read = (*stack.parameters, engine.log_scale)
    return (
        engine.name,
        engine.prior,
        stack.activation,
        stack.dtype,
        stack.partition,
        stack.conditioning,
        getattr(engine, "tile", None),
        [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in read],
        None if context is None else context.dtype,
        rows.device,
        get_backend(),
        matmul_precision(rows.device),
        torch.is_autocast_enabled("cuda"),
    )
