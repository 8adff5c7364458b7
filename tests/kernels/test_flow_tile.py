"""Which whole flows get a kernel, and what the others are told."""

import itertools

import pytest

flow_tile_module = pytest.importorskip("nicefast.kernels.flow_tile", reason="needs Triton")
FlowShape, FlowTile, flow_tile = (
    flow_tile_module.FlowShape,
    flow_tile_module.FlowTile,
    flow_tile_module.flow_tile,
)
ARCHS, PRECISIONS = flow_tile_module.ARCHS, flow_tile_module.PRECISIONS
SHAPE = FlowShape(20, 3, (60, 50), 4, "relu", "logistic")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiles_are_sound_and_no_wider_than_needed(arch, precision):
    for d, c, h in itertools.product((2, 15, 16, 17, 100), (0, 1, 28), (1, 16, 33, 64, 120, 256)):
        tile = flow_tile(SHAPE._replace(features=d, context=c, hidden=(3, h)), precision, arch)
        if isinstance(tile, str):
            assert h > 64 or d + c > 64
            continue
        assert isinstance(tile, FlowTile)
        assert d + c <= tile.features < max(2 * (d + c), 17)
        assert h <= tile.hidden < max(2 * h, 33)
        for size in (tile.rows, tile.features, tile.hidden):
            assert size & (size - 1) == 0
        assert tile.rows >= 16
        assert tile.warps in (4, 8)


@pytest.mark.parametrize("arch", ARCHS)
def test_bf16_at_hidden_128_is_served(arch):
    for d in (8, 32) if arch == "gfx942" else (8, 64, 128):
        shape = SHAPE._replace(features=d, context=0, hidden=(128,) * 3)
        assert isinstance(flow_tile(shape, "bf16", arch), FlowTile)


def test_the_tile_depends_on_widths_precision_and_architecture_alone():
    tile = flow_tile(SHAPE, "bf16", "sm_90")
    for activation, prior in itertools.product(
        flow_tile_module.ACTIVATIONS, flow_tile_module.PRIORS
    ):
        shape = SHAPE._replace(activation=activation, prior=prior, couplings=9)
        assert flow_tile(shape, "bf16", "sm_90") == tile
    assert flow_tile(SHAPE._replace(hidden=(64,) * 7), "bf16", "sm_90") == tile


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": 129}, "at most 128"),
        ({"features": 100, "context": 29}, "100 features and 29 of context"),
        ({"hidden": ()}, "hidden layer"),
        ({"hidden": (16, 300)}, "300"),
        ({"hidden": (256,) * 3, "features": 90}, "256"),
        ({"couplings": 2_000_000}, "weights"),
        ({"activation": "softplus"}, "softplus"),
        ({"prior": "cauchy"}, "cauchy"),
    ],
)
def test_reasons(change, said):
    reason = flow_tile(SHAPE._replace(**change), "fp32", "sm_90")
    assert isinstance(reason, str)
    assert said in reason


def test_unchecked_architectures_and_precisions():
    assert "sm_121" in flow_tile(SHAPE, "bf16", "sm_121")
    assert "sm_90" in flow_tile(SHAPE, "bf16", "gfx1100")
    assert "fp64" in flow_tile(SHAPE, "fp64", "sm_90")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_small_and_later_chips_take_the_tiles_of_older_ones(precision):
    for d, h in itertools.product((8, 30, 60, 120), (20, 60, 120, 250)):
        shape = SHAPE._replace(features=d, context=0, hidden=(h,))
        of = {arch: flow_tile(shape, precision, arch) for arch in ARCHS}
        assert of["sm_103"] == of["sm_100"] or "sm_103" in of["sm_103"]
        for arch in ("sm_86", "sm_89", "sm_120"):
            if isinstance(of["sm_80"], str):
                assert of[arch] == of["sm_80"].replace("sm_80", arch)
            elif (precision, h) == ("tf32", 120):  # 99 KB of shared memory
                assert of[arch] == of["sm_80"]._replace(rows=64)
            else:
                assert of[arch] == of["sm_80"]


@pytest.mark.parametrize(
    ("arch", "known"),
    [
        *((arch, arch) for arch in ARCHS),
        ("sm_87", "sm_86"), ("sm_101", "sm_100"), ("sm_110", "sm_103"), ("sm_121", "sm_120"),
        ("sm_200", "sm_120"), ("sm_75", "sm_75"), ("gfx1100", "gfx1100"), ("gfx90a", "gfx90a"),
    ],
)  # fmt: skip
def test_whose_tiles_an_architecture_takes(arch, known):
    assert flow_tile_module.tiles_of(arch) == known


def test_weights_stay_on_the_chip_of_small_flows_alone():
    sides = (flow_tile_module.Side(16, 0, 1), flow_tile_module.Side(16, 16, 1))
    small = FlowShape(32, 3, (60, 50), 4, "relu", "logistic", sides, (0, 1, 0, 1))
    for arch in ARCHS:
        tile = flow_tile(small, "bf16", arch)
        assert isinstance(tile, flow_tile_module.ResidentTile) == (arch != "gfx942")
    wide = (flow_tile_module.Side(17, 0, 1), flow_tile_module.Side(3, 17, 1))
    for change in (
        {"couplings": 5, "reads": (0, 1, 0, 1, 0)}, {"hidden": (8,) * 3}, {"hidden": (65,)},
        {"context": 17}, {"sides": wide, "features": 20}, {"sides": (), "reads": ()},
    ):  # fmt: skip
        assert isinstance(flow_tile(small._replace(**change), "bf16", "sm_90"), FlowTile)
    assert isinstance(flow_tile(small, "fp32", "sm_90"), FlowTile)


def test_the_tile_of_resident_weights_does_not_depend_on_the_partition_s_order():
    side = flow_tile_module.Side
    shape = FlowShape(9, 0, (32,), 2, "relu", "logistic", (side(5, 0, 2), side(4, 1, 2)), (0, 1))
    tile = flow_tile(shape, "tf32", "sm_80")
    for sides, reads in (((side(5, 0, 0), side(4, 0, 0)), (1, 1)), (shape.sides[::-1], (1, 0))):
        assert flow_tile(shape._replace(sides=sides, reads=reads), "tf32", "sm_80") == tile
