"""How a launch is cut into tiles: pure functions of shape and dtype.

No autotuning and no device query, so the same call runs the same code on every GPU and the
compile-only tests can enumerate every tile that can ever be launched.
"""

from typing import NamedTuple

import torch

TILE_BYTES = 8192  # one tile of float32: four 16-byte accesses in flight per thread
WARPS = 4
WARP_SIZE = 64 if torch.version.hip else 32  # a property of the build, not of a device
MAX_COLUMNS = 1024
REDUCTION_PROGRAMS = 1024  # programs of a column reduction, whatever the GPU


class Tile(NamedTuple):
    """``rows`` x ``columns`` elements handled at once by ``warps`` warps."""

    rows: int
    columns: int
    warps: int


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tile(width: int, itemsize: int) -> Tile:
    """Tile for a row-major operation over ``width`` features of ``itemsize`` bytes.

    Columns are the widest power of two that pads a row by at most a sixth (784 -> 7 x 128, not
    1 x 1024); a padded lane costs an issue slot, not bandwidth. Two-byte types get as many elements
    as float32, in which they are computed, and at least 256 threads: with more elements for each
    thread, gathers spill.
    """
    columns = min(next_power_of_two(width), MAX_COLUMNS)
    while columns > 16 and 6 * (ceil_div(width, columns) * columns - width) > width:
        columns //= 2
    columns = max(columns, 2)
    rows = max(1, TILE_BYTES // max(itemsize, 4) // columns)
    warps = max(WARPS, 256 // WARP_SIZE) if itemsize == 2 else WARPS
    return Tile(rows, columns, warps)


def reduction_programs(n_rows: int, width: int, t: Tile) -> tuple[int, int]:
    """``(programs, tiles per program)`` along the rows of a column reduction.

    Depends on shapes alone, so the partial sums and their order, hence the bits of the result,
    are the same on every GPU.
    """
    row_tiles = ceil_div(n_rows, t.rows)
    programs = max(1, min(row_tiles, REDUCTION_PROGRAMS // ceil_div(width, t.columns)))
    per_program = ceil_div(row_tiles, programs)
    return ceil_div(row_tiles, per_program), per_program
