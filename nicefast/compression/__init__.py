"""Lossless compression with a flow: levels to bits by exact couplings, and back to every byte.

A flow on the grid of its data's levels maps rows of levels to rows of latents, one to one and to
the last bit, and the prior says how probable each latent is: bits are what is left to be written.
The length of a file is ``-sum cell_log_prob / ln 2`` bits, some bytes of head, and next to nothing
else.

codec      levels to latents, to bits, and back
tables     the prior's probabilities as integers; the entropy coder
container  the file: digests before anything else
sources    what can be compressed, and how it is written again
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import check_path
from ..io.files import naming, written
from ..scoring.models import resolve
from .codec import Codec
from .container import ARITHMETIC, CONTENT, MODEL, Head, Reader, Writer
from .sources import KINDS, Sink, open_source

__all__ = ["Codec", "Compressed", "compress", "decompress"]


class Compressed(NamedTuple):
    """What :func:`compress` wrote: sizes in bytes, and bits for each level."""

    path: Path
    rows: int
    raw_bytes: int
    bytes: int
    bits_per_dim: float


def compress(
    source: str | os.PathLike[str],
    model: Any,
    out: str | os.PathLike[str],
    preprocessing: Any = None,
    overwrite: bool = False,
) -> Compressed:
    """Write ``source`` to ``out`` in as few bits as the model gives it; no bit of it is lost.

    The file is decoded again, and compared with the source byte for byte, before it gets its name.
    Only the same model decodes it, and only where the arithmetic is the same: conditioners of MLPs
    are, on every machine; the prior's probabilities may differ in a last place, and the file then
    says so. Memory does not grow with the rows of .npy files and of folders; IDX and .csv are read
    whole.

    Args:
        source: an IDX file of uint8, an ``.npy`` of integers, a ``.csv`` of integers, or a folder
            of PNG images.
        model: a run folder, a saved flow or a :class:`nicefast.NICE`; best trained for it, by the
            likelihood of cells (the presets ``digits-lossless`` and ``mnist-lossless``).
        out: the file to write.
        preprocessing: with a model that is no run folder: a Preprocessing or a path.
        overwrite: replace ``out``.

    Raises:
        ValueError: no levels of this model in ``source`` (the row is named), a model that is no
            code (see :class:`Codec`), ``out`` exists, a .csv that is not restored to the byte.
        OSError: a file that cannot be read or written.
        ImportError: constriction, or pillow for images, is not installed.

    >>> import tempfile, numpy as np, torch, nicefast as nf
    >>> from nicefast.preprocessing import Preprocessing
    >>> steps = Preprocessing.fit(["dequantise"], torch.zeros(2, 8, dtype=torch.uint8), 4)
    >>> model = nf.NICE(8, hidden=(8,), grid=0.25)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     np.save(place + "/x.npy", np.arange(80).reshape(10, 8) % 4)
    ...     done = compress(place + "/x.npy", model, place + "/x.nf", steps)
    ...     _ = decompress(place + "/x.nf", model, place + "/y.npy", steps)
    ...     bool((np.load(place + "/y.npy") == np.load(place + "/x.npy")).all())
    True
    """
    check_path("source", source)
    check_path("out", out)
    out = Path(out)
    _check_out(out, overwrite)
    codec, found = _codec(model, preprocessing), open_source(source)
    if found.features != codec.features and (found.size or found.features):
        raise ValueError(
            f"input {source} must have rows of {codec.features} values, as the model does, "
            f"got {found.features}"
        )
    content, size = _digest(found.pieces())
    with written(out) as partial:
        with partial.open("wb") as file:
            kind = KINDS.index(found.kind)
            head = Head(kind, codec.identity, codec.arithmetic, found.size, found.wrapper)
            writer = Writer(file, head)
            for start in range(0, found.size, codec.chunk):
                stop = min(start + codec.chunk, found.size)
                try:
                    writer.chunk(codec.encode(found.rows(start, stop)))
                except ValueError as problem:
                    among = f", rows from {start:,} on" if start else ""
                    raise ValueError(f"input {source}{among}: {problem}") from None
            writer.finish(content)
        if not _restore(Reader(partial), codec, out, keep=False):
            raise ValueError(
                f"input {source} would not come back byte for byte: its values are not written as "
                "usual (spaces, quotes, signs, leading zeros or empty lines in a .csv)"
            )
    length = out.stat().st_size
    levels = max(found.size * found.features, 1)
    return Compressed(out, found.size, size, length, 8 * length / levels)


def decompress(
    path: str | os.PathLike[str],
    model: Any,
    out: str | os.PathLike[str],
    preprocessing: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write what was compressed to ``path`` to ``out``, byte for byte; a folder for images.

    Raises:
        ValueError: ``path`` is no compressed file, is damaged or cut off, was made with another
            model or where the arithmetic is another; ``out`` exists. Nothing is left behind.
        OSError, ImportError: as :func:`compress`, where an example is.
    """
    check_path("path", path)
    check_path("out", out)
    out, reader = Path(out), Reader(path)
    _check_out(out, overwrite)
    if not _restore(reader, _codec(model, preprocessing), out, keep=True):
        raise ValueError(f"{path} does not give back what was compressed, byte for byte")
    return out


def _codec(model: Any, preprocessing: Any) -> Codec:
    found, steps = resolve(model, preprocessing, None)
    return Codec(found, steps)  # type: ignore[arg-type]


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and (out.is_dir() or not overwrite):
        raise ValueError(f"out {out} exists already")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out {out}: there is no folder {out.absolute().parent}")


def _restore(reader: Reader, codec: Codec, out: Path, keep: bool) -> bool:
    """Decode into ``out``, to ``keep`` it or to look alone; whether it is what it was."""
    head, path = reader.head, reader.path
    if head.model != codec.identity[:MODEL]:
        raise ValueError(f"{path} was compressed with another model")
    if head.arithmetic != codec.arithmetic[:ARITHMETIC]:
        raise ValueError(
            f"{path} was compressed where the arithmetic is another: what the model computes "
            "differs here, so its bits cannot be read"
        )
    if head.kind >= len(KINDS):
        raise ValueError(f"{path} is of a kind that is not known, {head.kind}")
    seal = hashlib.blake2b(digest_size=CONTENT)
    kind = KINDS[head.kind]
    sink = _trusted(path, Sink, kind, head.rows, codec.features, head.wrapper, out)
    with naming(out), sink:
        seal.update(sink.begin())
        for rows, words in reader.chunks(codec.chunk):
            levels = _trusted(path, codec.decode, words, rows)
            seal.update(_trusted(path, sink.put, levels))
        same = seal.digest() == reader.content
        if same and keep:
            sink.finish()
    return same


def _trusted(path: Path, call: Callable[..., Any], *arguments: Any) -> Any:
    """``call(*arguments)`` of what a file says: whatever is wrong is the file's fault."""
    try:
        return call(*arguments)
    except (ValueError, AssertionError) as problem:  # constriction has both
        raise ValueError(f"{path} is damaged: {problem}") from None


def _digest(pieces: Iterator[bytes]) -> tuple[bytes, int]:
    seal, size = hashlib.blake2b(digest_size=CONTENT), 0
    for piece in pieces:
        seal.update(piece)
        size += len(piece)
    return seal.digest(), size
