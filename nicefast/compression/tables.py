"""Latents as bits: one table for each feature, since the prior is the same in every row.

The latent n of feature d, an integer, has the probability ``F(s_d (n + 1/2) q) - F(s_d (n - 1/2)
q)``, F the prior's distribution function, ``s = exp(log_scale)``, q the grid. A table has at most
SYMBOLS entries: of single latents, or, where the prior is wide, of runs of 2^k of them, within
which k bits tell them apart (over less than a twentieth of the prior's scale: what that costs is
below 0.01 %). Two more entries are for what lies beyond; how far is told by plain bits, few for
what is near (Elias's gamma code), which is less than the prior itself asks for. Probabilities
become integers here, so that they are the same wherever the distribution function is off by a
rounding; the coding itself is constriction's (Bamler 2022, arXiv 2201.01741).
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

SYMBOLS = 2047  # odd: as many on either side of 0
SPREAD = {"logistic": 22.0, "normal": 6.5}  # scales on either side: beyond is less than 1e-9
WEIGHT = 1 << 22  # of a whole table: constriction rounds to 24 bits
RUN_BITS = 26  # at most: all of 2^24 steps, and a sign
BEYOND = 54  # bits of how far beyond the table something may be
CHUNK = 12  # bits that are coded at a time

Integers = npt.NDArray[np.int64]


class Table(NamedTuple):
    """Weights of the runs ``first``, first + 1, ... of 2^``bits`` latents, between one for all that
    is below and one for all that is above."""

    weights: npt.NDArray[np.int64]
    first: int
    bits: int

    @property
    def low(self) -> int:
        """The least latent that has a run."""
        return self.first << self.bits

    @property
    def high(self) -> int:
        """The greatest."""
        return ((self.first + len(self.weights) - 2) << self.bits) - 1


def make_tables(log_scale: Tensor, grid: float, prior: str) -> list[Table]:
    """One table for each feature.

    >>> import torch
    >>> table = make_tables(torch.zeros(1), 1.0, "logistic")[0]
    >>> table.first, table.bits, len(table.weights)
    (-22, 0, 47)
    """
    return [_table(s, grid, prior) for s in log_scale.double().exp().tolist()]


def _table(scale: float, grid: float, prior: str) -> Table:
    reach = SPREAD[prior] / max(scale * grid, 1e-300)  # in latents
    bits = max(0, int(np.ceil(np.log2(max(2 * reach / SYMBOLS, 1)))))
    bits = min(bits, RUN_BITS)
    runs = min(int(np.ceil(reach / 2.0**bits)), SYMBOLS // 2)
    steps = torch.arange(-runs, runs + 2, dtype=torch.float64, device="cpu")
    starts = steps * 2.0**bits - 0.5
    edges = starts * (scale * grid)
    # from whichever tail is nearer: differences of small numbers, not of numbers near 1
    below, above = _cdf(edges, prior), _cdf(-edges, prior)
    inside = torch.where(edges[1:] < 0, below.diff(), -above.diff())
    mass = torch.cat((below[:1], inside, above[-1:]))
    weights = (mass * WEIGHT).ceil().clamp(min=1).long().numpy()
    return Table(weights, -runs, bits)


def _cdf(z: Tensor, prior: str) -> Tensor:
    return torch.exp(logsigmoid(z) if prior == "logistic" else torch.special.log_ndtr(z))


def digest(tables: list[Table]) -> bytes:
    """Of everything that decides how latents are coded."""
    seal = hashlib.sha256()
    for table in tables:
        seal.update(np.array([table.first, table.bits, len(table.weights)], "<i8").tobytes())
        seal.update(table.weights.astype("<i8").tobytes())
    return seal.digest()


class Coder:
    """Latents (N, D) to words of 32 bits, and back."""

    def __init__(self, tables: list[Table]) -> None:
        stream = _constriction()
        self.tables = tables
        self._ans = stream.stack.AnsCoder
        self._uniform = stream.model.Uniform
        self._models: list[Any] = [
            stream.model.Categorical(table.weights.astype(np.float64), perfect=False)
            for table in tables
        ]

    def encode(self, latents: Integers) -> npt.NDArray[np.uint32]:
        """A stack: what is decoded first is pushed last."""
        coder = self._ans()
        for table, model, column in reversed(
            list(zip(self.tables, self._models, latents.T, strict=True))
        ):
            run = column >> table.bits
            symbols = np.clip(run - table.first + 1, 0, len(table.weights) - 1)
            distance = np.maximum(table.low - column, column - table.high)
            far = distance[distance > 0]
            lengths = np.frexp(far.astype(np.float64))[1].astype(np.int64) - 1
            self._push(coder, far, lengths)
            coder.encode_reverse(lengths.astype(np.int32), self._uniform(BEYOND))
            inside = column[distance <= 0]
            self._push(coder, inside, np.full(len(inside), table.bits))
            coder.encode_reverse(symbols.astype(np.int32), model)
        return coder.get_compressed()

    def decode(self, words: npt.NDArray[np.uint32], rows: int) -> Integers:
        """ValueError where the words are none of ``rows`` rows."""
        coder = self._ans(words)
        latents = np.empty((rows, len(self.tables)), np.int64)
        for d, (table, model) in enumerate(zip(self.tables, self._models, strict=True)):
            symbols = coder.decode(model, rows).astype(np.int64)
            below, above = symbols == 0, symbols == len(table.weights) - 1
            inside = ~(below | above)
            column = (symbols + (table.first - 1)) << table.bits
            column[inside] += self._pop(coder, np.full(int(inside.sum()), table.bits))
            beyond = coder.decode(self._uniform(BEYOND), int((~inside).sum())).astype(np.int64)
            distance = np.zeros(rows, np.int64)
            distance[~inside] = (np.int64(1) << beyond) | self._pop(coder, beyond)
            column[below] = table.low - distance[below]
            column[above] = table.high + distance[above]
            latents[:, d] = column
        if not coder.is_empty():
            raise ValueError("more bits than the rows need")
        return latents

    def _push(self, coder: Any, values: Integers, bits: Integers) -> None:
        """The last ``bits`` bits of each value."""
        for low in range(0, int(bits.max(initial=0)), CHUNK):
            width = np.clip(bits - low, 0, CHUNK)
            some = width > 0
            part = (values >> low) & ((1 << width) - 1)
            sizes = (1 << width[some]).astype(np.int32)
            coder.encode_reverse(part[some].astype(np.int32), self._uniform(), sizes)

    def _pop(self, coder: Any, bits: Integers) -> Integers:
        values = np.zeros(len(bits), np.int64)
        for low in reversed(range(0, int(bits.max(initial=0)), CHUNK)):
            width = np.clip(bits - low, 0, CHUNK)
            some = width > 0
            part = coder.decode(self._uniform(), (1 << width[some]).astype(np.int32))
            values[some] |= part.astype(np.int64) << low
        return values


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise ImportError(
            "compression needs constriction: pip install 'nicefast[compress]'"
        ) from None
    return constriction.stream
