"""nicefast.plots: what is computed for pictures, what they show, and what they refuse."""

import doctest
import importlib
import math
import pkgutil

import pytest
import torch

import nicefast as nf

pytest.importorskip("matplotlib", reason="needs matplotlib")

import matplotlib
from matplotlib.image import imread

from nicefast import plots
from nicefast.inpainting import inpaint, masks


@pytest.fixture
def path(tmp_path):
    return tmp_path / "picture.png"


def is_picture(path, least=1000):
    """A PNG that is not of one colour."""
    pixels = imread(path)
    return path.stat().st_size > least and pixels[..., :3].std() > 0.01


def test_examples_in_docstrings_run():
    attempted = 0
    for module in pkgutil.iter_modules(plots.__path__):
        found = importlib.import_module(f"nicefast.plots.{module.name}")
        result = doctest.testmod(found, optionflags=doctest.NORMALIZE_WHITESPACE)
        assert result.failed == 0, module.name
        attempted += result.attempted
    assert attempted >= 20


def test_no_global_state_is_touched(path):
    before = dict(matplotlib.rcParams)
    plots.sample_grid(torch.rand(4, 8, 8), path)
    plots.plot_spectrum(torch.randn(64), path, (8, 8))
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_remedy_is_named(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'nicefast\[train\]'"):
        plots.sample_grid(torch.rand(4, 8, 8), path)


@pytest.mark.parametrize(
    ("shape", "columns"), [((7, 8, 8), 3), ((7, 1, 28, 20), 10), ((4, 3, 64, 64), 2)]
)
def test_a_grid_has_every_pixel_of_every_image(path, shape, columns):
    images = torch.randint(256, shape) / 255
    plots.sample_grid(images, path, columns)
    pixels = torch.from_numpy(imread(path))[..., :3]
    columns = min(columns, shape[0])
    rows = -(-shape[0] // columns)
    tall, wide = pixels.shape[0] // rows, pixels.shape[1] // columns
    assert pixels.shape[:2] == (rows * tall, columns * wide)
    every = -(-64 // max(shape[-2:]))
    for n, image in enumerate(images):
        top, left = n // columns * tall + 2, n % columns * wide + 2
        tile = pixels[top : top + shape[-2] * every, left : left + shape[-1] * every]
        # pixels that a picture is enlarged to are all alike
        blocks = tile.view(shape[-2], every, shape[-1], every, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()
        found = blocks[:, 0, :, 0].permute(2, 0, 1)
        # one channel is ink on white, through the colour map's 256 colours
        expected = image if image.ndim == 3 and len(image) == 3 else 1 - image.view(1, *shape[-2:])
        assert (found - expected).abs().max() < 2 / 255


def test_a_grid_leaves_missing_places_empty(path):
    plots.sample_grid(torch.ones(3, 64, 64), path, columns=2)
    pixels = torch.from_numpy(imread(path))[..., :3]
    assert (pixels[68:, 68:] == 1).all()
    assert (pixels[70:130, 4:60] == 0).all()


@pytest.mark.parametrize("images", [torch.rand(6, 8, 8), torch.rand(6, 3, 8, 5)])
def test_pictures_of_images(path, images):
    for draw in (
        lambda: plots.plot_interpolation(images.view(2, 3, *images.shape[1:]), path),
        lambda: plots.plot_neighbours(images, images.flip(0), path),
        lambda: plots.plot_neighbours(images, images, path, torch.arange(6.0), columns=4),
        lambda: plots.plot_samples(images, images, path, "noise"),
    ):
        draw()
        assert is_picture(path)
        path.unlink()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 10])
def test_inpainting_is_drawn(path, channels, count):
    x = torch.rand(count, channels, 8, 8)
    names = list(masks(8, 8))[:count]
    seen = torch.stack([masks(8, 8)[name] for name in names])
    flow = nf.NICE((channels, 8, 8), hidden=(8,))
    filled = inpaint(flow, x, seen.unsqueeze(1), steps=30)
    plots.plot_inpainting(x, seen, filled.x, filled.log_prob, path, names, filled.steps)
    assert is_picture(path)
    # as wide a range as a trained flow's, and one value alone, must do too
    wide = torch.linspace(-1e6, 2000, 31).unsqueeze(1).expand(-1, count)
    plots.plot_inpainting(x, seen.unsqueeze(1), x, wide, path, names)
    plots.plot_inpainting(x, seen, x, torch.zeros(2, 1), path, names)
    assert is_picture(path)


def test_hidden_pixels_are_tinted(path):
    x, seen = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16, dtype=torch.bool)
    plots.plot_inpainting(x, seen, x, torch.zeros(2, 1), path, ["all"])
    tint = torch.tensor((0.78, 0.86, 0.93))
    pixels = torch.from_numpy(imread(path))[..., :3]
    assert ((pixels - tint).abs().amax(-1) < 0.01).float().mean() > 0.1


@pytest.mark.parametrize("shape", [None, (8, 8), (1, 8, 8)])
def test_spectrum_of_any_model(path, shape):
    plots.plot_spectrum(torch.nn.Parameter(torch.randn(64)), path, shape)
    assert is_picture(path)


def test_spectrum_of_colours_and_of_a_fresh_model(path):
    plots.plot_spectrum(torch.randn(3, 8, 8), path)
    assert is_picture(path)
    plots.plot_spectrum(torch.zeros(64), path, (8, 8))  # all alike: a scale without a range
    plots.plot_spectrum(torch.tensor([500.0, -500.0]), path)
    assert is_picture(path)


def test_spectrum_refuses(path):
    with pytest.raises(ValueError, match=r"event_shape \(1, 8, 8\), got shape \(63,\)"):
        plots.plot_spectrum(torch.zeros(63), path, (1, 8, 8))
    with pytest.raises(ValueError, match="finite"):
        plots.plot_spectrum(torch.tensor([0.0, torch.inf]), path)
    with pytest.raises(ValueError, match=r"got shape \(0,\)"):
        plots.plot_spectrum(torch.zeros(0), path)


def normal(x):
    return -x.square().sum(1) / 2 - math.log(2 * math.pi)


def test_density_beside_a_density_and_beside_samples(path):
    for true in (normal, torch.randn(3000, 2), torch.full((10, 2), 99.0)):
        plots.plot_density(nf.NICE(2, hidden=(8,)).log_prob, true, (-3, 3, -2, 2), path, "normal")
        assert is_picture(path)


def test_density_s_first_axis_runs_to_the_right(path):
    def right(x):  # all of it where the first feature is large
        return torch.where(x[:, 0] > 2, 0.0, -torch.inf)

    samples = torch.stack([2 + torch.rand(100_000), -3 + 6 * torch.rand(100_000)], 1)
    for true in (right, samples):
        plots.plot_density(right, true, (-3, 3, -3, 3), path)
        pixels = torch.from_numpy(imread(path))[..., :3]
        bright = (pixels[..., 1] > 0.5) & (pixels[..., 2] < 0.6)  # green to yellow
        height, width = bright.shape
        for left in (0, int(0.5 * width)):  # each panel is bright on its right edge alone
            panel = bright[int(0.2 * height) : int(0.8 * height), left : left + int(0.41 * width)]
            columns = panel.float().mean(0)
            lit = (columns > 0.4).nonzero().flatten()
            assert len(lit) > 20
            assert lit.min() > 0.5 * len(columns)


def test_density_refuses(path):
    with pytest.raises(ValueError, match=r"bounds must be x from, .*got \(0, 1, 2\)"):
        plots.plot_density(normal, normal, (0, 1, 2), path)
    with pytest.raises(ValueError, match="from less to more"):
        plots.plot_density(normal, normal, (1, 0, 0, 1), path)
    with pytest.raises(ValueError, match=r"learned must give one log-density for each"):
        plots.plot_density(lambda x: x, normal, (0, 1, 0, 1), path)
    with pytest.raises(ValueError, match=r"samples \(M, 2\), M >= 1, got \(5, 3\)"):
        plots.plot_density(normal, torch.zeros(5, 3), (0, 1, 0, 1), path)
    assert not path.exists()


IMAGES = torch.rand(4, 8, 8)
BAD = [
    (lambda p: plots.sample_grid(torch.rand(4, 64), p), r"images must be .*\(4, 64\)"),
    (lambda p: plots.sample_grid(torch.rand(4, 2, 8, 8), p), r"C = 1 or 3.*\(4, 2, 8, 8\)"),
    (lambda p: plots.sample_grid(torch.rand(0, 8, 8), p), "at least one"),
    (lambda p: plots.sample_grid(IMAGES, p, columns=0), "columns must be an integer >= 1"),
    (lambda p: plots.plot_interpolation(IMAGES, p), r"\(N, M, H, W\).*got shape \(4, 8, 8\)"),
    (lambda p: plots.plot_neighbours(IMAGES, IMAGES[:3], p), r"shaped like samples.*\(3, 8, 8\)"),
    (lambda p: plots.plot_neighbours(IMAGES, IMAGES, p, torch.ones(3)), r"distances must be \(4,"),
    (lambda p: draw(p, filled=IMAGES[:2]), "filled must be shaped like original"),
    (lambda p: draw(p, observed=torch.ones(3, 8, 8, dtype=torch.bool)), "observed must be"),
    (lambda p: draw(p, titles=["one"]), r"titles must be one for each of 4 columns"),
    (lambda p: draw(p, log_prob=torch.zeros(3)), r"log_prob must be \(S, N\)"),
    (lambda p: draw(p, log_prob=torch.zeros(1, 4)), "S >= 2"),
    (lambda p: draw(p, steps=torch.arange(2)), r"one for each of 3 records, got \(2,\)"),
]


def draw(path, **wrong):
    given = {
        "original": IMAGES,
        "observed": torch.ones(4, 8, 8, dtype=torch.bool),
        "filled": IMAGES,
        "log_prob": torch.zeros(3, 4),
        "titles": "abcd",
        **wrong,
    }
    plots.plot_inpainting(path=path, **given)


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_shapes_are_refused_and_nothing_is_written(path, call, message):
    with pytest.raises(ValueError, match=message):
        call(path)
    assert not path.exists()


FLOW, ROWS = nf.NICE(4, hidden=(4,)), torch.zeros(2, 4)
WRONG_KINDS = [
    (lambda p: plots.sample_grid([[1.0]], p), r"images must be a torch\.Tensor, got list"),
    (lambda p: plots.sample_grid(IMAGES, None), "path must be a path, got NoneType"),
    (lambda p: plots.plot_neighbours(IMAGES, IMAGES, p, [1.0]), r"distances must be a torch\.T"),
    (lambda p: draw(p, observed=None), r"observed must be a torch\.Tensor, got NoneType"),
    (lambda p: draw(p, log_prob=1.5), r"log_prob must be a torch\.Tensor, got float"),
    (lambda p: draw(p, steps=3), r"steps must be a torch\.Tensor, got int"),
    (lambda p: draw(p, titles=None), "titles must be names, got NoneType"),
    (lambda p: plots.plot_samples("a", ROWS, p), r"real must be a torch\.Tensor, got str"),
    (lambda p: plots.plot_samples(ROWS, None, p), r"samples must be a torch\.Tensor, got None"),
    (lambda p: plots.plot_spectrum([0.0], p), r"log_scale must be a torch\.Tensor, got list"),
    (lambda p: plots.plot_spectrum(ROWS[0], p, 4), "event_shape must be a shape, got int"),
    (lambda p: plots.plot_density("a", normal, (0, 1, 0, 1), p), "learned must be a function"),
    (lambda p: plots.plot_density(normal, [1], (0, 1, 0, 1), p), "true must be a function"),
    (
        lambda p: plots.plot_density(normal, normal, None, p),
        "bounds must be four numbers, got None",
    ),
    (lambda p: plots.plot_density(normal, normal, "abcd", p), "bounds must be a number, got 'a'"),
    (lambda p: plots.nearest("a", ROWS), r"samples must be a torch\.Tensor, got str"),
    (lambda p: plots.nearest(ROWS, [1.0]), r"train must be a torch\.Tensor, got list"),
    (lambda p: plots.interpolate("a", ROWS, ROWS, 3), r"model must be a nicefast\.NICE, got str"),
    (lambda p: plots.interpolate(FLOW, None, ROWS, 3), r"a must be a torch\.Tensor, got NoneType"),
    (lambda p: plots.interpolate(FLOW, ROWS, ROWS.int(), 3), "b must be float16.*int32"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_KINDS)
def test_what_is_of_a_wrong_kind_is_refused(path, call, message):
    with pytest.raises(TypeError, match=message):
        call(path)
    assert not path.exists()


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_nearest_is_the_nearest(chunk):
    samples, train = torch.rand(13, 2, 5), torch.rand(40, 2, 5)
    indices, distances = plots.nearest(samples, train, chunk)
    all_distances = torch.cdist(samples.flatten(1).double(), train.flatten(1).double())
    expected, where = all_distances.min(1)
    assert torch.equal(indices, where)
    assert torch.allclose(distances, expected)
    assert (indices.dtype, distances.dtype) == (torch.int64, torch.float64)


def test_nearest_of_a_copy_is_itself_at_no_distance():
    train = torch.randint(256, (300, 28, 28), dtype=torch.uint8)
    indices, distances = plots.nearest(train[[5, 299]], train, 64)
    assert indices.tolist() == [5, 299]
    assert distances.tolist() == [0.0, 0.0]
    # a shift of all values is no trouble: distances are small beside lengths
    rows = 1e4 + torch.rand(50, 30)
    assert torch.equal(plots.nearest(rows + 1e-2, rows, 8)[0], torch.arange(50))
    assert plots.nearest(torch.zeros(0, 30), rows)[0].shape == (0,)


def test_nearest_refuses():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        plots.nearest(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="N >= 1"):
        plots.nearest(torch.zeros(2, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="chunk must be an integer >= 1, got 0"):
        plots.nearest(torch.zeros(2, 3), torch.zeros(2, 3), 0)


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_interpolation_has_both_ends_and_its_way(prior):
    flow = nf.NICE((1, 4, 4), hidden=(16,), prior=prior)
    with torch.no_grad():
        flow.scaling.log_scale.normal_()
    a, b = torch.rand(2, 5, 1, 4, 4)
    way = plots.interpolate(flow, a, b, 7)
    assert way.shape == (5, 7, 1, 4, 4)
    assert not way.requires_grad
    assert torch.allclose(way[:, 0], a, atol=1e-5)
    assert torch.allclose(way[:, -1], b, atol=1e-5)
    assert torch.allclose(way, plots.interpolate(flow, b, a, 7).flip(1), atol=1e-5)
    z, ends = flow(way)[0].flatten(2), [flow(x)[0].flatten(1) for x in (a, b)]
    middle = z[:, 3]
    if prior == "logistic":
        assert torch.allclose(middle, (ends[0] + ends[1]) / 2, atol=1e-4)
        return
    cosine = torch.cosine_similarity(*ends)
    assert torch.allclose(
        middle, (ends[0] + ends[1]) / (2 * (cosine.acos() / 2).cos())[:, None], atol=1e-4
    )


def test_spherical_interpolation_keeps_lengths_and_survives_parallel_ends():
    flow = nf.NICE(16, hidden=(8,), prior="normal")
    with torch.no_grad():
        for coupling in flow.couplings:  # x is z
            for p in coupling.conditioner.linears[-1].parameters():
                p.zero_()
    a = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    b = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    lengths = plots.interpolate(flow, a, b, 9).norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)
    for other in (a, -a, 2 * a, torch.zeros_like(a)):
        way = plots.interpolate(flow, a, other, 3)
        assert way.isfinite().all()
        assert torch.allclose(way[:, 1], (a + other) / 2, atol=1e-5) or other is not a


def test_interpolation_refuses():
    flow = nf.NICE((1, 4, 4), hidden=(8,))
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"shape \(R, 1, 4, 4\), got .*\(1, 1, 4, 4\)"):
        plots.interpolate(flow, x, x[:1], 3)
    with pytest.raises(ValueError, match=r"shape \(R, 1, 4, 4\), got \(2, 16\)"):
        plots.interpolate(flow, x.flatten(1), x.flatten(1), 3)
    with pytest.raises(ValueError, match="steps must be an integer >= 2, got 1"):
        plots.interpolate(flow, x, x, 1)
