"""Whether the first line of a CSV file is a header: one rule for all that reads such files."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence

from .errors import FileFormatError

MISSING = frozenset(  # what stands for a value that is not there
    ("", "#N/A", "#NA", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null", "-NaN", "-nan")
)
LOOKED_AT = 100  # rows below the first line
_WHOLE = re.compile(r"[+-]?\d+")
Header = bool | str


class HeaderWarning(UserWarning):
    """The first line of a CSV file holds numbers, and is taken for a row."""


def said_header(header: Header) -> bool | None:
    """What is said of the first line: True or "yes", False or "no", None for "auto".

    >>> said_header("yes"), said_header(False), said_header("auto")
    (True, False, None)
    """
    known = {"yes": True, "no": False, "auto": None}
    if not isinstance(header, bool | str) or (isinstance(header, str) and header not in known):
        raise ValueError(f"header must be 'auto', True ('yes') or False ('no'), got {header!r}")
    return header if isinstance(header, bool) else known[header]


def is_header(
    name: str,
    cells: Sequence[str],
    below: Sequence[Sequence[str]],
    header: Header = "auto",
    quiet: bool = False,
) -> bool:
    """Whether the first line of a file is a header.

    ``header`` says it, unless it is "auto". Then the first line is a header where all of its cells
    are names: neither numbers nor what stands for a missing value, an empty cell aside. It is a row
    where some of its cells are numbers and others are not, which is an error of the row. Where all
    of its cells are numbers nobody can be sure:

    - numbers that occur twice are no names of columns: it is a row;
    - the numbers 0 .. D-1 in any order, 1 .. D likewise and numbers in even steps upwards, as 2001,
      2002, 2003 (of three columns or more), and whole numbers above columns without a whole number
      are how columns are named: FileFormatError asks for ``header``;
    - any other numbers are a row, and a :class:`HeaderWarning` says so.

    Args:
        name: of the file, for the warning.
        cells: of the first line, in columns that hold numbers.
        below: the same columns of the lines below it, as many as are looked at.
        header: see :func:`said_header`.
        quiet: whether the warning is left out.

    >>> is_header("rows.csv", ["height", "weight"], [["1", "2"]])
    True
    >>> is_header("rows.csv", ["0", "0", "7"], [["0", "3", "255"]])
    False
    >>> is_header("rows.csv", ["0", "1", "2"], [["0.5", "0.1", "0.3"]], header="yes")
    True
    """
    said = said_header(header)
    if said is not None:
        return said
    own = [cell.strip() for cell in cells]
    numbers = [number_of(cell) for cell in own]
    known = [number for number in numbers if number is not None and math.isfinite(number)]
    if not known:
        named = [cell for cell in own if cell not in MISSING and number_of(cell) is None]
        if named and all(cell in named or not cell for cell in own):
            return True
        if not named:
            raise _unsure(own)
        return False
    if len(known) < len([cell for cell in own if cell not in MISSING]):
        return False  # numbers and names: an error of the row, which says so
    if len(set(known)) < len(known):
        return False
    if _are_names(own, known, below):
        raise _unsure(own)
    if not quiet:
        warnings.warn(
            f"{name}: the first line holds numbers and is taken for a row: {_shown(own)}; "
            f"header=False (--header no) confirms it, header=True (--header yes) says that they "
            f"are names of columns",
            HeaderWarning,
            stacklevel=2,
        )
    return False


def number_of(cell: str) -> float | None:
    """A cell as a number; None where it is none."""
    try:
        # Python's own 1_000 is not a number in a table.
        return float(cell) if "_" not in cell and cell.isascii() else None
    except ValueError:
        return None


def _are_names(own: Sequence[str], known: Sequence[float], below: Sequence[Sequence[str]]) -> bool:
    """Whether distinct numbers look like names of columns; see :func:`is_header`."""
    count = len(known)
    if sorted(known) == [float(i) for i in range(count)]:
        return True
    if count > 2:
        if sorted(known) == [float(i + 1) for i in range(count)]:
            return True
        step = known[1] - known[0]
        if step > 0 and all(math.isclose(x, known[0] + i * step) for i, x in enumerate(known)):
            return True
    rows = [row for row in below if len(row) == len(own)]
    places = [i for i, cell in enumerate(own) if cell not in MISSING]
    if not rows or not all(_WHOLE.fullmatch(own[i]) for i in places):
        return False
    return not any(_WHOLE.fullmatch(row[i].strip()) for row in rows for i in places)


def _unsure(cells: Sequence[str]) -> FileFormatError:
    return FileFormatError(
        f"the first line may be a header or a row: {_shown(cells)}; say which: header=True "
        f"(--header yes) or header=False (--header no)"
    )


def _shown(cells: Sequence[str]) -> str:
    text = ", ".join(cell[:20] for cell in cells[:6])
    return text + (", ..." if len(cells) > 6 else "")
