"""Saving a flow to one safetensors file, and loading it: nothing that is loaded can run code."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .flow import NICE
from .layers import AdditiveCoupling
from .partition import Partition

FORMAT = "nicefast.NICE/1"


def save(model: NICE, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``path``: parameters with their dtype, configuration, library version.

    The file is written beside its destination and renamed when complete.

    Raises:
        TypeError: ``model`` is no :class:`nicefast.NICE`.
        ValueError: its layers are not those of its configuration (a conditioner was replaced by
            one of another structure), so that the file could not be loaded.
        ImportError: safetensors is not installed.

    >>> import tempfile, nicefast as nf
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nf.save(nf.NICE(4, hidden=(8,)), folder + "/flow.safetensors")
    ...     nf.load(folder + "/flow.safetensors").features
    4
    """
    from_torch, _ = _safetensors()
    if not isinstance(model, NICE):
        raise TypeError(f"model must be a nicefast.NICE, got {type(model).__name__}")
    if _structure(model) != _structure(_build(model.configuration)):
        raise ValueError(
            "model cannot be saved: its layers are not those of its configuration "
            "(was a conditioner replaced?); save its state_dict() instead"
        )
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "nicefast_version": __version__,
        "dtype": str(model.scaling.log_scale.dtype).removeprefix("torch."),
        "configuration": json.dumps(model.configuration),
    }
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        from_torch.save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> NICE:
    """The flow in ``path``, set to evaluate, in its saved dtype, on ``device`` (default: the CPU).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, damaged, or not written by :func:`save`.
        ImportError: safetensors is not installed.

    See :func:`save` for an example.
    """
    from_torch, (open_file, error) = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with open_file(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no nicefast flow: its metadata give the format as "
                f"{metadata.get('format')!r}, expected {FORMAT!r}"
            )
        tensors = from_torch.load_file(path, device=str(device or "cpu"))
    except error as problem:
        raise ValueError(f"{path} is truncated or no safetensors file: {problem}") from None
    try:
        model = _build(json.loads(metadata["configuration"]))
        wrong = [k for k, v in tensors.items() if not v.dtype.is_floating_point]
        if wrong:
            raise ValueError(f"{wrong[0]} is not floating point")
        model.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise ValueError(f"{path} does not fit its own configuration: {problem}") from None
    if not model.scaling.log_scale.isfinite().all():
        raise ValueError(f"{path} holds a log_scale that is not finite")
    return model.eval()


def _build(configuration: dict[str, Any]) -> NICE:
    """The flow of a configuration, without memory for its parameters."""
    configuration = dict(configuration)
    features = configuration.pop("features")
    partition = configuration.pop("partition")
    if not isinstance(partition, str):
        partition = [Partition.from_mask(torch.tensor(m, dtype=torch.bool)) for m in partition]
    with torch.device("meta"):
        return NICE(features, partition=partition, **configuration)


def _structure(model: NICE) -> list[Any]:
    modules: list[Any] = [(name, type(m), m.extra_repr()) for name, m in model.named_modules()]
    modules = [m for m in modules if m[1] is not AdditiveCoupling]  # shows a partition's name
    modules += [c.partition for c in model.couplings]
    return modules + [(name, p.shape) for name, p in model.state_dict().items()]


def _safetensors() -> tuple[Any, tuple[Any, type[Exception]]]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "saving and loading need safetensors: pip install 'nicefast[train]'"
        ) from None
    return safetensors.torch, (safetensors.safe_open, safetensors.SafetensorError)
