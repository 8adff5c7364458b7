"""What is checked of arguments: errors say which one is wrong, what came, what was expected."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .partition import Partition
from .reference import check_prior

LEVELS = (torch.uint8, torch.int16, torch.int32, torch.int64)
LARGEST = 2.0**100  # of a range's ends: their difference is far from overflow


def check_events(name: str, x: Tensor, event_shape: torch.Size, device: torch.device) -> None:
    """Data or latents (..., \\*event_shape) of a flow on ``device``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be floating point, got {x.dtype}: convert it first, "
            f"and dequantise integer levels by adding noise"
        )
    if x.dtype.itemsize < 2:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got layout {x.layout}")
    if tuple(x.shape[x.ndim - len(event_shape) :]) != tuple(event_shape):
        shape = ", ".join(map(str, event_shape))
        raise ValueError(f"{name} must have shape (..., {shape}), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, where the flow is, got {x.device}")


def check_context(context: Tensor | None, features: int, device: torch.device) -> None:
    """A context (..., K) of a flow on ``device`` that takes so many features, or none."""
    if context is None:
        if features:
            raise ValueError(f"context must be given: the flow takes {features} context features")
        return
    if not isinstance(context, Tensor) or not context.dtype.is_floating_point:
        kind = context.dtype if isinstance(context, Tensor) else type(context).__name__
        raise TypeError(f"context must be a floating-point tensor, got {kind}")
    if context.dtype.itemsize < 2:
        raise TypeError(
            f"context must be float16, bfloat16, float32 or float64, got {context.dtype}"
        )
    if context.layout is not torch.strided:
        raise TypeError(f"context must be dense, got layout {context.layout}")
    if context.ndim < 1 or context.shape[-1] != features or not features:
        raise ValueError(
            f"context must have {features} features in its last dimension, "
            f"got shape {tuple(context.shape)}"
            if features
            else f"context was given ({tuple(context.shape)}) to a flow without context"
        )
    if context.device != device:
        raise ValueError(f"context must be on {device}, where the flow is, got {context.device}")


def check_density(h: Tensor, log_scale: Tensor, prior: str) -> None:
    """Rows h (..., D), log_scale (D,), and a prior that is known."""
    check_tensor("h", h)
    check_tensor("log_scale", log_scale)
    check_prior(prior)
    if h.ndim < 1 or log_scale.shape != h.shape[-1:]:
        raise ValueError(
            f"log_scale must have shape ({h.shape[-1] if h.ndim else 'D'},), one value for each "
            f"feature of h, got {tuple(log_scale.shape)} for an h of shape {tuple(h.shape)}"
        )
    if h.shape[-1] < 1:
        raise ValueError(f"h must have at least one feature, got shape {tuple(h.shape)}")
    check_device("log_scale", log_scale, h)


def as_integer(value: Any) -> int | None:
    """The value as Python's own integer (torch's symbolic ones as they are); None for what is no
    integer, as bools and floats.

    >>> as_integer(np.int64(3)), as_integer(True), as_integer(3.0)
    (3, None, None)
    """
    if isinstance(value, torch.SymInt):
        return cast("int", value)
    if isinstance(value, bool | np.bool_ | np.ndarray | Tensor):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_count(name: str, count: Any, least: int = 0) -> int:
    """An integer of 64 bits, Python's or NumPy's, at least ``least``, as Python's own."""
    found = as_integer(count)
    if found is None or found < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {count!r}")
    if isinstance(found, int) and found >= 1 << 63:
        raise ValueError(f"{name} must be below 2^63, got {count}")
    return found


def check_seed(seed: Any) -> int:
    """0 <= seed < 2^63, as Python's own integer."""
    found = as_integer(seed)
    if found is None:
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= found < 1 << 63:
        raise ValueError(f"seed must be at least 0 and below 2^63, got {seed}")
    return found


def is_number(value: object) -> bool:
    """Whether it is a real number, Python's or NumPy's: a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain_number(value: Any) -> float:
    """A real number as Python's own: an integer stays one."""
    found = as_integer(value)
    return float(value) if found is None else found


def check_number(name: str, value: float, finite: bool = True) -> None:
    """A real number, and no NaN; unless ``finite`` is asked for it may be infinite."""
    check_kind_of_number(name, value)
    if math.isnan(value) or (finite and math.isinf(value)):
        raise ValueError(f"{name} must be {'finite' if finite else 'a number'}, got {value}")


def check_kind_of_number(name: str, value: float) -> None:
    """A real number, of any value, and NaN: what is looked at later."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """One of these names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def filled(values: Any) -> Any:
    """A masked array as a plain one, in which what is masked is NaN; anything else as it is.

    Integers and bools become float64 where one of them is masked.

    >>> filled(np.ma.array([1, 2], mask=[False, True])), filled(np.ma.array([1, 2]))
    (array([ 1., nan]), array([1, 2]))
    """
    if not isinstance(values, np.ma.MaskedArray):
        return values
    mask, plain = np.ma.getmaskarray(values), np.ma.getdata(values, subok=False)
    if not mask.any():
        return plain
    if plain.dtype.kind in "fc":
        plain = plain.copy()
    else:
        plain = plain.astype(np.float64 if plain.dtype.kind in "iub" else object)
    plain[mask] = np.nan
    return plain


def check_type(name: str, value: object, kinds: Any, expected: str) -> None:
    """An instance of ``kinds``, which people call ``expected``."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def check_path(name: str, path: object) -> None:
    """What the system takes for a file's name."""
    check_type(name, path, (str, os.PathLike), "a path")


def check_levels(levels: Tensor, k: int | None, low: float, high: float) -> None:
    """Integer levels (N, ...), their number, and the range they are brought to."""
    if not isinstance(levels, Tensor):
        raise TypeError(f"levels must be a torch.Tensor, got {type(levels).__name__}")
    if levels.dtype not in LEVELS:
        raise TypeError(f"levels must be uint8, int16, int32 or int64, got {levels.dtype}")
    if levels.ndim < 2 or levels.shape[1:].numel() < 1:
        raise ValueError(
            f"levels must have shape (N, ...) with at least one feature, got {tuple(levels.shape)}"
        )
    count = None if k is None else as_integer(k)
    if k is not None and (count is None or not 2 <= count <= 1 << 16):
        raise ValueError(f"k must be an integer from 2 to 65536, or None, got {k!r}")
    if k is None and (low, high) != (0.0, 1.0):
        raise ValueError(f"low and high need k, the number of levels; got {low} and {high}")
    size = max(abs(low), abs(high))
    if not (size < LARGEST and high - low > max(size * 2.0**-22, 1 / LARGEST)):
        raise ValueError(
            f"low must be below high, by enough for float32 to tell, got {low} and {high}"
        )


def check_coupling(
    x: Tensor, shift: Tensor, partition: Partition, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x`` (..., D) and the shift (..., S), expanded to it; with a bias (S,) or none."""
    check_features("x", x, partition)
    check_tensor("shift", shift)
    count = partition.locate(x.device).size
    expected = (*x.shape[:-1], count)
    if shift.shape != expected:
        if shift.ndim < 1 or shift.shape[-1] != count or shift.ndim > x.ndim:
            raise _wrong_shift(shift, expected)
        try:
            shift = shift.expand(expected)
        except RuntimeError:
            raise _wrong_shift(shift, expected) from None
    check_device("shift", shift, x)
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != (count,):
            raise ValueError(
                f"bias must have shape ({count},), one value for each shifted feature, "
                f"got {tuple(bias.shape)}"
            )
        check_device("bias", bias, x)
    return x, shift


def _wrong_shift(shift: Tensor, expected: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"shift must have shape {tuple(expected)}, one value for each shifted feature, "
        f"got {tuple(shift.shape)}"
    )


def check_features(name: str, x: Tensor, partition: Partition) -> None:
    """``x`` (..., D) with the features that the partition splits."""
    check_tensor(name, x)
    if not isinstance(partition, Partition):
        raise TypeError(f"partition must be a nicefast.Partition, got {type(partition).__name__}")
    if x.ndim < 1 or x.shape[-1] != partition.features:
        raise ValueError(
            f"{name} must have {partition.features} features in its last dimension, as {partition} "
            f"has, got shape {tuple(x.shape)}"
        )


def check_tensor(name: str, x: Tensor) -> None:
    """A tensor of floating-point numbers of 16 bits or more."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point or x.element_size() < 2:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """Both tensors on one device."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, where x is, got {x.device}")
