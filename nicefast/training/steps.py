"""One training step; on a GPU, as one CUDA graph that never waits for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..evaluation import density
from ..flow import NICE
from ..runtime import captures
from ..runtime.ranks import Ranks
from .optimisers import STATES

WARM_UP = 3  # real steps before the capture: kernels are compiled, the optimiser's state is made


class _Sum(nn.Module):
    """The sum of log-densities, by weights of rows: what DistributedDataParallel can call."""

    def __init__(self, model: NICE, objective: str) -> None:
        super().__init__()
        self.density = density(model, objective)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        log_prob = self.density.log_prob(x)
        return log_prob.sum() if weights is None else (log_prob * weights).sum()


class Step:
    """Forward, backward, clipping and the optimiser, for one batch.

    The sum of log-likelihoods and the first step at which it was not finite are kept on the
    device, and are read when somebody asks.
    """

    def __init__(
        self,
        model: NICE,
        optimiser: Optimizer,
        clip: float,
        ranks: Ranks,
        objective: str = "density",
    ) -> None:
        self.model, self.optimiser, self.clip, self.ranks = model, optimiser, clip, ranks
        device = model.scaling.log_scale.device
        self.device = device
        summed: nn.Module = _Sum(model, objective)
        if ranks.world > 1:
            summed = DistributedDataParallel(summed)
        self._sum: Callable[..., Tensor] = summed
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._taken = torch.zeros((), dtype=torch.int64, device=device)
        self._bad = torch.full((), -1, dtype=torch.int64, device=device)
        # the gradients of several processes are exchanged by hooks, which no graph knows
        # and a flow with a grid looks at its range, on the host
        self._captures = device.type == "cuda" and ranks.world == 1 and model.grid is None
        self._warm = 0
        self._graph: tuple[Callable[[], None], list[Tensor]] | None = None
        self._turns = captures.Turns(device)

    def __call__(
        self,
        x: Tensor,
        lr: float,
        momentum: float | None,
        rows: int,
        full: bool,
        weights: Tensor | None = None,
    ) -> None:
        """Take a step along the gradient of the mean over the ``rows`` of all ranks.

        With ``weights`` (one a row of x) the mean is ``sum_i w_i log p(x_i) / rows``. All steps
        have weights, or none has.
        """
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            if momentum is not None and momentum != group["momentum"]:
                group["momentum"] = momentum  # a number that a graph has within it
                self._graph, self._warm = None, 0
        with self._turns:  # the weights are one memory, whatever stream a step is taken on
            given = [x] if weights is None else [x, weights]
            self._take_or_replay(given, rows, full)

    def _take_or_replay(self, given: list[Tensor], rows: int, full: bool) -> None:
        if not (self._captures and full):
            self._take(given, rows)
            return
        if self._graph is None and self._warm < WARM_UP:
            self._warm += 1
            with captures.on_capture_stream(self.device):
                self._take(given, rows)
            return
        if self._graph is None:
            self._graph = self._capture(given, rows)
        replay, places = self._graph
        for place, value in zip(places, given, strict=True):
            place.copy_(value)
        replay()

    def _capture(self, given: list[Tensor], rows: int) -> tuple[Callable[[], None], list[Tensor]]:
        places = [value.clone() for value in given]
        self.optimiser.zero_grad(set_to_none=True)
        replay, _ = captures.capture(lambda: self._take(places, rows), self.device)
        return replay, places

    def _take(self, given: list[Tensor], rows: int) -> None:
        total = self._sum(*given)
        self.optimiser.zero_grad(set_to_none=True)
        # DistributedDataParallel takes the mean over ranks where the sum is wanted
        (total * (-self.ranks.world / rows)).backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()
        with torch.no_grad():
            # a log_prob is finite with infinite weights never, but with an infinite log_scale once
            finite = total.isfinite() & self.model.scaling.log_scale.isfinite().all()
            first = (self._bad < 0) & ~finite
            self._bad.copy_(torch.where(first, self._taken, self._bad))
            self._taken += 1
            self._total += total.detach()

    def first_bad(self) -> int | None:
        """The first step, from 0, whose log-likelihood was not finite, on any rank."""
        known = torch.where(self._bad < 0, torch.iinfo(torch.int64).max, self._bad)
        if self.ranks.world > 1:
            torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MIN)
        found = int(known)
        return None if found == torch.iinfo(torch.int64).max else found

    def take_total(self) -> float:
        """The sum of log-likelihoods over all rows and ranks since this was last asked."""
        total = self.ranks.sum(self._total.clone()).item()
        self._total.zero_()
        return total

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, but for the weights."""
        found = {"total": self._total, "taken": self._taken}
        for i, state in self.optimiser.state_dict()["state"].items():
            found |= {f"{i}.{name}": value for name, value in state.items()}
        return found

    def restore(self, found: dict[str, Tensor], taken: int) -> None:
        """Back to what :meth:`state` gave after ``taken`` steps.

        ValueError, KeyError or RuntimeError where these are not the tensors of such a state;
        nothing has been changed then.
        """
        found = dict(found)
        total, steps = found.pop("total"), found.pop("taken")
        _check_like("total", total, self._total)
        _check_like("taken", steps, self._taken)
        if int(steps) != taken or not total.isfinite():
            raise ValueError(f"its optimiser has taken {int(steps)} steps, the fit {taken}")
        states: dict[int, dict[str, Any]] = {}
        for key, value in found.items():
            number, _, name = key.partition(".")
            states.setdefault(int(number), {})[name] = value
        groups = self.optimiser.param_groups
        parameters = [p for group in groups for p in group["params"]]
        for i, state in states.items():
            if not 0 <= i < len(parameters) or state.keys() != STATES[type(self.optimiser)]:
                raise ValueError(f"its optimiser has {', '.join(state)} for parameter {i}")
            for name, value in state.items():
                if name != "step":
                    _check_like(f"{i}.{name}", value, parameters[i])
                elif value.ndim or not 0 <= value <= taken:
                    raise ValueError(f"its optimiser has step {value} for parameter {i}")
        self._total.copy_(total)
        self._taken.copy_(steps)
        saved = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": states, "param_groups": saved})


def _check_like(name: str, value: Tensor, own: Tensor) -> None:
    if (value.dtype, value.shape) != (own.dtype, own.shape):
        raise ValueError(f"{name} is {tuple(value.shape)}, {value.dtype}")
