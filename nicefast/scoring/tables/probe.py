"""What an HDF5 file holds, found out by a process of its own.

The HDF5 library is C that trusts its files: a damaged one can end the process that opens it. This
file is run, not imported: ``python probe.py`` reads a request from its standard input and writes
what it found to its standard output, both JSON. It imports h5py and nothing of this package.
"""

from __future__ import annotations

import json
import math
import sys

READ_WHOLE = 1 << 20  # bytes of a file whose rows are all read once
STEP = 1 << 22  # bytes that are read at a time
MOST_READ = 1 << 28  # bytes of rows that are read: a file may say that it has more
MEMORY = 1 << 30  # bytes of address space, beyond what the libraries take
SECONDS = 60


def limit() -> None:
    """Bound memory and time; nothing where the system has no such limits."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


def examine(path: str, key: str | None) -> dict[str, object]:
    """The dataset ``key``, or the only one of numbers; what is wrong is under "wrong"."""
    import h5py

    limit()
    with h5py.File(path, "r") as file:
        known: dict[str, str] = {}

        def note(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset) and item.ndim:
                known[f"/{name}"] = item.dtype.kind

        file.visititems(note)
        name = key if key is None or key.startswith("/") else f"/{key}"
        if name is None:
            numbers = [one for one, kind in known.items() if kind in "fiub"]
            if len(numbers) != 1:
                listing = ", ".join(numbers) or "none"
                outside = link_to_outside(file, None)
                return {
                    "wrong": f"expected one dataset of numbers, found {listing}"
                    + (f"; {outside}" if outside and not numbers else "")
                    + f"; say which: {path}::/name"
                }
            name = numbers[0]
        if name not in known:
            outside = link_to_outside(file, name)
            listing = ", ".join(known) or "none"
            return {"wrong": outside or f"expected a dataset {name!r}, found {listing}"}
        return describe(file[name], name, path)


def link_to_outside(file: object, name: str | None) -> str | None:
    """What to say of a link to another file on the way to ``name``, or at the top of the file."""
    import h5py

    paths = list(file) if name is None else name.strip("/").split("/")  # type: ignore[call-overload]
    for i, one in enumerate(paths):
        at = one if name is None else "/".join(paths[: i + 1])
        try:
            link = file.get(at, getlink=True)  # type: ignore[attr-defined]
        except (KeyError, RuntimeError):
            return None
        if isinstance(link, h5py.ExternalLink):
            return f"{'/' + at!r} is a link to another file, {link.filename!r}: it is not followed"
    return None


def describe(dataset: object, name: str, path: str) -> dict[str, object]:
    """Shape and dtype of a dataset whose rows could be read here."""
    import os

    d: object = dataset
    if d.is_virtual or d.external is not None:  # type: ignore[attr-defined]
        how = "virtual" if d.is_virtual else "external"  # type: ignore[attr-defined]
        return {"wrong": f"dataset {name!r} has {how} storage, its values are in other files"}
    shape, dtype, chunks = d.shape, d.dtype, d.chunks  # type: ignore[attr-defined]
    row = math.prod(shape[1:]) * dtype.itemsize
    chunk = math.prod(chunks) * dtype.itemsize if chunks else 0
    found = {
        "name": name,
        "shape": list(shape),
        "dtype": dtype.str,
        "row": row,
        "chunk": chunk,
    }
    small = os.path.getsize(path) <= READ_WHOLE
    if dtype.kind in "fiub" and small and row and max(row, chunk) <= MOST_READ:
        step = max(1, STEP // row)
        for start in range(0, min(shape[0], MOST_READ // row), step):
            d[start : start + step]  # type: ignore[index]
    return found


def main() -> None:
    request = json.load(sys.stdin)
    sys.path[:] = request["sys_path"]
    try:
        answer = examine(request["path"], request["key"])
    except MemoryError:
        answer = {"wrong": "not a readable HDF5 file: it asks for more than 1 GiB of memory"}
    except Exception as error:
        answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
