"""What every launcher does around a launch."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# a product and a sum in one instruction, which from Triton 3.10 on is no longer what happens unsaid
FUSED = {"enable_fp_fusion": True}


def why_no_launch() -> str | None:
    """The reason why nothing compiled could be launched here; None where it could.

    Triton compiles what launches kernels, too: for that it needs a C compiler and Python's headers.
    """
    try:
        _ = triton.runtime.driver.active
    except Exception as error:  # whatever a compiler may raise
        return f"Triton cannot launch kernels here ({type(error).__name__}: {error})"
    return None


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
