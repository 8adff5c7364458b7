"""What an interrupted job goes on from: tensors and plain values in one safetensors file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    from safetensors.torch import save_file

    flat = {
        f"{group}.{name}": value.detach().cpu().contiguous().clone()
        for group, members in tensors.items()
        for name, value in members.items()
    }
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        save_file(flat, partial, {"format": FORMAT, "about": json.dumps(about)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_snapshot(
    path: Path, device: torch.device
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What :func:`write_snapshot` wrote; ValueError for a missing or damaged file."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"there is nothing to resume from: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no snapshot of a fit")
        flat = load_file(path, device=str(device))
        about = json.loads(metadata["about"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as problem:
        raise ValueError(f"{path} is damaged: {problem}") from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        group, name = key.split(".", 1)
        tensors.setdefault(group, {})[name] = value
    return tensors, about
