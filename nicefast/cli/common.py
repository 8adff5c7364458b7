"""What every command shares: the application, errors in one line, finished runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

try:
    import typer
    from rich.console import Console
except ImportError as missing:
    # Without typer there is no app to report through, and a traceback would hide the one remedy.
    sys.stderr.write(f"nicefast: error: {missing}: pip install 'nicefast[train]'\n")
    raise SystemExit(2) from None

from .. import __version__
from ..data.header import HeaderWarning
from ..flow import NICE
from ..io.checkpoint import load
from ..preprocessing import Preprocessing

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


def main() -> None:
    """Entry point of the ``nicefast`` command."""
    app()


def console() -> Console:
    return Console(highlight=False)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what goes wrong into one line on stderr: exit code 2 for a user's input, else 1.

    Warnings are one line, too.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", HeaderWarning)
            warnings.showwarning = _warned
            yield
    except (
        ValueError, TypeError, ImportError, OSError, ArithmeticError, RuntimeError, MemoryError
    ) as error:  # fmt: skip
        said = " ".join(str(error).split()) or "out of memory"
        typer.echo(f"nicefast: error: {said}", err=True)
        users = not isinstance(error, RuntimeError | ArithmeticError | MemoryError)
        raise typer.Exit(2 if users else 1) from None
    except KeyboardInterrupt as interrupt:
        typer.echo(f"nicefast: interrupted{''.join(map(str, interrupt.args))}", err=True)
        raise typer.Exit(130) from None


def _warned(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"nicefast: warning: {' '.join(str(message).split())}", err=True)


class Finished(NamedTuple):
    """What a run folder holds for those who look at it."""

    model: NICE
    preprocessing: Preprocessing


def finished(run: Path, device: str = "cpu") -> Finished:
    """The model and the preprocessing of a run folder; ValueError where it is none."""
    if not (run / "result.json").is_file():
        raise ValueError(f"RUN {run} is no run folder: it has no result.json")
    return Finished(
        load(run / "model.safetensors", device),
        Preprocessing.load(run / "preprocessing.safetensors"),
    )
