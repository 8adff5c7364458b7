"""Activations in place, and their gradients, as :mod:`nicefast.reference` defines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """The activation in place, and the function that turns the gradient of its result, in place,
    into that of its input."""

    apply_: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]
    from_input: bool  # the gradient is made of the activation's input, not of its output


def _relu_backward_(g: Tensor, y: Tensor) -> Tensor:
    """On the CPU, bfloat16 is compared as int16, in a third of the time: both orders agree, since
    y is not negative."""
    if g.is_cpu and g.dtype == torch.bfloat16:
        g, y = g.view(torch.int16), y.view(torch.int16)
    return _aten.threshold_backward.grad_input(g, y, 0, grad_input=g)


_aten = torch.ops.aten
ACTIVATIONS = {
    "relu": Activation(torch.relu_, _relu_backward_, False),
    "leaky_relu": Activation(
        lambda x: _aten.leaky_relu_(x, 0.01),
        lambda g, y: _aten.leaky_relu_backward.grad_input(g, y, 0.01, True, grad_input=g),
        False,
    ),
    "tanh": Activation(
        torch.tanh_, lambda g, y: _aten.tanh_backward.grad_input(g, y, grad_input=g), False
    ),
    "gelu": Activation(
        _aten.gelu_, lambda g, x: _aten.gelu_backward.grad_input(g, x, grad_input=g), True
    ),
    "silu": Activation(
        _aten.silu_, lambda g, x: _aten.silu_backward.grad_input(g, x, grad_input=g), True
    ),
    "elu": Activation(
        _aten.elu_,
        # from its input: exp(x) made of exp(x) - 1 has lost its digits where units are saturated
        lambda g, x: _aten.elu_backward.grad_input(g, 1.0, 1.0, 1.0, False, x, grad_input=g),
        True,
    ),
}
