"""Whole stacks of couplings, fast: everything about the speed of a flow is in here.

stack.py        the couplings as plain tensors, read from the modules at each call
plan.py         which engine a call takes, and why; thresholds.py, the numbers that decide
rows.py         the row engine: blocks of rows through products; backward.py, its gradient
kernel.py       one kernel launch (GPU, narrow);  gemm.py, cuBLAS's products (GPU, wide)
exact.py        flows on a grid, whose inverse has no rounding error
linear.py       the products, and which library computes them
autograd.py     the engine as one differentiable function
frozen.py       an immutable copy of a flow for inference
explanation.py  what NICE.explain says
"""

from .autograd import couple, log_prob, transform
from .plan import Flow, Plan, plan

__all__ = ["Flow", "Plan", "couple", "log_prob", "plan", "transform"]
