"""What is in force around a call: autograd, torch.func, dual numbers, dispatch modes, tracers,
compilers.

A fast way has to give what these would see, or leave the call to a way that does. Most of PyTorch's
answers are private functions, which only this module calls.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# of make_fx(pre_dispatch=True), say; not in every build
_modes_before_dispatch = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", int)
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
# bound once: is_watched is asked where each microsecond shows
_functorch_stack = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack
_forward_ad = torch.autograd.forward_ad


def is_watched() -> bool:
    """Whether anything of what this module looks for, but autograd, may be at work. A quick answer
    for most calls; the other functions say what it is."""
    return bool(
        torch.compiler.is_compiling()
        or _modes()
        or _functorch_stack() is not None
        or _tracing_state() is not None
        or _forward_ad._current_level >= 0
        or _modes_before_dispatch()
    )


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records what happens to any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_compiled() -> bool:
    """Whether torch.compile reads this code. It can read no other function of this module."""
    return torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether a transformation of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_tangents() -> bool:
    """Whether this is forward-mode differentiation, of any order: the definition's own operations
    know it, and what they cost more is little beside the tangents."""
    return not is_compiled() and torch.autograd.forward_ad._current_level >= 0


def wants_definition() -> bool:
    """Whether the definition's own operations are wanted: for such derivatives, and in a program
    that is exported, whose gradient PyTorch itself has to know."""
    return is_exported() or has_tangents()


def is_exported() -> bool:
    """Whether torch.export reads this. (So should is_exporting() say, which with PyTorch 2.11 is
    true in all that torch.compile reads.)"""
    return torch.compiler._is_exporting_flag


def is_traced() -> bool:
    """Whether a tracer writes down every operation."""
    return torch._C._get_tracing_state() is not None or bool(_modes_before_dispatch())


def has_modes() -> bool:
    """Whether a dispatch mode sees every operation of this thread, and of no other."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_fake() -> bool:
    """Whether a mode gives every tensor a shape and no numbers."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def has_values(t: Tensor) -> bool:
    """Whether ``t``'s numbers can be looked at."""
    return not (
        is_compiled()
        or is_fake()
        or type(t) is FakeTensor
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def is_batched(t: Tensor) -> bool:
    """Whether ``t`` stands for several, as it does with ``is_grads_batched`` or in a vmap."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(t) or functorch.is_batchedtensor(t)


def keeps_graph() -> bool:
    """Whether the running backward pass was asked to keep its graph; True where PyTorch cannot
    say."""
    return _keeps_graph is None or _keeps_graph()
