"""`nicefast compress` and `nicefast decompress`: levels in few bits, without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..compression import compress, decompress
from .common import app, console, one_line_errors

Model = Annotated[Path, typer.Option(help="A run folder, or a saved .safetensors.")]
Steps = Annotated[
    Path | None,
    typer.Option(help="Preprocessing of a model that is no run folder.", show_default=False),
]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier file.")]


@app.command("compress")
def compress_command(
    source: Annotated[
        Path, typer.Argument(help="IDX, .npy or .csv of integers, or a folder of PNG images.")
    ],
    model: Model,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    preprocessing: Steps = None,
    overwrite: Overwrite = False,
) -> None:
    """Compress SOURCE with a flow, without loss; it is decoded and compared before it is kept.

    The model should be one that was trained for it: presets digits-lossless and mnist-lossless.
    """
    with one_line_errors():
        done = compress(source, model, out, preprocessing, overwrite)
        console().print(
            f"{done.rows:,} rows, {done.raw_bytes:,} bytes -> {done.bytes:,} bytes: "
            f"{done.bits_per_dim:.3f} bits a value, {done.raw_bytes / done.bytes:.2f} times smaller"
        )


@app.command("decompress")
def decompress_command(
    source: Annotated[Path, typer.Argument(help="What `nicefast compress` wrote.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="The file, or the folder of images, to write.")],
    preprocessing: Steps = None,
    overwrite: Overwrite = False,
) -> None:
    """Write SOURCE's content again, byte for byte, with the model that compressed it."""
    with one_line_errors():
        console().print(f"wrote {decompress(source, model, out, preprocessing, overwrite)}")
