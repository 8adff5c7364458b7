"""Where a model is, what rows are given to it in, and which devices can be used here."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import nn

from .precision import at_least_float32


def device_of(model: object) -> torch.device:
    """Where a module's parameters are; the CPU for what has none, such as a baseline.

    >>> device_of(nn.Linear(1, 1))
    device(type='cpu')
    """
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


def dtype_of(model: object) -> torch.dtype:
    """What rows are given to the model in: its parameters' dtype, float32 at least.

    >>> dtype_of(nn.Linear(1, 1, dtype=torch.bfloat16)), dtype_of(nn.Linear(1, 1).double())
    (torch.float32, torch.float64)
    """
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return at_least_float32(parameter.dtype)
    return torch.float32


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name; ValueError where it cannot be used here.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used here: {reason}") from None


@cache
def is_amd() -> bool:
    """Whether this is a processor of AMD's, told by SSE4a, on which Intel's MKL is slower. False
    where PyTorch cannot list the processor's instructions.

    >>> is_amd() in (True, False)
    True
    """
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("sse4a"))


@cache
def processor() -> str:
    """What the processor calls itself, by which two machines' results may differ in their bits.

    >>> processor().startswith(platform.machine())
    True
    """
    said = ("model name", "cpu model", "CPU implementer", "CPU part")
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.split(":", 1) for line in file if line.startswith(said)]
        names = list(dict.fromkeys(value.strip() for _, value in lines))
    except (OSError, ValueError):
        names = [platform.processor()]
    return " ".join([platform.machine(), *names])
