"""NICEOutlierDetector: thresholds, signs, weights, pickles."""

import pickle

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("safetensors", reason="needs safetensors")

from sklearn.base import clone, is_outlier_detector
from sklearn.exceptions import NotFittedError

from nicefast.sklearn import NICEDensity, NICEOutlierDetector
from nicefast.sklearn.outliers import below, fence

QUICK = {"hidden": (8,), "couplings": 2, "epochs": 8, "random_state": 0}


@pytest.fixture(scope="module")
def x():
    draw = np.random.RandomState(0).normal(size=(300, 3))
    draw[:6] += 12
    return draw


def test_the_share_is_flagged_and_it_is_the_lowest(x):
    detector = NICEOutlierDetector(**QUICK, contamination=0.02).fit(x)
    flags, scores = detector.predict(x), detector.score_samples(x)
    assert set(np.flatnonzero(flags == -1)) == set(range(6))
    assert scores[flags == -1].max() < detector.offset_ < scores[flags == 1].min()
    np.testing.assert_array_equal(detector.decision_function(x), scores - detector.offset_)
    np.testing.assert_array_equal(clone(detector).fit_predict(x), flags)
    for share in (1 / 300, 0.1, 0.29, 0.5):
        flagged = NICEOutlierDetector(**QUICK, contamination=share).fit_predict(x) == -1
        assert flagged.sum() == round(300 * share)


def test_auto_finds_what_is_far_out_and_little_else(x):
    detector = NICEOutlierDetector(**QUICK).fit(x)
    flags = detector.predict(x)
    assert (flags[:6] == -1).all()
    assert (flags[6:] == -1).mean() < 0.08
    # another unit of the columns changes nothing
    scaled = clone(detector).fit(1024 * x)
    np.testing.assert_array_equal(scaled.predict(1024 * x), flags)
    assert scaled.offset_ == pytest.approx(detector.offset_ - 3 * np.log(1024), abs=1e-3)


def test_it_is_the_density_with_a_threshold(x):
    detector = NICEOutlierDetector(**QUICK).fit(x)
    density = NICEDensity(**QUICK).fit(x)
    np.testing.assert_array_equal(detector.score_samples(x), density.score_samples(x))
    assert is_outlier_detector(detector)
    own = {"contamination": "auto"}
    assert NICEOutlierDetector().get_params() == own | NICEDensity().get_params()
    again = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(again.predict(x), detector.predict(x))
    with pytest.raises(NotFittedError):
        NICEOutlierDetector().predict(x)


def test_rows_count_by_their_weight():
    scores, weights = np.array([3.0, 1.0, 2.0, 4.0, -9.0]), np.array([3, 1, 2, 4, 0])
    many = scores.repeat(weights)
    for share in (0.05, 0.1, 0.3, 0.4, 0.5):
        assert below(scores, weights, share) == below(many, np.ones(10), share)
        assert (many < below(many, np.ones(10), share)).mean() <= share
    assert fence(scores, weights) == fence(many, np.ones(10))
    x = np.random.RandomState(0).normal(size=(40, 2))
    w = np.where(np.arange(40) < 20, 3.0, 1.0)
    flags = NICEOutlierDetector(**QUICK, contamination=0.1).fit(x, sample_weight=w).predict(x)
    assert 0.04 < w[flags == -1].sum() / w.sum() <= 0.1


def test_tied_scores_are_not_parted():
    assert below(np.array([1.0, 1.0, 1.0, 2.0]), np.ones(4), 0.5) == 1.0  # nothing is below
    assert below(np.zeros(4), np.ones(4), 0.5) == 0.0


@pytest.mark.parametrize("share", [0, 0.51, -0.1, "Auto", None, True, float("nan"), [0.1]])
def test_a_wrong_contamination_is_named(share, x):
    with pytest.raises(ValueError, match=r"contamination must be \'auto\' or in \(0, 0.5\], got"):
        NICEOutlierDetector(**QUICK, contamination=share).fit(x)
