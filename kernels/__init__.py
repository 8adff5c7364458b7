"""nicefast's Triton kernels: one file per family of operations.

    coupling.py     additive coupling: out of place, in place; the selection, its transpose
    likelihood.py   scaling + prior + log-determinant + row sum, and its gradient
    sampling.py     counter-based noise of the prior with the inverse scaling, and its gradient
    prior.py        the priors' formulas, shared by the two above
    tile.py         which tile a shape and dtype get; launch.py, what surrounds a launch

Nothing here validates: ``nicefast.functional`` does, and ``nicefast.ops`` calls the launchers.
"""

import triton

from .coupling import couple, couple_, select
from .likelihood import scale_log_prob_bwd, scale_log_prob_fwd
from .sampling import sample_bwd, sample_fwd

#: True where the kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

__all__ = [
    "INTERPRETED",
    "couple",
    "couple_",
    "sample_bwd",
    "sample_fwd",
    "scale_log_prob_bwd",
    "scale_log_prob_fwd",
    "select",
]
