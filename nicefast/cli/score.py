"""`nicefast score`: densities of data of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..runtime.ranks import own_device, process_group
from ..scoring import OUTPUTS, Scores, score
from .common import app, console, one_line_errors


def _parts(texts: list[str]) -> list[str]:
    """The parts between commas, of an option that may be given again."""
    return [part for text in texts for part in text.split(",")]


def _names(texts: list[str] | None) -> list[Any] | None:
    """``a,b,3`` as names and positions; None where nothing was said."""
    if texts is None:
        return None
    parts = [part for part in _parts(texts) if part]
    return [int(part) if part.lstrip("-").isdigit() else part for part in parts]


@app.command("score")
def score_command(
    model: Annotated[Path, typer.Argument(help="A run folder, or a saved .safetensors.")],
    source: Annotated[
        str, typer.Argument(help="A file, a folder of Parquet files, or a quoted glob.")
    ],
    out: Annotated[Path, typer.Option(help="What to write: .npy, .parquet or .csv.")],
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Some of {', '.join(OUTPUTS)}; again for more.", show_default="log_prob"
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Feature columns, names or positions; again for more."),
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option(help="Columns to carry over unchanged; again for more.")
    ] = None,
    header: Annotated[
        str, typer.Option(help="Whether a .csv begins with names: yes, no or auto.")
    ] = "auto",
    reference: Annotated[
        Path | None,
        typer.Option(help=".npy of log-densities, for percentile.", show_default=False),
    ] = None,
    draws: Annotated[int, typer.Option(help="Noise draws for each row of integers.")] = 1,
    seed: Annotated[int, typer.Option(help="Of that noise.")] = 0,
    chunk_rows: Annotated[int, typer.Option(help="Rows that are finished together.")] = 65_536,
    batch_rows: Annotated[
        int | None,
        typer.Option(help="Rows that are computed together.", show_default="by free memory"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
    strict: Annotated[bool, typer.Option(help="A row that is not finite is an error.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted job.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result.")] = False,
) -> None:
    """Log-density of every row of SOURCE, in nats, in memory that does not grow with the rows.

    A job that is interrupted goes on with --resume, to the very same file. Rows with values that
    are not finite get NaN and are counted. Under torchrun, every process takes its share.
    """
    with one_line_errors():
        where = own_device(device)
        with process_group(where) as ranks, _progress(ranks.rank == 0) as (screen, progress):
            found = score(
                model,
                source,
                out,
                outputs=tuple(_parts(outputs or ["log_prob"])),
                columns=_names(columns),
                keys=_names(keys) or (),
                header=header,
                reference=reference,
                draws=draws,
                seed=seed,
                chunk_rows=chunk_rows,
                batch_rows=batch_rows,
                device=where,
                strict=strict,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
            )
        if ranks.rank == 0:
            _report(screen, found)


def _report(screen: Console, found: Scores) -> None:
    rate = found.rows / max(found.seconds, 1e-9)
    screen.print(
        f"wrote {found.path}: {found.rows:,} rows in {found.seconds:.1f} s, {rate:,.0f} rows/s",
        soft_wrap=True,
    )
    if found.bad:
        listed = ", ".join(map(str, found.bad_rows))
        more = ", ..." if found.bad > len(found.bad_rows) else ""
        screen.print(
            f"{found.bad:,} rows are not finite and have NaN: rows {listed}{more}", soft_wrap=True
        )


@contextmanager
def _progress(
    chief: bool,
) -> Iterator[tuple[Console, Callable[[int, int | None, int], None] | None]]:
    """A bar with rows/s, GB/s and the time left, on a terminal; silence anywhere else."""
    screen = console()
    if not (chief and screen.is_terminal):
        yield screen, None
        return
    bar = Progress(
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=screen,
    )
    with bar:
        task = bar.add_task("score", total=None, rate="")

        def told(done: int, total: int | None, moved: int) -> None:
            seconds = bar.tasks[0].elapsed or 1e-9
            rate = f"{done / seconds:,.0f} rows/s, {moved / seconds / 1e9:.2f} GB/s"
            bar.update(task, completed=done, total=total, rate=rate)

        yield screen, told
