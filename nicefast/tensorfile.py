"""Tensors and plain values in one safetensors file, whole or not at all; none of it can run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._version import __version__
from .files import written


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    form: str,
    metadata: Mapping[str, str],
) -> None:
    """Write ``path`` beside its destination and rename it when complete.

    ``form`` names what the file holds, for :func:`read` to insist on. ImportError where
    safetensors is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder + "/file", {"a": torch.ones(2)}, "mine/1", {"about": "ones"})
    ...     tensors, metadata = read(folder + "/file", "mine/1", "file of mine")
    >>> tensors["a"], metadata["about"]
    (tensor([1., 1.]), 'ones')
    """
    from_torch, _ = _safetensors()
    kept = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    about = {"format": form, "nicefast_version": __version__, **metadata}
    with written(path) as partial:
        from_torch.save_file(kept, partial, metadata=about)


def read(
    path: str | os.PathLike[str],
    form: str,
    kind: str,
    device: torch.device | str | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on ``device`` (default: the CPU), and metadata of what :func:`write` wrote.

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
        return from_torch.load_file(path, device=str(device or "cpu")), metadata
    except error as problem:
        raise ValueError(f"{path} is truncated or no safetensors file: {problem}") from None


def _safetensors() -> tuple[Any, tuple[Any, type[Exception]]]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "saving and loading need safetensors: pip install 'nicefast[train]'"
        ) from None
    return safetensors.torch, (safetensors.safe_open, safetensors.SafetensorError)
