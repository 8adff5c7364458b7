"""Saving a flow to one safetensors file, and loading it: nothing that is loaded can run code."""

from __future__ import annotations

import json
import math
import os
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_path, check_type
from ..fingerprint import KEY
from ..flow import NICE
from ..layers import AdditiveCoupling
from ..partition import Partition
from . import tensorfile

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
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model is on the meta device: its parameters have no values to save")
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
        said = textwrap.shorten(str(problem), 300)
        raise ValueError(f"{path} does not fit its own configuration: {said}") from None
    if not model.scaling.log_scale.isfinite().all():
        raise ValueError(f"{path} holds a log_scale that is not finite")
    return model.eval()


def _from_parts(tensors: dict[str, Tensor], metadata: dict[str, str]) -> NICE:
    configuration = tensorfile.plain(metadata, "configuration")
    _check_size(configuration, tensors)
    model = _build(configuration)
    wrong = [k for k, v in tensors.items() if not (v.dtype.is_floating_point or k.endswith(KEY))]
    if wrong:
        raise ValueError(f"{wrong[0]} is not floating point")
    model.load_state_dict(tensors, assign=True)
    ties = json.loads(metadata.get("ties", "[]"))
    _tie(model, ties)
    _check_ties(model, tensors, ties)
    return model


def _check_size(configuration: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """ValueError where a configuration asks for more than the tensors hold, before it is built: a
    small file must not make a large flow."""
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
    """Make one of what :func:`_ties` found to be one. ValueError for names that are none of modules
    of the same structure, or of parameters of the same shape."""
    if not isinstance(groups, list) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in groups
    ):
        raise ValueError(f"ties are no lists of names: {groups!r}")
    if len({name for names in groups for name in names}) != sum(map(len, groups)):
        raise ValueError(f"ties have a name twice: {groups!r}")
    known = _shared_kinds(model) if groups else {}
    for names in groups:
        for other in names[1:]:
            if known.get(other) is None or known.get(names[0]) != known[other]:
                raise ValueError(f"{other!r} cannot be the same as {names[0]!r}")
            owner, _, name = other.rpartition(".")
            first_owner, _, first_name = names[0].rpartition(".")
            shared = getattr(model.get_submodule(first_owner), first_name)
            setattr(model.get_submodule(owner), name, shared)


def _shared_kinds(model: NICE) -> dict[str, Any]:
    """What two modules or parameters must agree on to be the same, by their names."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = _structure(module) if name else None
    for name, p in model.named_parameters(remove_duplicate=False):
        found[name] = p.shape
    return found


def _check_ties(model: NICE, tensors: dict[str, Tensor], groups: list[list[str]]) -> None:
    """ValueError where what is one was not saved with the same values."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for first, *others in groups:
        inside = [f".{key}" for key in modules[first].state_dict()] if first in modules else [""]
        for other in others:
            for key in inside:
                if not _is_same(tensors[first + key], tensors[other + key]):
                    raise ValueError(f"{other} and {first} are the same, but have other values")


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are: NaN is the same as NaN."""
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)


def _build(configuration: dict[str, Any]) -> NICE:
    """The flow of a configuration, without memory for its parameters."""
    configuration = dict(configuration)
    features = configuration.pop("features")
    partition = configuration.pop("partition")
    if not isinstance(partition, str):
        partition = [
            Partition.from_mask(torch.tensor(m, dtype=torch.bool, device="cpu")) for m in partition
        ]
    with torch.device("meta"):
        return NICE(features, partition=partition, **configuration)


def _structure(module: nn.Module) -> list[Any]:
    """Modules, partitions and parameters inside by their names; the order in which a module holds
    them does not count."""
    modules: list[Any] = []
    for name, m in module.named_modules(remove_duplicate=False):
        # a coupling shows its partition's name, and equal ones may have different names
        shown = m.described() if isinstance(m, AdditiveCoupling) else m.extra_repr()
        modules.append((name, type(m), shown))
    shapes = [(name, p.shape) for name, p in sorted(module.state_dict().items())]
    return [*sorted(modules, key=lambda m: m[0]), *shapes]
