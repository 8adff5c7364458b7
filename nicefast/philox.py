"""Random words of a counter: Philox4x32-10 (Salmon et al. 2011).

A word is a function of the seed and the counter alone: noise does not depend on how rows are cut
into batches, nor on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FEW_QUADS = 1 << 15  # with fewer, PyTorch has one thread, and calls NumPy's cost less
Integers = Any  # a Tensor, or an array of NumPy


def philox(rows: Tensor, quads: Tensor, word: int, seed: int) -> Tensor:
    """Four random words for each row and each quad of features: (len(rows), 4 * len(quads)).

    Those of counter (row, quad, word), 64, 32 and 32 bits of it, under the 64 bits of ``seed``;
    ``rows`` and ``quads`` are int64. Every word is a signed number of 32 bits, in int32; in a
    program that is exported in int64, since elsewhere nothing may be seen as another dtype.

    >>> import torch
    >>> from nicefast.philox import philox
    >>> philox(torch.arange(2), torch.arange(1), 0, seed=7).shape
    torch.Size([2, 4])
    """
    if torch.compiler.is_exporting():
        c = _words(rows, quads, word, seed)
        signed = [((own & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 for own in c]
        return torch.stack(signed, -1).view(len(rows), 4 * len(quads))
    few_here = rows.device.type == "cpu" and len(rows) * len(quads) < FEW_QUADS
    if few_here and type(rows) is Tensor and not torch.compiler.is_compiling():
        few = _words(rows.numpy(), quads.numpy(), word, seed)
        c0, c1, c2, c3 = (torch.from_numpy(own) for own in few)
    else:
        c0, c1, c2, c3 = _words(rows, quads, word, seed)
    c1.bitwise_left_shift_(32).bitwise_or_(c0)  # the lower half lies first: little-endian
    c3.bitwise_left_shift_(32).bitwise_or_(c2)
    return torch.stack((c1, c3), -1).view(torch.int32).view(len(rows), 4 * len(quads))


def unsigned(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of signed words as numbers from 0 to 2^32 - 1, rounded to ``dtype``."""
    if words.dtype == torch.int32:
        return words.view(torch.uint32).to(dtype)
    return (words & 0xFFFFFFFF).to(dtype)


def _words(rows: Integers, quads: Integers, word: int, seed: int) -> list[Integers]:
    """Philox's four words in int64, (len(rows), len(quads)) each, all in memory of their own.

    Only the 1st and 3rd are multiplied, and cut to 32 bits for that: the upper halves of the 2nd
    and 4th hold what is left of a product.
    """
    library: Any = torch if isinstance(rows, Tensor) else np
    shift: Any = torch.bitwise_right_shift if library is torch else np.right_shift
    mask = 0xFFFFFFFF
    weyl = ((seed + i * 0x9E3779B9, (seed >> 32) + i * 0xBB67AE85) for i in range(10))
    keys = [(k0 & mask, k1 & mask) for k0, k1 in weyl]
    c0, c1 = (rows & mask)[:, None], (rows >> 32)[:, None]
    c2, c3 = quads[None, :], quads[None, :1] * 0 + word
    for k0, k1 in keys[:3]:  # some words still depend on the row or the quad alone
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps at 64 bits, as it should
        c0, c2 = ((p2 >> 32) ^ c1 ^ k0) & mask, ((p0 >> 32) ^ c3 ^ k1) & mask
        c1, c3 = p2, p0
    t0, t2 = library.empty_like(c0), library.empty_like(c2)
    for k0, k1 in keys[3:]:  # over and over the same six buffers, which stay in the cache
        c0 *= 0xD2511F53
        c2 *= 0xCD9E8D57
        shift(c2, 32, out=t0)
        t0 ^= c1
        t0 ^= k0
        t0 &= mask
        shift(c0, 32, out=t2)
        t2 ^= c3
        t2 ^= k1
        t2 &= mask
        c0, c1, c2, c3, t0, t2 = t0, c2, t2, c0, c1, c3
    return [c0, c1, c2, c3]
