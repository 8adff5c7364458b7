"""NumPy's integers are integers; bools and floats are none."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import nicefast as nf
from nicefast.checks import as_integer, check_count
from nicefast.training import Configuration, Recipe

I = np.int64  # noqa: E741


def generator():
    return torch.Generator().manual_seed(0)


def flow():
    torch.manual_seed(0)
    return nf.NICE(4, hidden=(8,), couplings=2, context=2)


def test_flows_of_them_are_the_same_and_can_be_saved(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    torch.manual_seed(0)
    other = nf.NICE(I(4), hidden=np.array([8]), couplings=I(2), context=np.uint8(2))
    assert other.configuration == flow().configuration
    nf.save(other, tmp_path / "flow.safetensors")
    assert nf.load(tmp_path / "flow.safetensors").configuration == other.configuration
    image = nf.NICE(np.array([1, 2, 2]), hidden=[(I(3),), [I(4)]], couplings=2)
    assert image.event_shape == (1, 2, 2)
    assert image.configuration["hidden"] == [[3], [4]]
    assert nf.NICE(4, hidden=I(5)).configuration["hidden"] == [5]
    assert nf.MLP(I(2), I(3), I(2)).linears[0].weight.shape == (3, 2)
    assert nf.Scaling(I(3)).log_scale.shape == (3,)
    assert nf.NICE(4, hidden=(4,), grid=np.float32(0.25)).grid == 0.25


@pytest.mark.parametrize("of", [np.int64, np.int32, np.uint8])
def test_numbers_of_rows(of):
    own, c = flow(), torch.zeros(2)
    expected = own.sample(3, c, generator=generator())
    assert torch.equal(own.sample(of(3), c, generator=generator()), expected)
    assert torch.equal(own.sample(3, c, batch_size=of(2), generator=generator()), expected)
    assert own.sample_and_log_prob(of(3), c)[0].shape == (3, 4)
    assert own.frozen(of(2)).sample(of(3), c).shape == (3, 4)
    assert own.explain(of(7))
    levels = torch.zeros(2, 3, dtype=torch.uint8)
    given = nf.functional.dequantise(levels, of(4), seed=of(1), row_offset=of(2))
    assert torch.equal(given, nf.functional.dequantise(levels, 4, seed=1, row_offset=2))
    drawn = nf.functional.sample_prior(torch.zeros(3), of(2), seed=of(1))
    assert torch.equal(drawn, nf.functional.sample_prior(torch.zeros(3), 2, seed=1))


def test_training_scoring_and_estimators():
    recipe = Recipe(epochs=I(2), batch_size=I(7), lr=np.float32(0.5))
    assert recipe == Recipe(epochs=2, batch_size=7, lr=0.5)
    assert type(recipe.epochs) is int
    configuration = Configuration.of_preset("digits")
    assert replace(configuration, seed=I(3)).toml() == replace(configuration, seed=3).toml()
    rows = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    own = nf.NICE(4, hidden=(8,))
    found = nf.score(own, rows, batch_rows=I(7), chunk_rows=I(8), draws=I(1), seed=I(0))
    assert found.rows == 20
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from nicefast.sklearn import NICEDensity

    density = NICEDensity(hidden=(I(4),), couplings=I(2), epochs=I(1), batch_size=I(8))
    assert density.fit(rows).sample(I(3)).shape == (3, 4)


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float64(3), "3", None, torch.tensor(3)])
def test_other_things_are_no_integers(value):
    assert as_integer(value) is None
    with pytest.raises(ValueError, match="n must be an integer >= 0"):
        check_count("n", value)
    with pytest.raises(ValueError, match="n must be an integer >= 0"):
        nf.NICE(4, hidden=(4,)).sample(value)
