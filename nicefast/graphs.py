"""Calls of a flow as CUDA graphs: for small batches, where launching costs more than computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import backend, captures
from .fused.whole import packed_beforehand
from .layers import is_plain_scaling
from .path import Flow, Path, choose_path
from .precision import matmul_precision

METHODS = ("log_prob", "forward", "inverse")
WARM_UP = 3  # calls before a capture: kernels are compiled, workspaces allocated

Outputs = tuple[Tensor, ...]


class Rows(Flow, Protocol):
    """What is asked of a :class:`nicefast.NICE`, which lives one floor up."""

    event_shape: torch.Size

    def rows(self, name: str, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as (N, D) and the context as (N, K), checked."""
        ...


class GraphedFlow:
    """``flow.log_prob`` (or forward, or inverse) for rows in pieces of ``batch``, without gradient.

    On a GPU, and on a path whose every launch is known, the call is captured once as a CUDA graph
    and replayed; everywhere else it is simply made. The graph reads the parameters where they lie,
    so results follow whatever an optimizer or load_state_dict writes there; where a parameter is
    replaced or moved, or the precision, autocast or the backend changes, it is captured anew.

    Built by :meth:`nicefast.NICE.graphed`. Arguments, results and errors are those of the method.
    """

    def __init__(self, flow: Rows, batch: int, method: str) -> None:
        self.flow, self.batch, self.method = flow, batch, method
        self._graph: _Graph | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, context: Tensor | None = None) -> Any:
        call = getattr(self.flow, self.method)
        rows, c = self.flow.rows("z" if self.method == "inverse" else "x", x, context)
        path = choose_path(self.flow, rows, c)
        known = path.chain is not None and is_plain_scaling(self.flow.scaling)
        if not (known and _can_capture(rows.device) and len(rows)):
            return call(x, context)
        pieces = []
        with torch.inference_mode(False), torch.no_grad():  # what is kept outlives the mode
            graph = self._graph_for(path, rows, c)
            for start in range(0, len(rows), self.batch):
                stop = start + self.batch
                pieces.append(graph.run(rows[start:stop], None if c is None else c[start:stop]))
        batch = x.shape[: x.ndim - len(self.flow.event_shape)]
        value, *rest = (p[0] if len(p) == 1 else torch.cat(p) for p in zip(*pieces, strict=True))
        if self.method == "log_prob":
            return value.view(batch)
        return value.view(x.shape), rest[0].view(batch)

    def _graph_for(self, path: Path, rows: Tensor, context: Tensor | None) -> _Graph:
        assert path.chain is not None
        # what a kernel wants packed, is packed here
        packed = () if path.whole is None else path.whole.packed()
        read = (*path.chain.parameters, self.flow.scaling.log_scale, *packed)
        key = self._key(path, read, rows, context)
        if self._graph is None or self._graph.key != key:
            self._graph = None  # its memory goes before that of the next is taken

            def call(x: Tensor, c: Tensor | None) -> Outputs:
                found = getattr(self.flow, self.method)(x.view(-1, *self.flow.event_shape), c)
                return (found,) if isinstance(found, Tensor) else found

            self._graph = _Graph(call, read, key, self.batch, rows, context)
        return self._graph

    def _key(
        self, path: Path, read: Outputs, rows: Tensor, context: Tensor | None
    ) -> tuple[Any, ...]:
        """All that a captured graph takes for granted."""
        assert path.chain is not None  # see __call__
        return (
            path.name,
            path.chain.activation,
            path.chain.bfloat16,
            path.chain.conditions,
            [(f.size, f.start, f.step, id(f.indices)) for f in path.chain.sides],
            path.whole and path.whole.tile,
            [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in read],
            None if context is None else context.dtype,
            rows.device,
            self.flow.prior_name,
            backend.get_backend(),
            matmul_precision(rows.device),
            torch.is_autocast_enabled("cuda"),
        )


class _Graph:
    """A call at fixed addresses; batches shorter than ``batch`` are followed by older rows."""

    def __init__(
        self,
        call: Callable[[Tensor, Tensor | None], Outputs],
        read: Outputs,
        key: tuple[Any, ...],
        batch: int,
        rows: Tensor,
        context: Tensor | None,
    ) -> None:
        self.key = key
        self._read = read  # none of these may go before the graph
        self._x = rows.new_zeros(batch, rows.shape[1])
        self._c = None if context is None else context.new_zeros(batch, context.shape[1])
        with packed_beforehand():
            self._replay, self._outputs = _capture(lambda: call(self._x, self._c), rows.device)

    def run(self, rows: Tensor, context: Tensor | None) -> Outputs:
        n = len(rows)
        self._x[:n].copy_(rows)
        if self._c is not None and context is not None:
            self._c[:n].copy_(context)
        self._replay()
        return tuple(t[:n].clone() for t in self._outputs)


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and not captures.is_capturing(device)


def _capture(
    call: Callable[[], Outputs], device: torch.device
) -> tuple[Callable[[], None], Outputs]:
    """What computes the call again, and where its outputs will lie."""
    with captures.beside(device):
        for _ in range(WARM_UP):
            call()
    return captures.capture(call, device)
