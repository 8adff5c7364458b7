"""The command line: a thin face over training, baselines, runs and data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError as missing:
    # Without typer there is no app to report through, and a traceback would hide the one remedy.
    sys.stderr.write(f"nicefast: error: {missing}: pip install 'nicefast[train]'\n")
    raise SystemExit(2) from None

import torch
from torch import Tensor

from . import __version__
from .baselines import Gaussian
from .data import Dataset, dequantise, load_data
from .flow import NICE
from .runs import Run, new_folder, write_run
from .training import Density, Epoch, Evaluation, evaluate, fit, init_scaling

_OF_THE_FOLDER = ("out", "overwrite")

app = typer.Typer(
    help="NICE normalizing flows: exact densities and samples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nicefast {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """What every subcommand shares: nothing but --version."""


@app.command("fit")
def fit_command(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="'digits', or the path of a .npy file.")],
    out: Annotated[Path, typer.Option(help="Run folder to be written.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run folder.")] = False,
    hidden: Annotated[
        str, typer.Option(help="Widths of each conditioner's hidden layers.")
    ] = "256",
    couplings: Annotated[int, typer.Option(help="Number of additive couplings.")] = 8,
    partition: Annotated[
        str, typer.Option(help="half, alternating, checkerboard or random.")
    ] = "alternating",
    prior: Annotated[str, typer.Option(help="logistic or normal.")] = "logistic",
    activation: Annotated[str, typer.Option(help="Of the conditioners.")] = "relu",
    epochs: Annotated[int, typer.Option(help="Most passes over the training rows.")] = 120,
    patience: Annotated[int, typer.Option(help="Epochs to wait for a better validation.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Rows in a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 4e-3,
    weight_decay: Annotated[
        float, typer.Option(help="Decoupled, on weight matrices; much less for large data.")
    ] = 1.0,
    averaging: Annotated[float, typer.Option(help="Decay of the weights' moving average.")] = 0.995,
    noise_draws: Annotated[int, typer.Option(help="Noise draws for each held-out row.")] = 16,
    seed: Annotated[int, typer.Option(help="Of initial weights, shuffling and all noise.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
) -> None:
    """Fit a NICE to DATA, score it on held-out rows, and write a run folder."""
    console = Console(highlight=False)
    config = {name: context.params[name] for name in context.params if name not in _OF_THE_FOLDER}
    with _one_line_errors(), new_folder(out, overwrite) as folder:
        if not 0 <= seed < 2**63:
            raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {seed}")
        rows = load_data(data)
        torch.manual_seed(seed)
        model = NICE(rows.event_shape, _widths(hidden), couplings, prior, partition, activation)
        model.to(_device(device))
        console.print(_describe(rows, model), soft_wrap=True)

        x = _training_noise(rows, noise_draws, seed)
        init_scaling(model, x)
        with _progress(console, epochs) as progress:
            history = fit(
                model,
                rows,
                epochs=epochs,
                patience=patience,
                batch_size=batch_size,
                lr=lr,
                weight_decay=weight_decay,
                averaging=averaging,
                seed=seed,
                progress=progress,
            )
        baselines = _baselines(x, console)
        validation = {
            name: evaluate(baseline, rows.validation, rows.levels, noise_draws, seed)
            for name, baseline in baselines.items()
        }
        densities: dict[str, Density] = {"NICE": model, **baselines}
        held_out = {
            name: evaluate(density, rows.test, rows.levels, noise_draws, seed)
            for name, density in densities.items()
        }
        files = write_run(folder, Run(model, rows, history, held_out, validation, config))

    stopped = "stopped early" if history.stopped_early else "all epochs done"
    console.print(f"best epoch {history.best.epoch} of {len(history.epochs)} ({stopped})\n")
    console.print(_table(rows, held_out, "+-" if console.options.ascii_only else "±"))
    console.print(f"\nwrote {out}: {', '.join(files)}", soft_wrap=True)
    console.print("model.safetensors, loaded again, scores the held-out rows exactly the same")


def main() -> None:
    """Entry point of the ``nicefast`` command."""
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what goes wrong with a user's input into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, ArithmeticError, RuntimeError) as error:
        typer.echo(f"nicefast: error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1 if isinstance(error, RuntimeError) else 2) from None
    except KeyboardInterrupt:
        typer.echo("nicefast: interrupted, nothing was written", err=True)
        raise typer.Exit(130) from None


def _widths(hidden: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(width) for width in hidden.split(","))
    except ValueError:
        widths = (0,)
    if min(widths) < 1:
        raise ValueError(f"--hidden must be positive integers such as 256,256, got {hidden!r}")
    return widths


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} cannot be used here: {reason}") from None


def _training_noise(data: Dataset, draws: int, seed: int) -> Tensor:
    """The training rows as real values; k-level rows dequantised ``draws`` times over."""
    if data.levels is None:
        return data.train
    if draws < 1:
        raise ValueError(f"--noise-draws must be at least 1, got {draws}")
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([dequantise(data.train, data.levels, generator) for _ in range(draws)])


def _baselines(x: Tensor, console: Console) -> dict[str, Gaussian]:
    fitted = {}
    for name, make in (("full Gaussian", Gaussian.full), ("diagonal Gaussian", Gaussian.diagonal)):
        try:
            fitted[name] = make(x)
        except ValueError as error:
            console.print(f"no {name}: {error}", soft_wrap=True)
    return fitted


def _describe(data: Dataset, model: NICE) -> str:
    shape = " x ".join(map(str, data.event_shape))
    kind = "real values" if data.levels is None else f"{data.levels} levels, dequantised"
    parts = zip(
        (len(data.train), len(data.validation), len(data.test)),
        ("training", "validation", "test"),
        strict=True,
    )
    split = ", ".join(f"{rows:,} {part}" for rows, part in parts)
    size = sum(p.numel() for p in model.parameters())
    return (
        f"{data.name}: rows of {shape}, {kind}; {split}\n"
        f"NICE: {len(model.couplings)} additive couplings, {size:,} parameters, "
        f"{model.prior_name} prior"
    )


def _table(data: Dataset, held_out: dict[str, Evaluation], plus_minus: str) -> Table:
    score = held_out["NICE"]
    noise = "" if data.levels is None else f", {score.draws} noise draws each (seed {score.seed})"
    table = Table(title=f"{data.name}: {score.rows:,} held-out rows{noise}", title_style="bold")
    table.add_column("density")
    table.add_column("log-likelihood (nats)", justify="right")
    if data.levels is not None:
        table.add_column("bits/dim", justify="right")
    for name, score in held_out.items():
        row = [name, f"{score.log_prob:.2f} {plus_minus} {score.standard_error:.2f}"]
        if score.bits_per_dim is not None:
            row.append(f"{score.bits_per_dim:.3f}")
        table.add_row(*row, style="bold" if name == "NICE" else "")
    return table


@contextmanager
def _progress(console: Console, epochs: int) -> Iterator[Callable[[Epoch], None]]:
    """A progress bar on a terminal; about ten plain lines anywhere else."""
    if not console.is_terminal:
        every = max(1, epochs // 10)

        def line(epoch: Epoch) -> None:
            if epoch.epoch % every == 0 or epoch.epoch == 1:
                console.print(f"epoch {epoch.epoch:>4}/{epochs}: {_scores(epoch)}")

        yield line
        return

    bar = Progress(
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[scores]}"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("fit", total=epochs, scores="")

        def advance(epoch: Epoch) -> None:
            bar.update(task, completed=epoch.epoch, scores=_scores(epoch))

        yield advance


def _scores(epoch: Epoch) -> str:
    return f"training {epoch.train:.1f}, validation {epoch.validation:.1f} nats"
