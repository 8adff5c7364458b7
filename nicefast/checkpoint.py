"""Saving a flow to one safetensors file, and loading it: nothing that is loaded can run code."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from . import tensorfile
from .checks import check_path, check_type
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
    if not isinstance(model, NICE):
        raise TypeError(f"model must be a nicefast.NICE, got {type(model).__name__}")
    check_path("path", path)
    if _structure(model) != _structure(_build(model.configuration)):
        raise ValueError(
            "model cannot be saved: its layers are not those of its configuration "
            "(was a conditioner replaced?); save its state_dict() instead"
        )
    metadata = {
        "dtype": str(model.scaling.log_scale.dtype).removeprefix("torch."),
        "configuration": json.dumps(model.configuration),
    }
    tensorfile.write(path, model.state_dict(), FORMAT, metadata)


def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> NICE:
    """The flow in ``path``, set to evaluate, in its saved dtype, on ``device`` (default: the CPU).

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``path`` is no path, or ``device`` no device.
        ValueError: an unknown device; a file that is truncated, damaged, or not written by
            :func:`save`.
        ImportError: safetensors is not installed.

    See :func:`save` for an example.
    """
    check_path("path", path)
    if device is not None:
        check_type("device", device, (str, torch.device), "a device or its name")
        try:
            torch.device(device)
        except RuntimeError:
            raise ValueError(f"device must be a device or its name, got {device!r}") from None
    tensors, metadata = tensorfile.read(path, FORMAT, "nicefast flow", device)
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
