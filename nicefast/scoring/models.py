"""The density that scores: where it comes from, what identifies it, how it is held meanwhile."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..evaluation import Density
from ..io.checkpoint import load
from ..preprocessing import Preprocessing
from ..runtime.devices import device_of, dtype_of, usable_device

BUDGET = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes of a batch's tensors
MOST_ROWS = 1 << 16


def resolve(
    model: Any, preprocessing: Any, device: torch.device | str | None
) -> tuple[Density, Preprocessing | None]:
    """Model and preprocessing from objects or paths, the model on ``device`` (default: its own).

    A run folder brings its preprocessing along, unless another is given. A model that is moved is
    a copy.

    Raises:
        TypeError: a model without ``log_prob``, or a preprocessing that is none.
        ValueError: no run folder, a damaged file, a flow with a context, an unusable device.
    """
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        if path.is_dir():
            if not (path / "model.safetensors").is_file():
                raise ValueError(f"model {path} is no run folder: it has no model.safetensors")
            beside = path / "preprocessing.safetensors"
            if preprocessing is None and beside.is_file():
                preprocessing = beside
            path = path / "model.safetensors"
        elif not path.is_file():
            raise ValueError(f"model {path}: no such file or run folder")
        model = load(path)
    if not callable(getattr(model, "log_prob", None)):
        raise TypeError(f"model must have log_prob or be a path, got {type(model).__name__}")
    if isinstance(preprocessing, str | os.PathLike):
        preprocessing = Preprocessing.load(preprocessing)
    if not isinstance(preprocessing, Preprocessing | None):
        raise TypeError(
            f"preprocessing must be a Preprocessing or a path, got {type(preprocessing).__name__}"
        )
    if getattr(model, "context", 0):
        raise ValueError("model takes a context, and the rows of a table have none")
    if device is not None:
        wanted = usable_device(device)
        if isinstance(model, nn.Module) and device_of(model) != wanted:
            model = copy.deepcopy(model).to(wanted)
    return model, preprocessing


def event_shape(model: Density) -> tuple[int, ...] | None:
    """Of one row, where the model says it."""
    shape = getattr(model, "event_shape", None)
    return None if shape is None else tuple(shape)


@contextmanager
def evaluating(model: Density) -> Iterator[None]:
    """The model in evaluation mode, no gradient for its parameters; as before afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def default_batch(model: Density, features: int, gradient: bool) -> int:
    """Rows to compute together: a power of two, from 1 to 65536.

    As many as fit into an eighth of the free memory, and into 256 MiB on the CPU, 2 GiB on a GPU:
    8 numbers for each feature and 4 for each unit of the widest hidden layer; with the gradient
    with respect to x, 2 for each unit of all layers.

    >>> import nicefast as nf
    >>> default_batch(nf.NICE(64, hidden=(256,) * 3), 64, gradient=False)
    32768
    """
    hidden = getattr(model, "configuration", {}).get("hidden", [features])
    layers = [w for own in hidden for w in (own if isinstance(own, list) else [own])]
    numbers = 8 * features + 4 * max(layers, default=features)
    if gradient:
        count = len(getattr(model, "couplings", [0]))
        each = sum(layers) * (1 if isinstance(hidden[0] if hidden else 0, list) else count)
        numbers += 2 * (each + count * features)
    device = device_of(model)
    budget = min(BUDGET.get(device.type, BUDGET["cpu"]), free_memory(device) // 8)
    size = 4 if dtype_of(model) == torch.float32 else 8
    rows = max(1, min(MOST_ROWS, budget // (numbers * size)))
    return 1 << (rows.bit_length() - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that may be taken; 1 GiB where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            found = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
        return int(found[0]) << 10
    except (OSError, IndexError, ValueError):
        return 1 << 30


def where(device: torch.device) -> str:
    """What the last bits of a result depend on beside the inputs: processor and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu, {capability}, {torch.get_num_threads()} threads"
    return device.type


def digest(thing: Any) -> str | None:
    """SHA-256 over a model's or preprocessing's kind, configuration and parameters.

    None for objects that hold what nobody can compare, such as functions.

    >>> import nicefast as nf
    >>> model = nf.NICE(4, hidden=(8,))
    >>> before = digest(model)
    >>> _ = model.scaling.log_scale.data.add_(1)
    >>> digest(model) == before
    False
    """
    found = hashlib.sha256()
    try:
        _feed(found, thing)
    except TypeError:
        return None
    return found.hexdigest()


def _feed(found: Any, thing: Any) -> None:
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    found.update(kind.encode())
    if isinstance(thing, nn.Module):
        configuration = getattr(thing, "configuration", None)
        found.update((repr(thing) if configuration is None else json.dumps(configuration)).encode())
        _feed(found, dict(thing.state_dict()))
    elif isinstance(thing, Preprocessing):
        found.update(json.dumps(thing.configuration).encode())
        _feed(found, thing.tensors)
    elif isinstance(thing, Tensor):
        values = thing.detach().cpu().contiguous()
        found.update(f"{values.dtype} {tuple(values.shape)}".encode())
        found.update(values.view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(thing, np.ndarray) and thing.dtype != object:
        found.update(f"{thing.dtype} {thing.shape}".encode())
        found.update(np.ascontiguousarray(thing).tobytes())
    elif isinstance(thing, str | int | float | bool | None):
        found.update(repr(thing).encode())
    elif isinstance(thing, dict):
        for key in sorted(thing):
            _feed(found, key)
            _feed(found, thing[key])
    elif isinstance(thing, list | tuple):
        for each in thing:
            _feed(found, each)
    elif hasattr(thing, "__dict__") and not callable(thing):
        _feed(found, vars(thing))
    else:
        raise TypeError(kind)
