"""Random words of a counter: Philox4x32-10 (Salmon et al. 2011).

A word is a function of the seed and the counter alone: noise does not depend on how rows are cut
into batches, nor on the device.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .runtime.watchers import is_compiled, is_exported, is_transformed

PIECE = 1 << 13  # counters whose words NumPy computes at a time: they stay in the cache
MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57


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
    if is_exported():
        c = _words(rows, quads, word, seed)
        signed = [((own & MASK) ^ 0x80000000) - 0x80000000 for own in c]
        return torch.stack(signed, -1).view(len(rows), 4 * len(quads))
    if rows.is_cpu and type(rows) is Tensor and not (is_compiled() or is_transformed()):
        return torch.from_numpy(_by_numpy(rows.numpy(), quads.numpy(), word, seed))
    c0, c1, c2, c3 = _words(rows, quads, word, seed)
    c1.bitwise_left_shift_(32).bitwise_or_(c0)  # the lower half lies first: little-endian
    c3.bitwise_left_shift_(32).bitwise_or_(c2)
    return torch.stack((c1, c3), -1).view(torch.int32).view(len(rows), 4 * len(quads))


def _by_numpy(rows: Any, quads: Any, word: int, seed: int) -> Any:
    """:func:`philox` of arrays. NumPy sees the halves of a product as 32-bit numbers, so that one
    thread of it is faster than two of PyTorch's; it frees Python's lock while it computes."""
    step = max(1, PIECE // max(1, len(quads)))
    if len(rows) <= step:
        return _piece(rows, quads, word, seed)
    words = np.empty((len(rows), 4 * len(quads)), np.int32)
    pieces = [slice(i, i + step) for i in range(0, len(rows), step)]

    def fill(piece: slice) -> None:
        words[piece] = _piece(rows[piece], quads, word, seed)

    threads = min(torch.get_num_threads(), len(pieces) // 2)  # to start one costs 50 us
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, pieces))
    else:
        for piece in pieces:
            fill(piece)
    return words


def _piece(rows: Any, quads: Any, word: int, seed: int) -> Any:
    """The words of some rows: three operations for each of the ten rounds."""
    shape = 2, len(rows), len(quads)
    count = shape[1] * shape[2]
    even: Any = np.empty(shape, np.uint64)  # the words that are multiplied
    odd: Any = np.empty(shape, np.uint32)
    even[0], even[1] = (rows & MASK)[:, None], quads
    odd[0], odd[1] = (rows >> 32)[:, None], word
    even, odd = even.reshape(2, count), odd.reshape(2, count)
    lower = even.view(np.uint32)[:, ::2]  # the lower halves, of little-endian numbers
    products = np.empty((2, 2, count), np.uint64)  # the next round needs the last one's lower half
    parts = products.view(np.uint32)[:, ::-1]
    factors = np.array(MULTIPLIERS, np.uint64)[:, None]
    keys = np.array(_keys(seed), np.uint64)[:, :, None]
    for i in range(10):
        np.multiply(even, factors, out=products[i % 2])
        np.bitwise_xor(parts[i % 2, :, 1::2], odd, out=lower)
        even ^= keys[i]
        odd = parts[i % 2, :, ::2]
    words = np.empty((count, 4), np.uint32)
    words[:, ::2], words[:, 1::2] = lower.T, odd.T
    return words.view(np.int32).reshape(shape[1], 4 * shape[2])


def unsigned(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of signed words as numbers from 0 to 2^32 - 1, rounded to ``dtype``."""
    if words.dtype == torch.int32:
        return words.view(torch.uint32).to(dtype)
    return (words & MASK).to(dtype)


def _keys(seed: int) -> list[tuple[int, int]]:
    """Of the ten rounds."""
    weyl = ((seed + i * 0x9E3779B9, (seed >> 32) + i * 0xBB67AE85) for i in range(10))
    return [(k0 & MASK, k1 & MASK) for k0, k1 in weyl]


def _words(rows: Tensor, quads: Tensor, word: int, seed: int) -> list[Tensor]:
    """Philox's four words in int64, (len(rows), len(quads)) each, all in memory of their own.

    Only the 1st and 3rd are multiplied, and cut to 32 bits for that: the upper halves of the 2nd
    and 4th hold what is left of a product.
    """
    keys, (m0, m2) = _keys(seed), MULTIPLIERS
    c0, c1 = (rows & MASK)[:, None], (rows >> 32)[:, None]
    c2, c3 = quads[None, :], quads[None, :1] * 0 + word
    for k0, k1 in keys[:3]:  # some words still depend on the row or the quad alone
        p0, p2 = c0 * m0, c2 * m2  # wraps at 64 bits, as it should
        c0, c2 = ((p2 >> 32) ^ c1 ^ k0) & MASK, ((p0 >> 32) ^ c3 ^ k1) & MASK
        c1, c3 = p2, p0
    t0, t2 = torch.empty_like(c0), torch.empty_like(c2)
    for k0, k1 in keys[3:]:  # over and over the same six buffers, which stay in the cache
        c0 *= m0
        c2 *= m2
        torch.bitwise_right_shift(c2, 32, out=t0)
        t0 ^= c1
        t0 ^= k0
        t0 &= MASK
        torch.bitwise_right_shift(c0, 32, out=t2)
        t2 ^= c3
        t2 ^= k1
        t2 &= MASK
        c0, c1, c2, c3, t0, t2 = t0, c2, t2, c0, c1, c3
    return [c0, c1, c2, c3]
