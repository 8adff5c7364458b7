"""nicefast.sklearn: the estimators' contracts, integer and constant columns, pickles, the table."""

import json
import pickle
import pickletools
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("safetensors", reason="needs safetensors")

from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from nicefast.data import load_data
from nicefast.sklearn import NICEClassifier, NICEDensity, NICEOutlierDetector
from nicefast.sklearn.columns import labels, noise_spacings, with_noise

QUICK = {"hidden": (8,), "couplings": 2, "epochs": 2, "random_state": 0}
#: checks of scikit-learn's that are expected to fail, with the reason; test_sample_weight has ours
EXCLUDED: dict[str, dict[str, str]] = {
    "NICEClassifier": {
        "check_sample_weight_equivalence_on_dense_data": "a class of one row has no density"
    },
    "NICEOutlierDetector": {
        "check_sample_weight_equivalence_on_dense_data": "random minibatches and validation rows"
    },
}


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


def table(n=200, seed=0):
    """A count, a coin, a real value and the real value's noisy double."""
    draw = np.random.RandomState(seed)
    x = draw.normal(size=n)
    return np.column_stack(
        [draw.poisson(5, n), draw.randint(0, 2, n), x, 2 * x + draw.normal(size=n)]
    )


def test_what_is_masked_is_missing(iris):
    """Masked values are refused as NaN is: what lies under the mask is no value."""
    x, y = iris
    mask = np.zeros(x.shape, bool)
    mask[3, 1] = True
    masked, whole = np.ma.array(x, mask=mask), np.ma.array(x, mask=np.zeros_like(mask))
    counts = np.ma.array(np.rint(10 * x).astype(int), mask=mask)
    rows = [np.ma.array(row, mask=hidden) for row, hidden in zip(x, mask, strict=True)]
    density, classifier = NICEDensity(**QUICK).fit(x), NICEClassifier(density="gaussian").fit(x, y)
    for bad in (masked, counts, rows, masked.astype(object)):
        for use in (
            NICEDensity(**QUICK).fit, density.score_samples, density.score,
            lambda z: NICEClassifier(**QUICK).fit(z, y), classifier.predict,
            classifier.predict_proba, classifier.predict_log_proba, classifier.decision_function,
            classifier.predict_joint_log_proba, lambda z: classifier.score(z, y),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="Input X contains NaN"):
                use(bad)
    hidden = np.ma.array(y, mask=mask[:, 1])
    for use in (NICEClassifier(**QUICK).fit, classifier.score):
        with pytest.raises(ValueError, match="Input y has masked values"):
            use(x, hidden)
    with pytest.raises(ValueError, match="Input priors has masked values"):
        NICEClassifier(priors=np.ma.array([0.2, 0.3, 0.5], mask=[0, 1, 0])).fit(x, y)
    with pytest.raises(ValueError, match="Input sample_weight has masked values"):
        classifier.score(x, y, np.ma.array(np.ones(len(x)), mask=mask[:, 1]))
    assert np.array_equal(density.score_samples(whole), density.score_samples(x))
    assert np.array_equal(classifier.predict(whole), classifier.predict(x))
    assert classifier.score(x, np.ma.array(y)) == classifier.score(x, y)


@pytest.mark.parametrize(
    "estimator",
    [
        NICEDensity(**QUICK),
        NICEDensity(**QUICK, standardise=False, dequantise=False),
        NICEClassifier(**QUICK),
        NICEClassifier(density="gaussian"),
        NICEOutlierDetector(**QUICK),
    ],
    ids=["density", "density-plain", "classifier", "classifier-gaussian", "outliers"],
)
def test_scikit_learns_checks(estimator):
    passed = 0
    excluded = EXCLUDED.get(type(estimator).__name__)
    checks = estimator_checks_generator(estimator, expected_failed_checks=excluded, mark="skip")
    for one, check in checks:
        try:
            check(one)
            passed += 1
        except pytest.skip.Exception:
            raise
        except Exception as problem:
            if type(problem).__name__ != "SkipTest":  # what needs pandas or an array API
                raise
    assert passed >= 35


def test_defaults_can_be_checked_and_are_passed_through():
    density, classifier = NICEDensity().get_params(), NICEClassifier().get_params()
    own = {"density", "priors", "class_weight", "reg", "calibrate"}
    shared = density | {"weight_decay": "auto"}
    assert {k: v for k, v in classifier.items() if k not in own} == shared
    made = NICEDensity(**QUICK, lr=1e-2)
    assert clone(made).get_params() == made.get_params()
    assert made.set_params(lr=1e-4).lr == 1e-4


def test_density_integrates_to_one():
    x = np.random.RandomState(0).normal(size=(300, 2)) * [1, 20] + [5, -100]
    density = NICEDensity(**QUICK | {"epochs": 5}).fit(x)
    sides = [np.linspace(-6, 16, 200), np.linspace(-320, 120, 200)]
    grid = np.stack(np.meshgrid(*sides), -1).reshape(-1, 2)
    cell = np.prod([side[1] - side[0] for side in sides])
    assert np.exp(density.score_samples(grid)).sum() * cell == pytest.approx(1, abs=0.01)


def test_fits_better_than_a_gaussian_where_it_should():
    draw = np.random.RandomState(0)
    x = draw.normal(size=(1200, 2))
    x[:, 1] = x[:, 0] ** 2 + 0.1 * x[:, 1]  # a bow
    density = NICEDensity(hidden=(32,), couplings=4, epochs=60, random_state=0).fit(x[:1000])
    gaussian = GaussianMixture(random_state=0).fit(x[:1000])
    assert density.score(x[1000:]) > gaussian.score(x[1000:]) + 0.5
    assert len(density.validation_scores_) == density.n_iter_ <= 60
    assert density.validation_scores_.max() == pytest.approx(density.score(x), abs=0.5)


def test_score_is_the_mean_and_like_the_model_itself(iris):
    x = iris[0] + np.random.RandomState(0).uniform(0, 0.1, iris[0].shape)  # real values
    density = NICEDensity(**QUICK).fit(x)
    scores = density.score_samples(x)
    assert scores.dtype == np.float64
    assert scores.shape == (len(x),)
    assert density.score(x) == pytest.approx(scores.mean())
    z, log_det = density.preprocessing_.exact(torch.from_numpy(x))
    direct = density.model_.log_prob(z) + log_det
    np.testing.assert_allclose(scores, direct.detach().numpy(), rtol=1e-12)
    narrow = NICEDensity(**QUICK, dtype="float32").fit(x).score_samples(x)
    np.testing.assert_allclose(narrow, scores, atol=1e-4)


def test_same_seed_same_density_and_global_states_are_left_alone(iris):
    x, _ = iris
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    a, b = (NICEDensity(**QUICK).fit(x).score_samples(x) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numbers)
    assert not np.array_equal(NICEDensity(**QUICK | {"random_state": 1}).fit(x).score_samples(x), a)


def test_only_integer_columns_get_noise():
    x = table()
    density = NICEDensity(**QUICK).fit(x)
    assert density.integer_columns_.tolist() == [0, 1]
    y = with_noise(x, density.spacings_)
    np.testing.assert_array_equal(np.floor(y[:, :2]), x[:, :2])
    np.testing.assert_array_equal(y[:, 2:], x[:, 2:])
    # rows that have their noise already are scored as they are
    np.testing.assert_array_equal(density.score_samples(y), density.score_samples(x))
    assert NICEDensity(**QUICK, dequantise=False).fit(x).integer_columns_.tolist() == []
    with pytest.raises(ValueError, match=r"integers in every column, got .* in column 2"):
        NICEDensity(**QUICK, dequantise=True).fit(x)
    with pytest.raises(ValueError, match="dequantise must be 'auto', True or False, got 'yes'"):
        NICEDensity(**QUICK, dequantise="yes").fit(x)


def test_noise_is_the_rows_own_and_uniform():
    x = np.arange(20_000.0).reshape(-1, 2)
    u = with_noise(x, np.ones(2)) - x
    assert (u >= 0).all()
    assert (u < 1).all()
    assert u.mean() == pytest.approx(0.5, abs=0.01)
    assert u.var() == pytest.approx(1 / 12, abs=0.002)
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.03
    np.testing.assert_array_equal(with_noise(x[::-1], np.ones(2))[::-1], x + u)
    assert not np.array_equal(with_noise(x, np.ones(2), draw=1), x + u)


def test_large_floats_are_no_integers():
    x = np.array([[1e15, 1.0], [2e15, 3.0]])
    assert noise_spacings(x, "auto", labels(None)).tolist() == [0, 1]


def test_score_over_several_draws_is_their_mean():
    x = table()
    one = NICEDensity(**QUICK).fit(x)
    scores = [one._flow.log_prob(with_noise(x, one.spacings_, draw)) for draw in range(3)]
    np.testing.assert_allclose(
        one.set_params(noise_draws=3).score_samples(x), np.mean(scores, 0), rtol=1e-12
    )
    with pytest.raises(ValueError, match="noise_draws must be an integer >= 1, got 0"):
        one.set_params(noise_draws=0).score_samples(x)


def test_samples_are_on_the_tables_own_scale():
    x = table(500) * [1, 1, 1, 100]
    density = NICEDensity(**QUICK | {"epochs": 20}).fit(x)
    drawn = density.sample(2000, random_state=0)
    np.testing.assert_array_equal(drawn[:, :2], np.floor(drawn[:, :2]))
    np.testing.assert_allclose(drawn.mean(0), x.mean(0), atol=0.3 * x.std(0).max())
    spread = np.delete(drawn.std(0) / x.std(0), 1)  # of a coin's two values a flow makes a hill
    np.testing.assert_allclose(spread, 1, atol=0.2)
    np.testing.assert_array_equal(density.sample(2000, random_state=0), drawn)
    assert density.sample().shape == (1, 4)


def test_constant_columns_are_refused_by_name_or_dropped():
    x = np.insert(table(), [1, 3], [7.0, 0.1], axis=1)
    with pytest.raises(ValueError, match=r"2 of 6 columns are constant .* column 1, column 4"):
        NICEDensity(**QUICK).fit(x)
    density = NICEDensity(**QUICK, drop_constant=True).fit(x)
    assert density.dropped_.tolist() == [1, 4]
    assert density.integer_columns_.tolist() == [0, 2]
    assert density.model_.features == 4
    assert (density.sample(3)[:, [1, 4]] == [7.0, 0.1]).all()
    with pytest.raises(ValueError, match=r"n_features = 1 after 1 constant"):
        NICEDensity(drop_constant=True).fit(x[:, :2])


def test_names_of_a_data_frame_are_kept_and_used():
    pd = pytest.importorskip("pandas", reason="needs pandas")
    frame = pd.DataFrame(np.insert(table(), 4, 1.0, axis=1), columns=list("abcde"))
    with pytest.raises(ValueError, match=r"'e' \(column 4\)"):
        NICEDensity(**QUICK).fit(frame)
    density = NICEDensity(**QUICK, drop_constant=True).fit(frame)
    assert density.dropped_.tolist() == ["e"]
    assert density.feature_names_in_.tolist() == list("abcde")


def test_names_are_used_in_messages():
    assert labels(np.array(["width"]))(0) == "'width' (column 0)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be positive and finite, got -1.0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1"),
        ({"dtype": "float16"}, "dtype must be one of float64, float32, got 'float16'"),
        ({"prior": "cauchy"}, "prior"),
        ({"couplings": 0}, "couplings must be"),
        ({"couplings": True}, "couplings must be an integer >= 1, got True"),
        ({"hidden": None}, "hidden must be integers >= 1, got None"),
        ({"hidden": (1.5,)}, r"hidden must be integers >= 1, got \(1.5,\)"),
        ({"partition": 3}, "partition must be a name"),
        ({"activation": ["relu"]}, "activation must be one of"),
        ({"dropout": "a"}, "dropout must be a number"),
        ({"validation_fraction": None}, "validation_fraction must be at least 0"),
        ({"dtype": ["float32"]}, "dtype must be one of float64, float32"),
        ({"device": 1.5}, "device must be a device or its name, got float"),
        ({"device": "a"}, "device 'a' cannot be used here"),
        ({"lr": True}, "lr must be a number, got True"),
    ],
)
def test_wrong_hyperparameters_are_named(options, message, iris):
    with pytest.raises((ValueError, TypeError), match=message):
        NICEDensity(**QUICK | options).fit(iris[0])


@pytest.mark.parametrize("count", [-1, 1.5, None, True])
def test_a_number_of_samples_is_named(count, iris):
    density = NICEDensity(**QUICK).fit(iris[0])
    with pytest.raises(ValueError, match="n_samples must be an integer >= 0, got "):
        density.sample(count)


def test_numpy_numbers_will_do(iris):
    options = {"epochs": np.int64(1), "lr": np.float32(1e-3), "couplings": np.int32(2)}
    assert NICEDensity(**QUICK | options, verbose=np.False_).fit(iris[0]).n_iter_ == 1


def test_tiny_tables():
    x = table(3)
    x[:, 1] = [0, 1, 1]
    for n in (2, 3):
        assert np.isfinite(NICEDensity(**QUICK).fit(x[:n]).score_samples(x)).all()
    with pytest.raises(ValueError, match="1 sample"):
        NICEDensity(**QUICK).fit(x[:1])
    with pytest.raises(ValueError, match="1 feature"):
        NICEDensity(**QUICK).fit(x[:, :1])


@pytest.mark.parametrize("options", [{}, {"density": "gaussian"}])
def test_pickles_hold_safetensors_and_no_tensors(options, iris):
    x, y = iris
    made = [NICEClassifier(**QUICK, **options).fit(x, y)]
    if not options:
        made.append(NICEDensity(**QUICK).fit(np.column_stack([x, np.arange(150)])))
    for estimator in made:
        given = x if x.shape[1] == estimator.n_features_in_ else np.insert(x, 4, 3, axis=1)
        content = pickle.dumps(estimator)
        named = [
            str(argument)
            for code, argument, _ in pickletools.genops(content)
            if code.name in {"GLOBAL", "SHORT_BINUNICODE", "BINUNICODE"}
        ]
        assert not any("torch" in name for name in named)
        again = pickle.loads(content)
        method = "predict_proba" if hasattr(estimator, "classes_") else "score_samples"
        expected = getattr(estimator, method)(given)
        np.testing.assert_array_equal(getattr(again, method)(given), expected)
        assert again.get_params() == estimator.get_params()
    unfitted = pickle.loads(pickle.dumps(NICEDensity(epochs=3)))
    assert unfitted.epochs == 3
    with pytest.raises(NotFittedError):
        unfitted.score_samples(x)


def test_pipeline_and_grid_search(iris):
    x, y = iris
    pipeline = make_pipeline(StandardScaler(), NICEDensity(**QUICK))
    search = GridSearchCV(pipeline, {"nicedensity__couplings": [2, 3]}, cv=2).fit(x)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.score_samples(x).shape == (150,)
    grid = {"density": ["nice", "gaussian"], "priors": [None, (0.2, 0.3, 0.5)]}
    search = GridSearchCV(NICEClassifier(**QUICK), grid, cv=2).fit(x, y)
    assert search.best_score_ > 0.9


def test_classifier_is_bayes_rule(iris):
    x, y = iris
    x = np.round(10 * x)  # millimetres: integers
    for density in ("nice", "gaussian"):
        nice = NICEClassifier(**QUICK, density=density).fit(x, np.array(["a", "b", "c"])[y])
        joint = nice.predict_joint_log_proba(x)
        noised = with_noise(x, nice.spacings_)
        own = np.stack([d.log_prob(noised) for d in nice._densities], 1)
        np.testing.assert_allclose(joint, own + np.log(1 / 3))
        cool = np.exp((joint - joint.max(1, keepdims=True)) / nice.temperature_)
        proba = cool / cool.sum(1, keepdims=True)
        np.testing.assert_allclose(nice.predict_proba(x), proba, atol=1e-12)
        np.testing.assert_allclose(np.exp(nice.predict_log_proba(x)), proba, atol=1e-12)
        assert (nice.predict(x) == nice.classes_[proba.argmax(1)]).all()
        assert nice.classes_.tolist() == ["a", "b", "c"]
        assert nice.score(x, nice.classes_[y]) > 0.9
        sure = clone(nice).set_params(priors=[0, 0, 1]).fit(x, y)
        assert (sure.predict(x) == 2).all()
        assert (sure.predict_proba(x)[:, 2] == 1).all()


def test_gaussian_classes_are_those_of_maximum_likelihood():
    x, y = load_breast_cancer(return_X_y=True)
    x = x[:, :5]
    nice = NICEClassifier(density="gaussian", reg=0).fit(x, y)
    x = with_noise(x, nice.spacings_)
    for k in (0, 1):
        gaussian = GaussianMixture(reg_covar=0).fit(x[y == k])
        np.testing.assert_allclose(
            nice._densities[k].log_prob(x), gaussian.score_samples(x), rtol=1e-6
        )
    assert nice.score(x, y) > GaussianNB().fit(x, y).score(x, y) - 0.02
    assert nice.decision_function(x).shape == (len(x),)


def test_classes_share_what_is_integer_and_what_is_constant():
    x, y = table(), np.repeat([0, 1], 100)
    x[:100, 1], x[:100, 0] = 0, 3  # constant in a class, but integers
    nice = NICEClassifier(**QUICK).fit(x, y)
    assert nice.integer_columns_.tolist() == [0, 1]
    assert np.isfinite(nice.predict_joint_log_proba(x)).all()
    x[:100, 2] = 0.5
    with pytest.raises(ValueError, match=r"column 2 is constant within class .*0"):
        NICEClassifier(**QUICK).fit(x, y)
    assert NICEClassifier(density="gaussian").fit(x, y).score(x, y) > 0.9
    with pytest.raises(ValueError, match=r"class .*0.*singular; give a larger reg"):
        NICEClassifier(density="gaussian", reg=0).fit(x, y)
    constant = np.insert(x, 4, 2.5, axis=1)
    with pytest.raises(ValueError, match=r"1 of 5 columns are constant .* column 4"):
        NICEClassifier(density="gaussian").fit(constant, y)
    made = NICEClassifier(density="gaussian", drop_constant=True).fit(constant, y)
    assert made.dropped_.tolist() == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": "kernel"}, "density must be one of nice, gaussian, got 'kernel'"),
        ({"priors": [0.5, 0.5]}, "priors must be 3, one a class"),
        ({"priors": [0.5, 0.6, -0.1]}, "priors must not be negative and add up to 1"),
        ({"reg": -1.0}, "reg must be non-negative and finite, got -1.0"),
        ({"reg": "a"}, "reg must be non-negative and finite, got 'a'"),
        ({"reg": None}, "reg must be non-negative and finite, got None"),
        ({"density": None}, "density must be one of nice, gaussian, got None"),
        ({"priors": "a"}, "priors must be numbers, 'uniform' or None, got 'a'"),
        ({"weight_decay": "a"}, "weight_decay must be one of auto, got 'a'"),
        ({"weight_decay": -1.0}, "weight_decay must be non-negative and finite, got -1.0"),
        ({"class_weight": "a"}, "class_weight must be None, 'balanced' or a dict, got 'a'"),
        ({"class_weight": [1, 2, 3]}, "class_weight must be None, 'balanced' or a dict"),
        ({"class_weight": {7: 1.0}}, r"class_weight must have labels of y, \[0, 1, 2\], got 7"),
        ({"class_weight": {0: -1.0}}, "finite and not negative, got -1.0 for 0"),
        ({"class_weight": {0: "a"}}, "class_weight must be numbers, got 'a' for 0"),
        ({"class_weight": {0: 0, 1: 0, 2: 0}}, "positive for some class, got zero for all"),
    ],
)
def test_wrong_hyperparameters_of_the_classifier_are_named(options, message, iris):
    with pytest.raises((ValueError, TypeError), match=message):
        NICEClassifier(**QUICK, **options).fit(*iris)


def test_a_class_of_one_row_is_named(iris):
    x, y = iris
    with pytest.raises(ValueError, match=r"class .*7.* has 1 sample"):
        NICEClassifier(**QUICK).fit(x, np.where(np.arange(150) == 3, 7, y))


def test_nothing_imports_scikit_learn_unasked():
    code = "import sys, nicefast; assert not {'sklearn', 'nicefast.sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_tables_where_present():
    try:
        data = load_data("shuttle")
    except ValueError as why:
        pytest.skip(str(why))
    x = data.train[:500].numpy()
    density = NICEDensity(**QUICK, drop_constant=True).fit(x)
    assert len(density.integer_columns_) == density.model_.features
    assert np.isfinite(density.score_samples(data.test[:200].numpy())).all()


def test_the_table_says_what_was_measured(tmp_path, monkeypatch):
    from bench import tabular

    draw = np.random.RandomState(0)
    small = lambda return_X_y: (draw.normal(size=(120, 3)), draw.randint(0, 2, 120))  # noqa: E731
    monkeypatch.setattr(tabular, "SMALL", {"digits": ("Digits", small)})
    monkeypatch.setattr(tabular, "QUICK_FIT", {"hidden": (4,), "couplings": 2, "epochs": 1})
    (tmp_path / "data").mkdir()
    np.savez(
        tmp_path / "data" / "adbench_shuttle.npz",
        X=draw.poisson(9, size=(300, 3)).astype(np.int16),
        y=draw.randint(0, 2, 300),
    )
    args = ["--quick", "--seeds", "2", "--data-dir", str(tmp_path / "data")]
    assert tabular.main([*args, "--out", str(tmp_path)]) == 0
    records = [json.loads(text) for text in (tmp_path / "results.ndjson").read_text().splitlines()]
    assert {r["task"] for r in records} == {"density", "anomalies", "classification"}
    assert {r["data"] for r in records} == {"digits", "shuttle"}
    text = (tmp_path / "table.md").read_text()
    for name in ("NICEDensity", "KernelDensity", "IsolationForest", "QDA", "GaussianNB", "**"):
        assert name in text
