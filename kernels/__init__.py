"""nicefast's Triton kernels: one file per family of operations.

    coupling.py     additive coupling: out of place, in place; the selection, its transpose
    likelihood.py   scaling + prior + log-determinant + row sum, and its gradient
    sampling.py     counter-based noise of the prior with the inverse scaling, and its gradient
    dequantise.py   uniform dequantisation: integers and noise in, float32 out
    sides.py        around a wide flow's products: rows to the partition's sides, biases, and back
    flow.py         a whole flow in one launch: log-density, forward, inverse, sample
    flow_rows.py    a tile of rows through all couplings, on the chip, for flow.py
    flow_resident.py  for flow.py, too: the same with all weights on the chip, where they fit
    flow_tile.py    which flows they serve; packing.py, their parameters as they read them
    product.py      matrix products; activation.py, the conditioners' activations; prior.py, the
                    priors' formulas: for those above
    tile.py         which tile a shape and dtype get; launch.py, what surrounds a launch

Nothing here validates: ``nicefast`` does. ``nicefast.ops`` calls the launchers of single
operations, ``nicefast.engine`` those of whole flows.
"""

import triton

from .coupling import couple, couple_, select
from .dequantise import dequantise_fwd
from .flow import flow_fwd, flow_inv, flow_sample
from .flow_tile import FlowShape, FlowTile, ResidentTile, Side, flow_tile, tiles_of
from .launch import why_no_launch
from .likelihood import scale_log_prob_bwd, scale_log_prob_fwd
from .packing import lay_out, pack
from .sampling import sample_bwd, sample_fwd
from .sides import add_, enter, leave

#: True where the kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

__all__ = [
    "INTERPRETED",
    "FlowShape",
    "FlowTile",
    "ResidentTile",
    "Side",
    "add_",
    "couple",
    "couple_",
    "dequantise_fwd",
    "enter",
    "flow_fwd",
    "flow_inv",
    "flow_sample",
    "flow_tile",
    "lay_out",
    "leave",
    "pack",
    "sample_bwd",
    "sample_fwd",
    "scale_log_prob_bwd",
    "scale_log_prob_fwd",
    "select",
    "tiles_of",
    "why_no_launch",
]
