"""Columns of integers and of other multiples of one number: found alike, and given their noise."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

import nicefast as nf
from nicefast.baselines import Gaussian
from nicefast.data import load_data
from nicefast.evaluation import evaluate
from nicefast.preprocessing import Dequantise, Preprocessing
from nicefast.runs import carry_out, run_folder, write_run
from nicefast.sklearn import NICEDensity
from nicefast.sklearn.columns import with_noise
from nicefast.spacing import column_spacings, multiples_below, on_grid
from nicefast.training import Configuration

N = 400
DRAW = np.random.default_rng(0)
REAL = DRAW.normal(size=N)
COLUMNS = {
    "integers": (DRAW.integers(0, 12, N), 1),
    "negative": (DRAW.integers(-7, 5, N), 1),
    "different integers": (DRAW.permutation(N), 1),
    "coin": (DRAW.integers(0, 2, N), 1),
    "coin of 5": (5 * DRAW.integers(0, 2, N), 1),
    "fives": (5 * DRAW.integers(-3, 9, N), 5),
    "tenths": (DRAW.integers(-20, 30, N) / 10, 0.1),
    "computed tenths": (DRAW.integers(-20, 30, N) * 0.1, 0.1),
    "temperatures": (DRAW.integers(360, 420, N) / 10, 0.1),
    "quarters": (DRAW.integers(1, 40, N) * 0.25, 0.25),
    "halves": (DRAW.integers(0, 2, N) * 0.5, 0.5),
    "fifteen hundredths": (DRAW.integers(0, 9, N) * 0.15, 0.15),
    "scaled to 1": (DRAW.integers(0, 256, N) / 255, 1 / 255),
    "sevens and a bit": (DRAW.integers(0, 9, N) * 7.3, 7.3),
    "real": (REAL, 0),
    "different tenths": (DRAW.permutation(N) / 10, 0),
    "mostly 0": (np.where(DRAW.random(N) < 0.5, 0, REAL), 0),
    "repeated": (np.repeat(REAL[: N // 4], 4), 0),
    "one value": (np.full(N, 0.3), 0),
    "one integer": (np.full(N, 7.0), 0),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", COLUMNS)
def test_spacings_are_found(name, dtype):
    values, spacing = COLUMNS[name]
    found = column_spacings(np.stack([values.astype(dtype), REAL.astype(dtype)], 1))
    assert found.dtype == np.float64
    assert found == pytest.approx([spacing, 0], rel=1e-6)
    if spacing:
        assert on_grid(torch.from_numpy(values.astype(dtype)), found[0]).all()


def test_integers_have_a_spacing_by_their_dtype():
    rows = np.zeros((30, 3), np.int16)
    rows[:, 1] = 3 * np.arange(30) % 21
    assert column_spacings(rows).tolist() == [1, 3, 1]
    assert column_spacings(rows.astype(bool)).tolist() == [1, 1, 1]
    assert column_spacings(rows[:0]).tolist() == [0, 0, 0]


def test_images_have_one_spacing():
    images = DRAW.integers(0, 16, (60, 1, 3, 3))
    images[:, 0, 0, 0] = 0
    assert column_spacings(images / 16).tolist() == [1 / 16] * 9
    assert column_spacings(DRAW.random((60, 1, 3, 3))).tolist() == [0] * 9


def test_single_precision_random_numbers_are_real():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20_000, 2, generator=generator)
    assert len(x[:, 0].unique()) < len(x)
    assert column_spacings(x.numpy()).tolist() == [0, 0]
    assert column_spacings(x.double().numpy()).tolist() == [0, 0]


def test_a_value_that_is_seen_by_no_sample_counts():
    x = DRAW.integers(0, 50, (200_000, 1)) / 10
    assert column_spacings(x) == pytest.approx(0.1)
    x[100_001] = 0.123456789
    assert column_spacings(x).tolist() == [0]


def test_values_are_those_of_the_file_again():
    values = torch.arange(-30, 31, dtype=torch.float64) / 10
    noised = values + 0.1 * 0.5
    assert torch.equal(multiples_below(noised, torch.tensor(0.1, dtype=torch.float64)), values)


def mixed(n=600, seed=0):
    """A count, tenths, fives, quarters and a real value."""
    draw = np.random.default_rng(seed)
    return np.stack(
        [
            draw.poisson(4, n),
            draw.integers(-10, 20, n) / 10,
            5 * draw.integers(0, 8, n),
            0.25 * draw.integers(0, 8, n),
            draw.normal(size=n),
        ],
        1,
    )


SPACINGS = [1, 0.1, 5, 0.25, 0]


def test_preprocessing_and_estimator_have_one_rule():
    x = mixed()
    steps = Preprocessing.fit(["dequantise", "standardise"], torch.from_numpy(x))
    density = NICEDensity(hidden=(8,), couplings=2, epochs=1, random_state=0).fit(x)
    assert steps.spacing == pytest.approx(SPACINGS)
    assert density.preprocessing_.spacing == steps.spacing
    np.testing.assert_array_equal(density.spacings_, steps.spacing)
    assert density.integer_columns_.tolist() == [0, 1, 2, 3]
    drawn = density.sample(50, random_state=0)
    widths = torch.tensor(SPACINGS[:4], dtype=torch.float64)
    assert on_grid(torch.from_numpy(drawn[:, :4]), widths).all()
    np.testing.assert_array_equal(drawn[:, 1], np.round(drawn[:, 1], 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_has_the_width_of_the_spacing(dtype):
    x = torch.from_numpy(mixed(4000)).to(dtype)
    steps = Preprocessing.fit(["dequantise"], x)
    y, log_det = steps.forward(x, seed=3)
    u = (y.double() - x.double())[:, :4] / torch.tensor(SPACINGS[:4], dtype=torch.float64)
    assert u.min() > -1e-4
    assert u.max() < 1 + 1e-4
    assert u.mean(0).numpy() == pytest.approx([0.5] * 4, abs=0.02)
    assert u.var(0).numpy() == pytest.approx([1 / 12] * 4, abs=0.005)
    assert torch.equal(y[:, 4], x[:, 4].float())
    assert (log_det == 0).all()
    rows = [steps.forward(x[i : i + 1000], seed=3, row_offset=i)[0] for i in range(0, 4000, 1000)]
    assert torch.equal(torch.cat(rows), y)
    assert torch.equal(
        steps.levels(steps.exact(y.double())[0])[:, 1], x[:, 1].double().round(decimals=1)
    )
    # what has its noise already is not given more
    again = steps.forward(y.double() + 1e-3 * 0.25, seed=4)[0]
    assert ((again - y).abs() < 1e-3).double().mean() > 0.99


def test_densities_are_of_the_raw_scale():
    """Of independent columns, the mean log-density is that of their noised values."""
    x = torch.from_numpy(mixed(4000))
    steps = Preprocessing.fit(["dequantise", "standardise"], x)
    gaussian = Gaussian.full(steps.forward(x, seed=1)[0])
    found = evaluate(gaussian, x, steps, draws=2, seed=1)
    noised = np.concatenate(
        [Preprocessing(steps.steps[:1]).forward(x, 1, 4000 * d)[0] for d in (0, 1)]
    )
    expected = GaussianMixture(reg_covar=0).fit(noised[:4000]).score(noised)
    assert found.raw_log_prob == pytest.approx(expected, abs=1e-3)
    assert found.draws == 2
    assert found.draw_spread > 0
    assert found.bits_per_dim is None
    # a uniform density on the cells of the fives: -log of their width, to what a normal one loses
    assert found.raw_log_prob < -sum(math.log(s) for s in SPACINGS[:4])


def test_scores_of_rows_do_not_depend_on_their_neighbours():
    x = mixed()
    density = NICEDensity(hidden=(8,), couplings=2, epochs=1, random_state=0).fit(x)
    scores = density.score_samples(x)
    np.testing.assert_allclose(density.score_samples(x[::-1])[::-1], scores, rtol=1e-10)
    noised = with_noise(x, density.spacings_)
    np.testing.assert_allclose(density.score_samples(noised), scores, rtol=1e-10)
    assert with_noise(x, np.zeros(5)) is x


def test_what_version_0_1_0_pickled_is_loaded():
    """Its states had the numbers of the columns of integers beside the other steps."""
    x = mixed()[:, [0, 2, 4]]
    x[:, 1] /= 5
    density = NICEDensity(hidden=(8,), couplings=2, epochs=1, random_state=0).fit(x)
    state = density.__getstate__()
    path = Path(tempfile.mkdtemp(), "preprocessing")
    Preprocessing(density.preprocessing_.steps[1:]).save(path)
    state["_flow"] |= {"preprocessing": path.read_bytes(), "noisy": [0, 1]}
    del state["spacings_"]
    again = NICEDensity()
    again.__setstate__(state)
    assert again.spacings_.tolist() == [1, 1, 0]
    np.testing.assert_array_equal(again.score_samples(x), density.score_samples(x))


def fitted(tmp_path, x, name="table.npy", **more):
    path = tmp_path / name
    if name.endswith(".csv"):
        np.savetxt(path, x, delimiter=",", fmt="%.17g", header="a,b,c,d,e", comments="")
    else:
        np.save(path, x)
    settings = Configuration.of_preset("tabular", str(path)).changed(
        {"model.hidden": (8,), "model.couplings": 2, "recipe.epochs": 2, **more}
    )
    data = load_data(path)
    with run_folder(tmp_path / "run") as (folder, finish):
        run = carry_out(settings, data, folder, Quiet(), False)
        write_run(folder, run)
        finish()
    return data, run, tmp_path / "run"


class Quiet:
    def begins(self, *_):
        pass

    def epoch(self, *_):
        pass


@pytest.mark.parametrize("name", ["table.npy", "table.csv"])
def test_fit_decides_by_column_and_records_it(tmp_path, name):
    data, run, folder = fitted(tmp_path, mixed(), name)
    assert data.levels is None
    assert data.train.dtype == torch.float64
    assert run.preprocessing.spacing == pytest.approx(SPACINGS)
    result = json.loads((folder / "result.json").read_text())
    assert result["noise"]["spacing"] == pytest.approx(SPACINGS)
    assert result["noise"]["draws"] == run.configuration.noise_draws
    assert "4 of 5 columns + spacing u" in result["preprocessing"]
    again = Preprocessing.load(folder / "preprocessing.safetensors")
    assert again.spacing == run.preprocessing.spacing
    assert again.steps[0] == run.preprocessing.steps[0]

    scores = nf.score(folder, data.test.numpy(), seed=5, draws=3).values["log_prob"]
    by_hand = []
    for draw in range(3):
        x, log_det = again.forward(data.test, 5, draw << 40)
        by_hand.append(run.model.log_prob(x).double() + log_det)
    np.testing.assert_allclose(scores, torch.stack(by_hand).mean(0).detach(), rtol=1e-5)
    moved = data.test.numpy() + 0.01 * np.array(SPACINGS)  # no multiples: as they are
    found = nf.score(folder, moved, draws=3).values["log_prob"]
    x, log_det = again.exact(torch.from_numpy(moved))
    direct = run.model.log_prob(x.float()).double() + log_det
    np.testing.assert_allclose(found, direct.detach(), rtol=1e-5)


def test_a_table_with_one_integer_column_has_a_bounded_density(tmp_path):
    draw = np.random.default_rng(0)
    x = np.stack([draw.integers(0, 3, 800), draw.normal(size=800)], 1)
    _, run, _ = fitted(tmp_path, x, **{"recipe.epochs": 60, "recipe.patience": 60})
    best = -math.log(3) - 0.5 * math.log(2 * math.pi * math.e)  # of three cells of width 1
    assert best - 0.6 < run.held_out["NICE"].raw_log_prob < best + 0.1


def test_integers_on_a_scaled_grid_are_a_table(tmp_path):
    draw = np.random.default_rng(0)
    x = np.stack([5 * draw.integers(0, 9, 300), draw.integers(0, 9, 300)], 1)
    data, run, folder = fitted(tmp_path, x)
    assert (data.levels, data.train.dtype) == (None, torch.int32)
    assert run.preprocessing.spacing == (5, 1)
    assert np.isfinite(nf.score(folder, x).values["log_prob"]).all()
    np.testing.assert_array_equal(
        nf.score(folder, x).values["log_prob"], nf.score(folder, x * 1.0).values["log_prob"]
    )
    np.save(tmp_path / "plain.npy", x // [5, 1])
    assert load_data(tmp_path / "plain.npy").levels == 9


def test_constant_columns_of_real_tables_are_still_named(tmp_path):
    x = torch.from_numpy(np.insert(mixed(), 2, 7.0, axis=1))
    with pytest.raises(ValueError, match=r"1 of 6 features are constant .*: 2"):
        Preprocessing.fit(["dequantise", "standardise"], x)


def test_large_integers_are_not_rounded_before_they_are_scored():
    x = 123_456_789 + np.arange(200).reshape(100, 2)
    steps = Preprocessing.fit(["standardise"], torch.from_numpy(x * 1.0))
    model = nf.NICE(2, hidden=(8,), couplings=2)
    found = nf.score(model, x, preprocessing=steps).values["log_prob"]
    expected = nf.score(model, x * 1.0, preprocessing=steps).values["log_prob"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"spacing": ()}, TypeError, "spacing must be numbers, one for each column"),
        ({"spacing": (0, 0)}, ValueError, "spacing must be above 0 in some column"),
        ({"spacing": (1, -1)}, ValueError, "spacing must not be negative, got -1"),
        ({"spacing": (1, math.nan)}, ValueError, "spacing must be finite"),
        ({"spacing": (1, "a")}, TypeError, "spacing must be a number"),
        ({"spacing": (1,), "levels": 4}, ValueError, "without levels, got 4"),
    ],
)
def test_wrong_spacings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Dequantise(**{"levels": None, **options})
    made = Preprocessing((Dequantise(None, spacing=(1, 0)),))
    with pytest.raises(ValueError, match=r"rows must have 2 features, got shape \(3, 4\)"):
        made.forward(torch.zeros(3, 4))
