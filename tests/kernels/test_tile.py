"""The tile functions: pure arithmetic, so checked for every width."""

import pytest

tile_module = pytest.importorskip("nicefast.kernels.tile", reason="needs Triton")
tile, reduction_programs, ceil_div = (
    tile_module.tile,
    tile_module.reduction_programs,
    tile_module.ceil_div,
)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_every_width_has_a_sound_tile(itemsize):
    for width in [*range(1, 4100), 50_257, 99_999, 100_000]:
        t = tile(width, itemsize)
        assert t.columns & (t.columns - 1) == 0
        assert t.rows & (t.rows - 1) == 0
        assert 2 <= t.columns <= tile_module.MAX_COLUMNS
        assert t.rows >= 1
        assert t.rows * t.columns * itemsize <= max(tile_module.TILE_BYTES, t.columns * itemsize)
        padded = ceil_div(width, t.columns) * t.columns
        assert padded - width <= max(width / 6, 16)


def test_known_tiles():
    assert tile(784, 4).columns == 128  # 7 x 128, not 1 x 1024
    assert tile(3072, 4).columns == 1024
    assert tile(64, 4) == (32, 64, 4)


def test_reduction_covers_every_row_once():
    for n in (1, 2, 63, 64, 65, 4_097, 1_000_003):
        for width in (1, 3, 785, 100_000):
            t = tile(width, 4)
            programs, per_program = reduction_programs(n, width, t)
            assert programs * per_program * t.rows >= n
            assert (programs - 1) * per_program * t.rows < n  # no program without work
            assert programs * ceil_div(width, t.columns) <= max(
                tile_module.REDUCTION_PROGRAMS, ceil_div(width, t.columns)
            )
