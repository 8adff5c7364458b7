"""Whether relu may go in the epilogue of a GPU's product, which makes 0 of NaN.

So it may where the parameters and their products are known to be numbers: a NaN that is given with
a row is still there in its result, which has that feature itself. How large the parameters are is
found out once for each version of them; it has to be waited for.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch

from ..captures import is_capturing
from .chain import Chain
from .versions import Version, versions

LARGEST = 2.0**30  # of the rows that are thought of: larger ones have hardly a density
LIMIT = 2.0**126  # below the largest number there is

_known: WeakKeyDictionary[Chain, tuple[list[Version], bool]] = WeakKeyDictionary()


def keeps_nan(device: torch.device) -> bool:
    """Whether relu of NaN is NaN there in an epilogue, too."""
    return device.type == "cpu"


def gives_numbers(chain: Chain) -> bool:
    """Whether no product of a row without NaN gives NaN; False also where that can't be asked."""
    if chain.context or is_capturing(chain.device):
        return False
    if any(p.is_inference() for p in chain.parameters):  # these count no versions
        return False
    now, known = versions(chain), _known.get(chain)
    if known is None or known[0] != now:
        if versions(chain) != now:  # never known to be what they were
            return False
        known = _known[chain] = now, _is_bounded(chain)
    return known[1]


def _is_bounded(chain: Chain) -> bool:
    """``|W h + b| <= |W| |h| + |b|``, all of them root sums of squares."""
    sizes = torch.stack([torch.linalg.vector_norm(p.detach()) for p in chain.parameters]).tolist()
    each = iter(zip(sizes[::2], sizes[1::2], strict=True))
    total = math.sqrt(chain.features) * LARGEST
    for layers in chain.couplings:
        size = total
        for weight, bias in (next(each) for _ in layers):
            size = weight * size + bias
            if not size < LIMIT:  # nor of NaN
                return False
        total += size
    return total < LIMIT
