"""Tensors and plain values in one safetensors file, whole or not at all; none of it can run.

A digest of all of it lies among the plain values: a file in which a bit has changed is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from .files import written

WITHOUT_DIGEST = "0.1.0"  # the version whose files have none
_OS_ERROR = re.compile(r"os error (\d+)")


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    form: str,
    metadata: Mapping[str, str],
) -> None:
    """Write ``path`` beside its destination and rename it when complete.

    ``form`` names what the file holds, for :func:`read` to insist on. ImportError where
    safetensors is not installed; OSError, which names ``path``, where it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder + "/file", {"a": torch.ones(2)}, "mine/1", {"about": "ones"})
    ...     tensors, metadata = read(folder + "/file", "mine/1", "file of mine")
    >>> tensors["a"], metadata["about"]
    (tensor([1., 1.]), 'ones')
    """
    from_torch, (_, error) = _safetensors()
    kept = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    about = {"format": form, "nicefast_version": __version__, **metadata}
    about["digest"] = digest(kept, about)
    with written(path) as partial:
        try:
            from_torch.save_file(kept, partial, metadata=about)
        except error as problem:
            found = _OS_ERROR.search(str(problem))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from None


def read(
    path: str | os.PathLike[str],
    form: str,
    kind: str,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on ``device`` (default: the CPU), and metadata of what :func:`write` wrote.

    ``verify``: the digest is computed again and compared; False saves that time for huge files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, damaged, or no ``kind``: of another form than ``form``.
        ImportError: safetensors is not installed.
    """
    from_torch, (open_file, error) = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with open_file(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != form:
            raise ValueError(
                f"{path} is no {kind}: its metadata give the format as "
                f"{metadata.get('format')!r}, expected {form!r}"
            )
        tensors = from_torch.load_file(path, device="cpu")
    except error as problem:
        raise ValueError(f"{path} is truncated or no safetensors file: {problem}") from None
    if "digest" not in metadata:
        if metadata.get("nicefast_version") != WITHOUT_DIGEST:
            raise ValueError(
                f"{path} is damaged: its metadata have no 'digest', as every {kind} of a version "
                f"after {WITHOUT_DIGEST} has"
            )
    elif verify and digest(tensors, metadata) != metadata["digest"]:
        raise ValueError(f"{path} is damaged: its content is not what its digest says")
    if device is not None:
        tensors = {k: t.to(device) for k, t in tensors.items()}
    return tensors, metadata


def plain(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The JSON object in the metadata under ``key``; ValueError where there is none.

    >>> plain({"about": '{"step": 3}'}, "about")
    {'step': 3}
    """
    if key not in metadata:
        raise ValueError(f"its metadata have no {key!r}")
    try:
        found = json.loads(metadata[key])
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{key!r} is no JSON ({problem})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{key!r} is no JSON object")
    return found


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and values of all tensors, and over the metadata but for
    the digest itself."""
    found = hashlib.sha256()
    for key in sorted(metadata):
        if key != "digest":
            found.update(repr((key, metadata[key])).encode())
    for key in sorted(tensors):
        t = tensors[key]
        found.update(repr((key, str(t.dtype), tuple(t.shape))).encode())
        values: Any = t.contiguous().view(-1).view(torch.uint8).numpy()
        found.update(values)
    return found.hexdigest()


def _safetensors() -> tuple[Any, tuple[Any, type[Exception]]]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "saving and loading need safetensors: pip install 'nicefast[train]'"
        ) from None
    return safetensors.torch, (safetensors.safe_open, safetensors.SafetensorError)
