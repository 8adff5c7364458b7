"""Saving a flow to one safetensors file, and loading it: nothing that is loaded can run code."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import torch

from . import tensorfile
from .checks import check_path, check_type
from .fingerprint import KEY
from .flow import NICE
from .layers import AdditiveCoupling
from .partition import Partition

FORMAT = "nicefast.NICE/1"


def save(model: NICE, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``path``: parameters with their dtype, configuration, library version.

    The file is written beside its destination and renamed when complete. Modules and parameters
    that couplings share are shared again when it is loaded.

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
    ties = _ties(model)
    rebuilt = _build(model.configuration)
    _tie(rebuilt, ties)
    if _structure(model) != _structure(rebuilt):
        raise ValueError(
            "model cannot be saved: its layers are not those of its configuration "
            "(was a conditioner replaced?); save its state_dict() instead"
        )
    metadata = {
        "dtype": str(model.scaling.log_scale.dtype).removeprefix("torch."),
        "configuration": json.dumps(model.configuration),
    }
    if ties:
        metadata["ties"] = json.dumps(ties)
    tensorfile.write(path, model.state_dict(), FORMAT, metadata)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    verify: bool = True,
) -> NICE:
    """The flow in ``path``, set to evaluate, in its saved dtype, on ``device`` (default: the CPU).

    ``verify``: the digest of the file's content is computed again and compared, so that a changed
    bit is noticed; False saves that time for huge files (about a second for a gigabyte).

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
    tensors, metadata = tensorfile.read(path, FORMAT, "nicefast flow", device, verify)
    try:
        model = _from_parts(tensors, metadata)
    except KeyError as problem:
        raise ValueError(f"{path} does not fit its own configuration: no {problem}") from None
    except (TypeError, ValueError, RuntimeError) as problem:
        said = " ".join(str(problem).split())
        raise ValueError(f"{path} does not fit its own configuration: {said}") from None
    if not model.scaling.log_scale.isfinite().all():
        raise ValueError(f"{path} holds a log_scale that is not finite")
    return model.eval()


def _from_parts(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> NICE:
    configuration = json.loads(metadata["configuration"])
    _check_size(configuration, tensors)
    model = _build(configuration)
    wrong = [k for k, v in tensors.items() if not (v.dtype.is_floating_point or k.endswith(KEY))]
    if wrong:
        raise ValueError(f"{wrong[0]} is not floating point")
    model.load_state_dict(tensors, assign=True)
    _tie(model, json.loads(metadata.get("ties", "[]")))
    return model


def _check_size(configuration: Any, tensors: dict[str, torch.Tensor]) -> None:
    """ValueError where a configuration asks for more than the tensors hold, before it is built: a
    small file must not make a large flow."""
    if not isinstance(configuration, dict):
        raise ValueError("the configuration is no JSON object")
    features, hidden = configuration["features"], configuration["hidden"]
    partition, context = configuration["partition"], configuration.get("context", 0)
    log_scale = tensors["scaling.log_scale"]
    layers = [key for key in tensors if key.endswith(".weight")]
    couplings = len({key.split(".")[1] for key in layers if key.startswith("couplings.")})
    for name, value in (("features", features), ("hidden", hidden)):
        if not isinstance(value, list):
            raise ValueError(f"{name} is {value!r}, expected a list")
    if len(features) > 32 or math.prod(map(_size, features)) != log_scale.numel():
        raise ValueError(f"features are {features}, for a log_scale of {log_scale.numel()}")
    if configuration["couplings"] != couplings:
        raise ValueError(f"{configuration['couplings']} couplings, but tensors of {couplings}")
    each = hidden if hidden and isinstance(hidden[0], list) else [hidden] * couplings
    if sum(len(own) + 1 for own in each) != len(layers):
        raise ValueError(f"hidden is {hidden}, for {len(layers)} layers in all")
    widest = max([t.shape[-1] for t in tensors.values() if t.ndim], default=0)
    if max([_size(context), *(_size(width) for own in each for width in own)]) > widest:
        raise ValueError(f"hidden {hidden} or context {context}, but no tensor is wider {widest}")
    if isinstance(partition, list) and len(partition) != couplings:
        raise ValueError(f"partitions of {len(partition)} couplings, but tensors of {couplings}")


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _ties(model: NICE) -> list[list[str]]:
    """Names of modules, and of parameters outside of those, that are one and the same, in groups;
    the first of a group is the one that stays."""
    modules: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(id(module), []).append(name)
    groups = [names for names in modules.values() if len(names) > 1]
    repeated = [name for names in groups for name in names[1:]]
    # within a module that is shared as a whole, nothing more has to be said
    groups = [g for g in groups if not any(_is_inside(name, repeated) for name in g[1:])]
    parameters: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if not _is_inside(name, repeated):
            parameters.setdefault(id(p), []).append(name)
    return groups + [names for names in parameters.values() if len(names) > 1]


def _is_inside(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _tie(model: NICE, groups: Any) -> None:
    """Make one of what :func:`_ties` found to be one."""
    for first, *others in groups:
        owner, _, name = first.rpartition(".")
        shared = getattr(model.get_submodule(owner), name)
        for other in others:
            owner, _, name = other.rpartition(".")
            holder = model.get_submodule(owner)
            if type(getattr(holder, name)) is not type(shared):
                raise ValueError(f"{other} cannot be the same as {first}")
            setattr(holder, name, shared)


def _build(configuration: dict[str, Any]) -> NICE:
    """The flow of a configuration, without memory for its parameters."""
    configuration = dict(configuration)
    features = configuration.pop("features")
    partition = configuration.pop("partition")
    if not isinstance(partition, str):
        masks = (torch.tensor(m, dtype=torch.bool, device="cpu") for m in partition)
        partition = [Partition.from_mask(mask) for mask in masks]
    with torch.device("meta"):
        return NICE(features, partition=partition, **configuration)


def _structure(model: NICE) -> list[Any]:
    """Modules and parameters by their names; the order in which a module holds them does not
    count."""
    modules: list[Any] = [
        (name, type(m), m.extra_repr())
        for name, m in model.named_modules(remove_duplicate=False)
        if type(m) is not AdditiveCoupling  # which shows a partition's name
    ]
    shapes = [(name, p.shape) for name, p in sorted(model.state_dict().items())]
    return [*sorted(modules, key=lambda m: m[0]), *(c.partition for c in model.couplings), *shapes]
