"""`nicefast fit`, `nicefast presets` and `nicefast data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..data import Dataset, inventory, load_data
from ..data.sources import roots
from ..evaluation import Evaluation
from ..runs import Run, carry_out, run_folder, write_run
from ..runtime.ranks import own_device, process_group
from ..training import PRESETS, Configuration
from .common import app, console, one_line_errors
from .progress import Silent, watched

DataDir = Annotated[
    Path | None,
    typer.Option(help="Where data sets are looked for; also NICEFAST_DATA.", show_default=False),
]
Download = Annotated[bool, typer.Option(help="Fetch what is missing; digests are checked.")]


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


@app.command("fit")
def fit_command(
    data: Annotated[
        str | None,
        typer.Argument(help="Name of a data set, or path of a file.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None, _option("Where everything starts from: see `nicefast presets`.")
    ] = None,
    config: Annotated[Path | None, _option("TOML file; run folders have theirs.")] = None,
    out: Annotated[Path | None, _option("Run folder; runs/PRESET by default.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
    hidden: Annotated[
        list[str] | None, _option("Widths of hidden layers, as 256,256; again for more layers.")
    ] = None,
    couplings: Annotated[int | None, _option("Number of additive couplings.")] = None,
    partition: Annotated[str | None, _option("half, alternating, checkerboard or random.")] = None,
    prior: Annotated[str | None, _option("logistic or normal.")] = None,
    activation: Annotated[str | None, _option("Of the conditioners.")] = None,
    dropout: Annotated[float | None, _option("Share of hidden units dropped in training.")] = None,
    epochs: Annotated[int | None, _option("Most passes over the training rows.")] = None,
    patience: Annotated[int | None, _option("Epochs to wait for a better validation.")] = None,
    batch_size: Annotated[int | None, _option("Rows in a step, over all processes.")] = None,
    lr: Annotated[float | None, _option("Learning rate.")] = None,
    weight_decay: Annotated[float | None, _option("Decoupled, on weight matrices.")] = None,
    averaging: Annotated[float | None, _option("Decay of the weights' moving average.")] = None,
    precision: Annotated[str | None, _option("Of products: float32, tf32 or bf16.")] = None,
    change: Annotated[
        list[str] | None, _option("Any other key, as recipe.clip=100; again for more.", "--set")
    ] = None,
    noise_draws: Annotated[int | None, _option("Noise draws for each held-out row.")] = None,
    seed: Annotated[int | None, _option("Of initial weights, shuffling and all noise.")] = None,
    device: Annotated[str | None, _option("Where to train: cpu, cuda, ...")] = None,
    header: Annotated[
        str | None, _option("Whether a .csv begins with names: yes, no or auto.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    tensorboard: Annotated[bool, typer.Option(help="Write events for TensorBoard, too.")] = False,
) -> None:
    """Fit a NICE to DATA, score it on held-out rows, and write a run folder.

    What is not given comes from --config, else from --preset, else from the preset of the data
    set's name, or `tabular`. Under torchrun, every process takes its share of each batch.
    """
    asked = {
        "model.couplings": couplings,
        "model.partition": partition,
        "model.prior": prior,
        "model.activation": activation,
        "model.dropout": dropout,
        "recipe.epochs": epochs,
        "recipe.patience": patience,
        "recipe.batch_size": batch_size,
        "recipe.lr": lr,
        "recipe.weight_decay": weight_decay,
        "recipe.averaging": averaging,
        "recipe.precision": precision,
        "noise_draws": noise_draws,
        "seed": seed,
        "device": device,
        "header": header,
    }
    with one_line_errors():
        changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        if hidden:
            changes["model.hidden"] = _widths(hidden)
        changes |= dict(_change(text) for text in change or ())
        settings = _start(data, preset, config).changed(changes)
        where = out or Path("runs") / (settings.preset or Path(settings.data).stem)
        _fit(settings, where, overwrite, resume, data_dir, download, tensorboard)


def _start(data: str | None, preset: str | None, config: Path | None) -> Configuration:
    if config is not None:
        if preset is not None:
            raise ValueError("--preset and --config: give one of them, a config names its preset")
        found = Configuration.of_file(config)
        return found if data is None else found.changed({"data": data})
    if preset is None and data is None:
        raise ValueError("DATA, --preset or --config must be given; see `nicefast presets`")
    return Configuration.of_preset(preset or (data if data in PRESETS else "tabular"), data)


def _fit(
    settings: Configuration,
    out: Path,
    overwrite: bool,
    resume: bool,
    data_dir: Path | None,
    download: bool,
    tensorboard: bool,
) -> None:
    rows = load_data(settings.data, data_dir, download, settings.header)
    with process_group(own_device(settings.device)) as ranks:
        if ranks.rank:
            folder = out.resolve().with_name(f"{out.name}.unfinished")
            ranks.wait()  # until the folder is there
            carry_out(settings, rows, folder, Silent(), resume)
            return
        screen = console()
        with run_folder(out, overwrite, resume) as (folder, finish):
            ranks.wait()
            with watched(screen, settings, folder if tensorboard else None) as watcher:
                run = carry_out(settings, rows, folder, watcher, resume)
            files = write_run(folder, run)
            finish()
    _report(screen, run, files, out)


@app.command("presets")
def presets_command() -> None:
    """List the presets: what each follows, and where it deviates."""
    screen = console()
    for name, preset in PRESETS.items():
        data = f" on {preset.data}" if preset.data and preset.data != name else ""
        screen.print(f"[bold]{name}[/bold]{data}: {preset.source}", soft_wrap=True)
        for deviation in preset.deviations:
            screen.print(f"    - {deviation}", soft_wrap=True)


@app.command("data")
def data_command(data_dir: DataDir = None) -> None:
    """List the data sets that are known, where they are, and what is missing."""
    with one_line_errors():
        entries = inventory(data_dir)
    screen = console()
    for entry in entries:
        state = f"found: {entry.place}" if entry.place else "found"
        if not entry.found:
            state = f"missing: {', '.join(entry.missing)}"
        screen.print(f"[bold]{entry.name}[/bold]: {entry.description}", soft_wrap=True)
        screen.print(f"    {state}", soft_wrap=True)
    looked = ", ".join(map(str, roots(data_dir)))
    screen.print(
        f"\nlooked in {looked}, and in folders there that are named as a set (--data-dir, "
        "NICEFAST_DATA)",
        soft_wrap=True,
    )


def _widths(texts: list[str]) -> tuple[int, ...]:
    hidden = ",".join(texts)
    try:
        widths = tuple(int(width) for width in hidden.split(","))
    except ValueError:
        widths = (0,)
    if min(widths) < 1:
        raise ValueError(f"--hidden must be positive integers such as 256,256, got {hidden!r}")
    return widths


def _change(text: str) -> tuple[str, Any]:
    """``key=value``, the value as TOML has it; a bare word is a string."""
    import tomllib

    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set must be KEY=VALUE, got {text!r}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _report(screen: Console, run: Run, files: list[str], out: Path) -> None:
    history = run.history
    stopped = "stopped early" if history.stopped_early else "all epochs done"
    for note in run.notes:
        screen.print(note, soft_wrap=True)
    screen.print(f"best epoch {history.best.epoch} of {len(history.epochs)} ({stopped})\n")
    screen.print(
        _table(
            run.data,
            run.preprocessing.noisy,
            run.held_out,
            "+-" if screen.options.ascii_only else "±",
        )
    )
    screen.print(f"\nwrote {out}: {', '.join(files)}", soft_wrap=True)
    screen.print("model.safetensors, loaded again, scores held-out rows exactly the same")


def _table(data: Dataset, noisy: bool, held_out: Any, plus_minus: str) -> Table:
    score: Evaluation = held_out["NICE"]
    noise = f", {score.draws} noise draws each (seed {score.seed})" if noisy else ""
    table = Table(title=f"{data.name}: {score.rows:,} held-out rows{noise}", title_style="bold")
    table.add_column("density")
    table.add_column("log-likelihood (nats)", justify="right")
    raw = any(abs(s.raw_log_prob - s.log_prob) > 1e-6 for s in held_out.values())
    if raw:
        table.add_column("on the raw scale", justify="right")
    if data.discrete:
        table.add_column("bits/dim", justify="right")
    for name, score in held_out.items():
        row = [name, f"{score.log_prob:.2f} {plus_minus} {score.standard_error:.2f}"]
        if raw:
            row.append(f"{score.raw_log_prob:.2f}")
        if score.bits_per_dim is not None:
            row.append(f"{score.bits_per_dim:.3f}")
        table.add_row(*row, style="bold" if name == "NICE" else "")
    return table
