"""The precision of float32 matrix products, by whichever of PyTorch's settings it is in force.

``torch.set_float32_matmul_precision`` speaks of all devices; ``torch.backends.cuda.matmul`` and
``torch.backends.mkldnn.matmul`` each have their own ``fp32_precision``, and where those have been
set one by one, ``torch.get_float32_matmul_precision`` raises an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_mkldnn: Any = torch.backends.mkldnn  # whose attributes are not declared
LEVELS = {"tf32": "high", "bf16": "medium"}  # of a backend's own setting; otherwise "highest"
MATMUL = {"float32": "highest", "tf32": "high", "bf16": "highest"}  # bf16 is autocast's


def at_least_float32(*dtypes: torch.dtype) -> torch.dtype:
    """The widest of ``dtypes`` and float32: where a log-density is computed."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def matmul_precision(device: torch.device) -> str:
    """``"highest"``, ``"high"`` or ``"medium"``, as ``torch.get_float32_matmul_precision`` says it.

    >>> import torch
    >>> from nicefast.runtime.precision import matmul_precision
    >>> matmul_precision(torch.device("cpu"))
    'highest'
    """
    level = _of_all_devices()
    if level == "highest":
        return level
    backend = torch.backends.cuda if device.type == "cuda" else _mkldnn
    own = backend.matmul.fp32_precision
    if level is None or own == "ieee":
        return LEVELS.get(own, "highest")
    return level


@contextmanager
def at_matmul_precision(level: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision(level)`` within the block, and what was before after."""
    backends: list[Any] = [torch.backends.cuda.matmul, _mkldnn.matmul]
    before, own = _of_all_devices(), [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before or "highest")
        for backend, precision in zip(backends, own, strict=True):
            if precision not in ("none", backend.fp32_precision):
                backend.fp32_precision = precision


@contextmanager
def at_precision(name: str, device: torch.device) -> Iterator[None]:
    """Matrix products in float32, tf32 or bf16 (operands; sums stay float32) within the block.

    >>> with at_precision("tf32", torch.device("cpu")):
    ...     torch.get_float32_matmul_precision()
    'high'
    """
    if name not in MATMUL:
        raise ValueError(f"precision must be one of {', '.join(MATMUL)}, got {name!r}")
    # without a cache: autocast would use the weights of the first step until the block ends
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=name == "bf16", cache_enabled=False
    )
    with at_matmul_precision(MATMUL[name]), autocast:
        yield


def _of_all_devices() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
