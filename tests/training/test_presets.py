"""Presets build the networks that their sources state, and everything about a fit goes to TOML."""

import itertools
import math

import pytest
import torch

import nicefast as nf
from nicefast.training.configuration import Configuration
from nicefast.training.presets import PRESETS

SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "tfd": (1, 48, 48),
    "svhn": (3, 32, 32),
    "cifar10": (3, 32, 32),
}


def parameters(name):
    preset = PRESETS[name]
    shape = SHAPES.get(preset.data, (10,))
    with torch.device("meta"):
        return sum(p.numel() for p in nf.NICE(shape, **preset.model).parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", 19_158_352),
        ("mnist-paper", 19_158_352),
        ("mnist-deep", 17_864_704),
        ("mnist-2014", 19_158_352),
        ("tfd", 346_166_912),
        ("svhn", 72_617_216),
        ("cifar10", 72_617_216),
    ],
)
def test_parameters_are_those_of_the_paper(name, expected):
    assert parameters(name) == expected


def test_parameters_of_the_released_networks_by_formula():
    def mlp(inputs, layers, width, outputs):
        widths = [inputs, *(width,) * layers, outputs]
        return sum(a * b + b for a, b in itertools.pairwise(widths))

    tfd = sum(mlp(1152, n, 2000, 1152) for n in (3, 3, 2, 2, 1, 1, 1, 1)) + 2304
    cifar = sum(mlp(1536, n, 2400, 1536) for n in (1, 1, 3, 3, 2, 2, 1, 1)) + 3072
    svhn = 4 * mlp(1536, 3, 2000, 1536) + 3072
    assert [parameters(n) for n in ("tfd-2014", "cifar10-2014", "svhn-2014")] == [tfd, cifar, svhn]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_it_is_from_and_goes_through_toml(name, tmp_path):
    pytest.importorskip("tomli_w", reason="needs tomli_w")
    preset = PRESETS[name]
    assert preset.source
    assert all(d.endswith(".") for d in preset.deviations)
    config = Configuration.of_preset(name, None if preset.data else "table.npy")
    file = tmp_path / "config.toml"
    file.write_text(config.toml())
    assert Configuration.of_file(file).values() == config.values()
    assert Configuration.of_file(file).toml() == config.toml()


def test_the_paper_s_recipes():
    paper, released = PRESETS["mnist-paper"].recipe, PRESETS["mnist-2014"].recipe
    assert (paper.lr, paper.momentum, paper.averaging_squares, paper.eps, paper.epochs) == (
        1e-3, 0.9, 0.99, 1e-4, 1500,
    )  # fmt: skip
    assert (released.optimiser, released.momentum_epochs, released.eps) == ("rmsprop", (5, 6), 1e-2)
    assert PRESETS["cifar10-2014"].recipe.lr_least == 1e-5


def test_a_file_may_name_a_preset_and_what_differs(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'preset = "mnist"\nseed = 4\n[recipe]\nepochs = 2\nscale_limit = inf\n'
        "[model]\nhidden = [10, 20]\n"
    )
    config = Configuration.of_file(file)
    assert (config.data, config.seed, config.recipe.epochs) == ("mnist", 4, 2)
    assert config.recipe.scale_limit == math.inf
    assert config.model["hidden"] == (10, 20)
    assert config.model["dropout"] == PRESETS["mnist"].model["dropout"]
    file.write_text('data = "table.npy"\n')
    assert Configuration.of_file(file).recipe == Configuration("x", {}, ()).recipe


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"model": None}, TypeError, "model must be a mapping, got NoneType"),
        ({"recipe": "a"}, TypeError, "recipe must be a Recipe, got str"),
        ({"seed": True}, ValueError, "seed must be from 0"),
    ],
)
def test_a_configuration_names_what_is_wrong(wrong, error, says):
    with pytest.raises(error, match=says):
        Configuration(**{"data": "x", "model": {}, "preprocessing": (), **wrong})


@pytest.mark.parametrize("name", [None, ["digits"]])
def test_a_preset_has_a_name(name):
    with pytest.raises(ValueError, match="preset must be one of"):
        Configuration.of_preset(name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("preset = 'mnits'", "preset must be one of"),
        ("seed = 1", "data must name a data set"),
        ("data = 'digits'\nsed = 1", "'sed' is no key of a configuration"),
        ("data = 'digits'\n[recipe]\nlr = -1", "lr must be positive and finite, got -1"),
        ("data = 'digits'\n[recipe]\nlearning = 1", "'recipe.learning' is no key"),
        ("data = 'digits'\n[model]\nfeatures = 1", "'model.features' is no key"),
        ("data = 'digits'\nseed = -1", "seed must be from 0"),
        ("data = 'digits'\nseed = 'a'", "seed must be from 0"),
        ("data = 'digits'\nnoise_draws = 0", "noise_draws must be at least 1, got 0"),
        ("data = ", "is no TOML"),
    ],
)
def test_a_file_that_says_something_wrong_is_refused(content, says, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"config: .*mine\.toml") as caught:
        Configuration.of_file(file)
    assert says in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        Configuration.of_file(tmp_path / "none.toml")
