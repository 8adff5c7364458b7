"""Lossless compression of images: `python -m bench compression [--data NAME] [--model RUN]`.

The held-out images of a data set, by a flow that was trained for it (`nicefast fit --preset
digits-lossless` or `mnist-lossless`; without --model the digits' is trained first) and by what
people have: PNG (optimised) and lossless WebP, each image alone and all of them as one tall sheet,
xz and zstd of the raw bytes. Everything is decoded and compared. Bits a pixel count whole files;
the flow's own size, which xz does not need, stands below. `--out FILE` writes the table as well.
"""

from __future__ import annotations

import argparse
import io
import lzma
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import nicefast as nf
from nicefast.compression import Codec, compress, decompress
from nicefast.data import load_data
from nicefast.preprocessing import Preprocessing

from .timing import device_name

Images = np.ndarray  # (N, H, W), uint8


class Way(NamedTuple):
    """How images become bytes, and bytes images again."""

    encode: Callable[[Images], list[bytes]]
    decode: Callable[[list[bytes], Images], Images]


class Result(NamedTuple):
    name: str
    bits: float
    encode: float  # seconds
    decode: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compression", description=__doc__)
    parser.add_argument("--data", default="digits", help="digits or mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--rows", type=int, default=10_000, help="at most so many images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a Markdown file for the table")
    options = parser.parse_args(argv)
    if options.rows < 1:
        parser.error(f"--rows must be at least 1, got {options.rows}")
    if options.model is None and options.data != "digits":
        parser.error(f"--model must be given for {options.data}")
    with tempfile.TemporaryDirectory() as place:
        run = options.model or train(Path(place, "run"))
        data = load_data(options.data, options.data_dir)
        images = data.test[: options.rows].numpy().astype(np.uint8).squeeze(1)
        found = [*by_flow(images, run, Path(place)), *by_others(images)]
        size = (run / "model.safetensors").stat().st_size
    text = table(found, images, options.data, size)
    print(text, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0


def train(run: Path) -> Path:
    from typer.testing import CliRunner

    from nicefast.cli import app

    arguments = ["fit", "--preset", "digits-lossless", "--out", str(run)]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    return run


def by_flow(images: Images, run: Path, place: Path) -> list[Result]:
    """RuntimeError where a byte does not come back."""
    np.save(place / "x.npy", images)
    done = compress(place / "x.npy", run, place / "x.nf")
    decompress(done.path, run, place / "y.npy")
    if (place / "y.npy").read_bytes() != (place / "x.npy").read_bytes():
        raise RuntimeError("nicefast: other images after decoding")
    steps = Preprocessing.load(run / "preprocessing.safetensors")
    codec = Codec(nf.load(run / "model.safetensors"), steps)
    rows = images.reshape(len(images), -1).astype(np.int64)
    pieces = [rows[i : i + codec.chunk] for i in range(0, len(rows), codec.chunk)]
    words, encoded = timed(lambda: [codec.encode(piece) for piece in pieces])
    _, decoded = timed(
        lambda: [codec.decode(w, len(p)) for w, p in zip(words, pieces, strict=True)]
    )
    ideal = sum(codec.bits(piece) for piece in pieces) / images.size
    bits = 8 * done.bytes / images.size
    return [Result(f"nicefast (the model's own likelihood: {ideal:.4f})", bits, encoded, decoded)]


def by_others(images: Images) -> list[Result]:
    found = []
    for name, way in ways().items():
        files, encoded = timed(lambda way=way: way.encode(images))
        back, decoded = timed(lambda way=way, files=files: way.decode(files, images))
        if not np.array_equal(back, images):
            raise RuntimeError(f"{name}: other images after decoding")
        bits = 8 * sum(map(len, files)) / images.size
        found.append(Result(name, bits, encoded, decoded))
    return found


def ways() -> dict[str, Way]:
    png, webp = {"format": "PNG", "optimize": True}, {"format": "WEBP", "lossless": True}
    webp |= {"quality": 100, "method": 6}
    found = {
        "PNG, each image": pictures(png, each=True),
        "PNG, one sheet": pictures(png, each=False),
        "WebP, each image": pictures(webp, each=True),
        "WebP, one sheet": pictures(webp, each=False),
        "xz -9e": raw(
            lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress
        ),
    }
    try:
        import zstandard
    except ImportError:
        print("zstd is left out: zstandard is not installed", file=sys.stderr)
    else:
        best = zstandard.ZstdCompressor(level=22)
        found["zstd -22"] = raw(best.compress, zstandard.ZstdDecompressor().decompress)
    return found


def pictures(options: dict[str, Any], each: bool) -> Way:
    """Pillow's formats: a file for each image, or sheets of images side by side."""
    from PIL import Image

    def encode(images: Images) -> list[bytes]:
        files = []
        for picture in images if each else sheets(images):
            out = io.BytesIO()
            Image.fromarray(picture).save(out, **options)
            files.append(out.getvalue())
        return files

    def decode(files: list[bytes], like: Images) -> Images:
        found = []
        for data in files:
            with Image.open(io.BytesIO(data)) as opened:
                found.append(np.asarray(opened.convert("L")))
        pieces = np.stack(found) if each else np.concatenate(found)
        return pieces.reshape(like.shape)

    return Way(encode, decode)


def sheets(images: Images) -> list[Images]:
    """Images below each other; 16,383 lines at most, which is what WebP can have."""
    most = 16_383 // images.shape[1]
    pieces = [images[i : i + most] for i in range(0, len(images), most)]
    return [piece.reshape(-1, images.shape[2]) for piece in pieces]


def raw(encode: Callable[[bytes], bytes], decode: Callable[[bytes], bytes]) -> Way:
    return Way(
        lambda images: [encode(images.tobytes())],
        lambda files, like: np.frombuffer(decode(files[0]), np.uint8).reshape(like.shape),
    )


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def table(found: Sequence[Result], images: Images, data: str, model: int) -> str:
    best = min(result.bits for result in found)
    lines = [
        f"# Lossless compression: {data}\n",
        f"Written by `python -m bench compression --data {data}`: {len(images):,} held-out images "
        f"of {images.shape[1]} x {images.shape[2]} pixels, a byte each. {device_name('cpu')}, "
        f"{time.strftime('%Y-%m-%d')}.\n",
        "| | bits a pixel | encoding, MB/s | decoding, MB/s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for result in found:
        bits = f"{result.bits:.3f}"
        speeds = (f"{images.nbytes / 1e6 / s:.2f}" for s in (result.encode, result.decode))
        bold = f"**{bits}**" if result.bits == best else bits
        lines.append(f"| {result.name} | {bold} | {' | '.join(speeds)} |")
    lines.append(
        f"\nThe flow's file has {model:,} bytes, which both sides need: "
        f"{8 * model / images.size:.2f} bits a pixel of these images, if they were all. "
        "Its speeds are those of coding alone: `nicefast compress` decodes as well, to compare. A "
        "level far beyond what the prior expects costs the coder fewer bits than the likelihood "
        "asks for it."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
