"""Which implementation an operation runs on: Triton kernels, PyTorch, or the definition itself.

``"auto"`` takes the kernels on a GPU that can run them and PyTorch everywhere else, by whatever is
fastest there. ``"triton"`` insists on the kernels and says why where they cannot run;
``"reference"`` always takes the definition itself. The choice is process-wide (the backward pass
runs in threads of its own) and is read at each call, also inside compiled graphs.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType, TracebackType

import torch

BACKENDS = ("auto", "triton", "reference")
MIN_CAPABILITY = (8, 0)  # the oldest architecture the kernels are compiled and checked for
ENVIRONMENT = "NICEFAST_BACKEND"
_VARIABLE = os.environ.encodekey(ENVIRONMENT)

_choice: str | None = None  # None: whatever the environment says


class set_backend:  # noqa: N801 - used as a function, and as a context manager
    """Choose the backend: at once, and until the end of the block where used as a context manager.

    Args:
        name: ``"auto"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: unknown name.
        RuntimeError: ``"triton"`` where no kernel can run, with the reason.

    >>> import nicefast as nf
    >>> with nf.set_backend("reference"):
    ...     nf.get_backend()
    'reference'
    """

    def __init__(self, name: str) -> None:
        global _choice
        _check_name(name, "set_backend: name")
        if name == "triton" and (reason := _why_no_kernels_anywhere()):
            raise RuntimeError(f"backend 'triton' cannot run here: {reason}")
        self._previous = _choice
        _choice = name

    def __enter__(self) -> set_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _choice
        _choice = self._previous


def get_backend() -> str:
    """The backend in force: the last :func:`set_backend`, else NICEFAST_BACKEND, else ``"auto"``.

    >>> import nicefast as nf
    >>> nf.get_backend() in ("auto", "triton", "reference")
    True
    """
    if _choice is not None:
        return _choice
    # a variable that is not set costs os.environ two exceptions, which shows in small batches
    variables = getattr(os.environ, "_data", None)
    if variables is not None and _VARIABLE not in variables:
        return "auto"
    name = os.environ.get(ENVIRONMENT) or "auto"
    _check_name(name, ENVIRONMENT)
    return name


def uses_kernels(device: torch.device) -> bool:
    """Whether an operation on ``device`` runs a Triton kernel now.

    Raises RuntimeError, with the reason, where ``"triton"`` was asked for and cannot run.
    """
    name = get_backend()
    if name == "reference":
        return False
    if name == "auto":
        return device.type == "cuda" and why_not_kernels(device) is None
    if reason := why_not_kernels(device):
        raise RuntimeError(f"backend 'triton' cannot run on {device}: {reason}")
    return True


def why_not_kernels(device: torch.device) -> str | None:
    """The reason why kernels cannot run on ``device``; None where they can."""
    interpreted, reason = _interpreted()
    if reason:
        return reason
    if interpreted:
        return None
    if device.type != "cuda":
        return (
            "the kernels need a GPU; set TRITON_INTERPRET=1 before importing nicefast "
            "to run them in Triton's interpreter"
        )
    return _why_not_gpu(device.index or 0)


def interprets(device: torch.device) -> bool:
    """Whether kernels on ``device`` run in Triton's interpreter."""
    return device.type == "cpu" and _interpreted()[0]


def architecture(device: torch.device) -> str:
    """What kernels on ``device`` are compiled for, as ``sm_90`` or ``gfx942``.

    The interpreter takes the tiles of ``sm_90``.
    """
    if device.type != "cuda":
        return "sm_90"
    return _architecture(device.index or 0)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


def describe(device: torch.device) -> str:
    """Which implementation operations on ``device`` run on now, and why, for people to read."""
    if uses_kernels(device):
        return f"Triton kernels on {device}"
    reason = why_not_kernels(device)
    if get_backend() == "reference":
        reason = "backend 'reference' was asked for"
    elif reason is None:
        reason = "backend 'auto' takes kernels on a GPU only"
    return f"plain PyTorch on {device} ({reason})"


def _why_no_kernels_anywhere() -> str | None:
    interpreted, reason = _interpreted()
    if reason or interpreted:
        return reason
    if not torch.cuda.is_available():
        return "no GPU is available, and TRITON_INTERPRET=1 was not set before importing nicefast"
    return None


@functools.cache
def kernels() -> ModuleType:
    """:mod:`nicefast.kernels`, imported when first needed: it needs Triton."""
    return importlib.import_module("nicefast.kernels")


@functools.cache
def _interpreted() -> tuple[bool, str | None]:
    """(kernels are interpreted, why they cannot be imported)."""
    try:
        return kernels().INTERPRETED, None
    except ImportError as error:
        return False, f"Triton cannot be imported ({error})"


@functools.cache
def _why_not_gpu(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return (
            f"compute capability {capability[0]}.{capability[1]} is older than "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, the oldest the kernels are checked for"
        )
    reason: str | None = kernels().why_no_launch(index)
    return reason


def _check_name(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, got {name!r}")
