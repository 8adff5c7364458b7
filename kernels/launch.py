"""What every launcher does around a launch."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

# a product and a sum in one instruction, which from Triton 3.10 on is no longer what happens unsaid
FUSED = {"enable_fp_fusion": True}
KINDS = 4096  # of launches, remembered at most


@triton.jit
def _probe(p_y):
    tl.store(p_y, 1.0)


def why_no_launch(index: int) -> str | None:
    """The reason why no kernel can be compiled and launched on the GPU; None where one has been.

    Triton compiles what launches kernels, too: for that it needs a C compiler and Python's headers.
    """
    try:
        _ = triton.runtime.driver.active
        y = torch.zeros(1, device=torch.device("cuda", index))
        with on_device(y):
            _probe[(1,)](y)
    except torch.OutOfMemoryError:
        raise  # it says nothing of kernels
    except Exception as error:  # whatever a compiler may raise
        said = (str(error).strip().splitlines() or ["without a message"])[0]
        return f"Triton cannot compile and launch kernels here ({type(error).__name__}: {said})"
    return None


def launch(
    kernel: Any,
    programs: int,
    args: tuple[Any, ...],
    kind: Any,  # hashable
    constants: Any,  # a function that makes them
) -> None:
    """``kernel[(programs,)](*args, **constants())``, by what an earlier one of its kind compiled.

    Triton looks at every argument and option to find what it has compiled for them, which costs
    several times what the rest of a launch does. The caller's ``kind`` says as much in one object:
    on it depend the constants, and all integers but those that are never specialised. What else
    Triton looks at is asked here: dtypes, what is None, that tensors begin at multiples of 16
    bytes, and that integers have 32 bits. Any other launch is Triton's own, and so is every one on
    AMD's GPUs, where the size of a tensor's memory counts, too.
    """
    device, usual, dtypes = None, not torch.version.hip, []
    for a in args:
        if type(a) is int:
            usual &= -(2**31) <= a < 2**31
        elif a is None:
            dtypes.append(None)
        else:
            usual &= not a.data_ptr() % 16
            dtypes.append(a.dtype)
            device = a.get_device() if device is None else device
    key = id(kernel), device, kind, *dtypes  # a kernel is a function of its module, and stays
    found = _compiled.get(key) if usual else None
    if found is not None:
        compiled, rest = found
        compiled[programs, 1, 1](*args, *rest)
        return
    named = constants()
    compiled = kernel[(programs,)](*args, **named)
    if usual and type(compiled) is CompiledKernel:  # nothing is compiled in the interpreter
        if len(_compiled) >= KINDS:
            _compiled.clear()
        _compiled[key] = compiled, tuple(named[n] for n in kernel.arg_names[len(args) :])


_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make ``x``'s GPU current: a thread of the backward pass may stand on another one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def is_dense(x: Tensor) -> bool:
    """Rows follow each other without a gap, so that the row stride is a compile-time constant."""
    return x.stride(1) == 1 and x.stride(0) == x.shape[1]


def dense(v: Tensor | None) -> Tensor | None:
    """A vector as kernels read it: one number after the other."""
    return None if v is None else v.contiguous().resolve_neg()


def accumulator(*tensors: Tensor) -> tl.dtype:
    """float64 where an input is float64, else float32."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def torch_dtype(acc: tl.dtype) -> torch.dtype:
    return torch.float64 if acc == tl.float64 else torch.float32
