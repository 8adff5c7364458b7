"""How a fit goes on, for people: a bar on a terminal, lines elsewhere, events for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data import Dataset
from ..flow import NICE
from ..preprocessing import Preprocessing, bits_per_dim
from ..training import Configuration, Epoch


class Silent:
    """Of processes that are not the first."""

    def begins(self, data: Dataset, model: NICE, preprocessing: Preprocessing) -> None:
        pass

    def epoch(self, epoch: Epoch) -> None:
        pass


class Watcher:
    """Says what begins, then one line or one step of a bar for each epoch."""

    def __init__(
        self, screen: Console, settings: Configuration, bar: Progress | None, events: Any
    ) -> None:
        self.screen, self.settings, self.bar, self.events = screen, settings, bar, events
        self.bits: Any = None

    def begins(self, data: Dataset, model: NICE, preprocessing: Preprocessing) -> None:
        shape = " x ".join(map(str, data.event_shape))
        kind = "real values"
        if data.discrete:
            kind = f"{data.levels} levels" if data.levels else "integers"
        parts = (data.train, data.validation, data.test)
        names = ("training", "validation", "test")
        split = ", ".join(f"{len(p):,} {name}" for p, name in zip(parts, names, strict=True))
        size = sum(p.numel() for p in model.parameters())
        self.screen.print(
            f"{data.name}: rows of {shape}, {kind}; {split}\n"
            f"preprocessing: {preprocessing.describe()}\n"
            f"NICE: {len(model.couplings)} additive couplings, {size:,} parameters, "
            f"{model.prior_name} prior",
            soft_wrap=True,
        )
        if data.discrete:
            log_det = preprocessing.forward(data.train[:2], self.settings.seed)[1]
            if log_det[0] == log_det[1]:  # the same for all rows
                self.bits = lambda nats: bits_per_dim(nats + log_det[0].item(), data.features)
        if self.bar is not None:
            self.task = self.bar.add_task("fit", total=self.settings.recipe.epochs, scores="")

    def epoch(self, epoch: Epoch) -> None:
        train, held = (
            f"{nats:.1f}" if abs(nats) >= 10 else f"{nats:.3f}"
            for nats in (epoch.train, epoch.validation)
        )
        scores = f"training {train}, validation {held} nats"
        if self.bits is not None:
            scores += f", {self.bits(epoch.validation):.3f} bits/dim"
        scores += f"; {epoch.rate:,.0f} rows/s"
        if self.events is not None:
            for name in ("train", "validation", "rate"):
                self.events.add_scalar(name, getattr(epoch, name), epoch.epoch)
        epochs = self.settings.recipe.epochs
        if self.bar is not None:
            self.bar.update(self.task, completed=epoch.epoch, scores=scores)
        elif epoch.epoch % max(1, epochs // 10) == 0 or epoch.epoch == 1:
            self.screen.print(f"epoch {epoch.epoch:>4}/{epochs}: {scores}")


@contextmanager
def watched(
    screen: Console, settings: Configuration, tensorboard: Path | None
) -> Iterator[Watcher]:
    """A progress bar on a terminal; about ten plain lines anywhere else."""
    events = None
    if tensorboard is not None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "--tensorboard needs tensorboard: pip install 'nicefast[tensorboard]'"
            ) from None
        events = SummaryWriter(tensorboard / "tensorboard")
    try:
        if not screen.is_terminal:
            yield Watcher(screen, settings, None, events)
            return
        bar = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[scores]}"),
            TimeRemainingColumn(),
            console=screen,
        )
        with bar:
            yield Watcher(screen, settings, bar, events)
    finally:
        if events is not None:
            events.close()
