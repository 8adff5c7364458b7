"""nicefast.sklearn: weights of rows, in fit and in score."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("safetensors", reason="needs safetensors")

from sklearn.datasets import load_iris
from sklearn.model_selection import cross_val_score

from nicefast.sklearn import NICEClassifier, NICEDensity
from nicefast.sklearn.fitted import fit_flow

QUICK = {"hidden": (8,), "couplings": 2, "epochs": 4, "random_state": 0}


def normal(n, seed=0, columns=3):
    x = np.random.RandomState(seed).normal(size=(n, columns))
    x[:, 1] += x[:, 0] ** 2
    return x


def test_rows_of_weight_zero_have_no_influence():
    x, odd = normal(60), np.arange(60) % 2
    far = np.where(odd[:, None], x, 1e6 * (1 + x))  # integers, outliers: all of it unseen
    labels = np.where(odd, np.arange(60) // 2 % 2, 7)
    one = NICEDensity(**QUICK).fit(x[odd == 1], sample_weight=np.full(30, 3.0))
    two = NICEDensity(**QUICK).fit(far, sample_weight=3.0 * odd)
    np.testing.assert_array_equal(one.score_samples(x), two.score_samples(x))
    for density in ("nice", "gaussian"):
        made = NICEClassifier(**QUICK, density=density)
        one = made.fit(x[odd == 1], labels[odd == 1], np.ones(30)).predict_proba(x)
        two = made.fit(far, labels, odd)
        assert two.classes_.tolist() == [0, 1]
        np.testing.assert_array_equal(one, two.predict_proba(x))


def test_the_scale_of_weights_does_not_matter():
    x, w = normal(60), np.random.RandomState(1).uniform(0.5, 2, 60)
    one, two = (NICEDensity(**QUICK).fit(x, sample_weight=a * w) for a in (1, 1024))
    np.testing.assert_array_equal(one.score_samples(x), two.score_samples(x))


def test_integer_weights_do_what_repeated_rows_do():
    x = normal(18)  # too few for a split: all rows are in one step
    w = np.arange(18) % 3
    one = NICEDensity(**QUICK).fit(x, sample_weight=w)
    two = NICEDensity(**QUICK, validation_fraction=0).fit(x.repeat(w, 0))
    np.testing.assert_allclose(
        one.preprocessing_.tensors["0.mean"], two.preprocessing_.tensors["0.mean"], atol=1e-12
    )
    np.testing.assert_allclose(one.score_samples(x), two.score_samples(x), atol=0.1)
    np.testing.assert_allclose(one.validation_scores_, two.validation_scores_, atol=0.02)
    y = np.arange(18) // 9
    three = NICEClassifier(density="gaussian").fit(x, y, w)
    four = NICEClassifier(density="gaussian").fit(x.repeat(w, 0), y.repeat(w))
    np.testing.assert_allclose(three.predict_log_proba(x), four.predict_log_proba(x), rtol=1e-7)
    np.testing.assert_allclose(three.class_prior_, four.class_prior_)


def test_weights_change_the_density_where_they_lie():
    x = np.concatenate([normal(150), normal(150, 1) + 4])
    first = np.repeat([1.0, 0.05], 150)
    scores = [
        NICEDensity(**QUICK | {"epochs": 15}).fit(x, sample_weight=w).score(x[:150])
        for w in (first, None, first[::-1])
    ]
    assert scores[0] > scores[1] > scores[2]


def test_the_validation_score_is_weighted():
    x, w = normal(100), np.random.RandomState(1).uniform(0, 5, 100)
    made = NICEDensity(**QUICK | {"epochs": 1}).fit(x, sample_weight=w)
    seed = np.random.RandomState(0).randint(2**31 - 1)
    held = fit_flow(x, np.zeros(3), made.get_params(), seed, weights=w).held
    assert len(held) == 10
    own = made.score(x[held], sample_weight=w[held])
    assert made.validation_scores_[0] == pytest.approx(own, abs=1e-4)
    assert abs(own - made.score(x[held])) > 1e-3


def test_score_is_the_weighted_mean():
    x, w = normal(50), np.random.RandomState(1).uniform(0, 5, 50)
    made = NICEDensity(**QUICK).fit(x)
    expected = (w * made.score_samples(x)).sum() / w.sum()
    assert made.score(x, sample_weight=w) == pytest.approx(expected)
    assert made.score(x, None, list(w)) == pytest.approx(expected)
    x, y = load_iris(return_X_y=True)
    classifier = NICEClassifier(density="gaussian").fit(x, y)
    right = classifier.predict(x) == y
    w = np.random.RandomState(1).uniform(0, 5, 150)
    assert classifier.score(x, y, w) == pytest.approx((w * right).sum() / w.sum())


def test_weights_go_through_cross_validation():
    x, w = normal(60), np.ones(60)
    made = NICEDensity(**QUICK)
    plain = cross_val_score(made, x, cv=2)
    weighted = cross_val_score(made, x, cv=2, params={"sample_weight": w})
    np.testing.assert_allclose(weighted, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (np.ones(29), r"one number a row, \(30,\), got \(29,\)"),
        (np.ones((30, 1)), r"one number a row, \(30,\), got \(30, 1\)"),
        (2.0, r"one number a row, \(30,\), got \(\)"),
        (np.r_[np.ones(29), np.nan], "finite and not negative, got nan in row 29"),
        (np.r_[np.inf, np.ones(29)], "finite and not negative, got inf in row 0"),
        (np.r_[1.0, -1.0, np.ones(28)], "finite and not negative, got -1.0 in row 1"),
        (np.zeros(30), "positive in some row, got a weight of zero in all"),
        (["a"] * 30, "must be numbers, got list"),
        (np.ma.array(np.ones(30), mask=np.arange(30) == 3), "has masked values"),
    ],
)
def test_wrong_weights_are_named(weights, says):
    x, y = normal(30), np.arange(30) % 2
    density, classifier = NICEDensity(**QUICK), NICEClassifier(density="gaussian")
    uses = [
        lambda: density.fit(x, sample_weight=weights),
        lambda: NICEClassifier(**QUICK).fit(x, y, weights),
        lambda: density.fit(x).score(x, sample_weight=weights),
        lambda: classifier.fit(x, y).score(x, y, weights),
    ]
    for use in uses:
        with pytest.raises((ValueError, TypeError), match="sample_weight.*" + says):
            use()


def test_one_row_with_a_weight_is_too_few():
    with pytest.raises(
        ValueError, match="sample_weight must be above zero in 2 rows or more, got 1"
    ):
        NICEDensity(**QUICK).fit(normal(30), sample_weight=np.arange(30) == 3)
