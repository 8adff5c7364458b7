"""Where the files of named data sets are looked for, and how they are fetched."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfileobj
from typing import Any
from urllib.request import urlopen

from ..io.files import written

FOLDERS = ("data", "/usr/share/datasets")  # looked in where nothing else is said


@dataclass(frozen=True)
class Source:
    """A named data set: where it comes from and how it is read.

    Attributes:
        description: one line on what it is.
        note: who made it, under what licence, how to get it.
        load: makes the data set of its name and the paths of its files, in the order of ``files``.
        files: for each file, the names that it may have.
        folders: folders that may hold the files, beside the one of the data set's own name.
        remote: (URL, MD5) of each file, or of a ``.tar.gz`` with all of them.
        package: the Python package that it is part of, in place of files.
    """

    description: str
    note: str
    load: Callable[[str, Sequence[Path]], Any]
    files: tuple[tuple[str, ...], ...] = ()
    folders: tuple[str, ...] = ()
    remote: tuple[tuple[str, str], ...] = ()
    package: str | None = None


@dataclass(frozen=True)
class Entry:
    """What :func:`inventory` says of one named data set.

    Attributes:
        name, description, note: as in :class:`Source`.
        found: whether :func:`load_data` has all that it needs.
        place: the folder with its files; ``None`` where there is none, or for a package's data.
        missing: the files that were not found, or the package.
        looked_in: the folders that were searched, in order.
        downloads: whether ``download=True`` can get it.
    """

    name: str
    description: str
    note: str
    found: bool
    place: Path | None
    missing: tuple[str, ...]
    looked_in: tuple[Path, ...]
    downloads: bool


def roots(data_dir: str | Path | None) -> list[Path]:
    if data_dir is not None:
        return [Path(data_dir).expanduser()]
    named = [folder for folder in os.environ.get("NICEFAST_DATA", "").split(os.pathsep) if folder]
    return [Path(folder).expanduser() for folder in named or FOLDERS]


def paths_in(source: Source, folder: Path) -> list[Path | None]:
    """Where each file is in the folder, under the first of its names that is there."""
    return [
        next((folder / name for name in names if (folder / name).is_file()), None)
        for names in source.files
    ]


def entry_of(name: str, source: Source, data_dir: str | Path | None) -> Entry:
    # MNIST and Fashion-MNIST have files of the same names: a set's own folder comes first.
    below = (name, *source.folders, "")
    looked_in = tuple(dict.fromkeys(root / folder for root in roots(data_dir) for folder in below))
    if source.files:
        place, missing = looked_in[0], tuple(names[0] for names in source.files)
    else:
        absent = source.package is not None and find_spec(source.package) is None
        place, looked_in, missing = None, (), (f"package {source.package}",) if absent else ()
    for folder in looked_in:
        found = zip(source.files, paths_in(source, folder), strict=True)
        lacking = tuple(names[0] for names, path in found if path is None)
        if len(lacking) < len(missing):
            place, missing = folder, lacking
    here, downloads = None if missing else place, bool(source.remote)
    about = name, source.description, source.note
    return Entry(*about, not missing, here, missing, looked_in, downloads)


def not_found(entry: Entry) -> str:
    ways = "point --data-dir or NICEFAST_DATA at their folder"
    if entry.downloads:
        ways += ", or add --download (download=True)"
    return (
        f"data {entry.name!r} not found: missing {', '.join(entry.missing)}; looked in "
        f"{', '.join(map(str, entry.looked_in))}; {ways}. {entry.note}"
    )


def download(source: Source, folder: Path) -> None:
    """Get what is missing in the folder."""
    here = {path.name for path in paths_in(source, folder) if path is not None}
    for url, md5 in source.remote:
        file = url.rpartition("/")[2]
        if any(file in names and here.intersection(names) for names in source.files):
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(url, md5, folder / file)
            if file.endswith(".tar.gz"):
                _unpack(folder / file, {name for names in source.files for name in names})
        except (OSError, HTTPException, tarfile.TarError) as why:
            raise ValueError(f"{url}: could not be downloaded to {folder} ({why})") from why


def _fetch(url: str, md5: str, path: Path) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with (
        written(path) as partial,
        partial.open("wb") as file,
        urlopen(url, timeout=60) as answer,
    ):
        while block := answer.read(2**20):
            file.write(block)
            digest.update(block)
        if digest.hexdigest() != md5:
            raise ValueError(f"{url}: expected MD5 {md5}, got {digest.hexdigest()}; nothing kept")


def _unpack(archive: Path, wanted: set[str]) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            path = archive.with_name(Path(member.name).name)
            content = tar.extractfile(member) if path.name in wanted else None
            if content is not None:
                with written(path) as partial, partial.open("wb") as file:
                    copyfileobj(content, file)
    archive.unlink()
