"""What an interrupted job goes on from: tensors and plain values in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io import tensorfile

FORMAT = "nicefast.snapshot/1"


def write_snapshot(
    path: Path, tensors: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]
) -> None:
    """Replace the file at ``path`` in one go: an interruption leaves the old one or the new.

    Args:
        tensors: groups of named tensors; a group's name has no dot.
        about: plain values, stored as JSON.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "snapshot")
    ...     write_snapshot(path, {"a": {"x.y": torch.ones(2)}}, {"step": 3})
    ...     read_snapshot(path, torch.device("cpu"))
    ({'a': {'x.y': tensor([1., 1.])}}, {'step': 3})
    """
    flat = {
        f"{group}.{name}": value
        for group, members in tensors.items()
        for name, value in members.items()
    }
    tensorfile.write(path, flat, FORMAT, {"about": json.dumps(about)})


def read_snapshot(
    path: Path, device: torch.device
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What :func:`write_snapshot` wrote; ValueError for a missing or damaged file."""
    try:
        flat, metadata = tensorfile.read(path, FORMAT, "snapshot of a fit", device)
    except FileNotFoundError:
        raise ValueError(f"there is nothing to resume from: no file {path}") from None
    try:
        about = tensorfile.plain(metadata, "about")
    except ValueError as problem:
        raise ValueError(f"{path} is damaged: {problem}") from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        group, _, name = key.partition(".")
        tensors.setdefault(group, {})[name] = value
    return tensors, about
