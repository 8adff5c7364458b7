"""nicefast.sklearn: validation rows that the caller brings, and what a fit prints."""

import re

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("safetensors", reason="needs safetensors")

from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nicefast.sklearn import NICEClassifier, NICEDensity, NICEOutlierDetector

QUICK = {"hidden": (8,), "couplings": 2, "epochs": 3, "random_state": 0}


@pytest.fixture(scope="module")
def rows():
    draw = np.random.RandomState(0).normal(size=(120, 3))
    return draw[:80], draw[80:], np.arange(80) % 2, np.arange(40) % 2


def test_given_rows_choose_the_epoch(rows):
    x, held, _, labels = rows
    for data in (held, (held, labels), (held, None), held.tolist()):
        made = NICEDensity(**QUICK).fit(x, validation_data=data)
        best = made.validation_scores_.max()
        assert best == pytest.approx(made.score(held), abs=1e-4)
    weights = np.random.RandomState(1).uniform(0, 3, 40)
    made = NICEDensity(**QUICK).fit(x, validation_data=(held, None, weights))
    best = made.validation_scores_.max()
    assert best == pytest.approx(made.score(held, sample_weight=weights), abs=1e-4)
    both = NICEDensity(**QUICK).fit(x, None, np.ones(80), validation_data=(held, None, weights))
    np.testing.assert_allclose(both.score_samples(x), made.score_samples(x), atol=1e-3)


def test_all_rows_are_trained_on_then(rows):
    x, held, _, _ = rows
    made = NICEDensity(**QUICK | {"epochs": 1}).fit(x, validation_data=held)
    other = NICEDensity(**QUICK | {"epochs": 1}, validation_fraction=0).fit(x)
    np.testing.assert_array_equal(made.score_samples(x), other.score_samples(x))


def test_detectors_classifiers_and_pipelines_take_them_too(rows):
    x, held, y, labels = rows
    detector = NICEOutlierDetector(**QUICK).fit(x, validation_data=held)
    density = NICEDensity(**QUICK).fit(x, validation_data=held)
    np.testing.assert_array_equal(detector.score_samples(x), density.score_samples(x))
    made = NICEClassifier(**QUICK | {"epochs": 1}).fit(x, y, validation_data=(held, labels))
    plain = NICEClassifier(**QUICK | {"epochs": 1}, validation_fraction=0).fit(x, y)
    joint = [one.predict_joint_log_proba(held) for one in (made, plain)]
    np.testing.assert_array_equal(*joint)
    pipeline = make_pipeline(StandardScaler(), NICEDensity(**QUICK))
    assert pipeline.fit(x, nicedensity__validation_data=held).score_samples(x).shape == (80,)


def test_wrong_validation_data_are_named(rows):
    x, held, y, labels = rows
    density, classifier = NICEDensity(**QUICK), NICEClassifier(**QUICK)
    nan = np.where(np.arange(40)[:, None] == 3, np.nan, held)
    for call, says in (
        (lambda: density.fit(x, validation_data=held[:, :2]), "X has 2 features, but NICEDensity"),
        (lambda: density.fit(x, validation_data=nan), "Input X contains NaN"),
        (lambda: density.fit(x, validation_data=(held,)), r"\(X, y\) or .*, got 1 values"),
        (lambda: density.fit(x, validation_data=(held, y, -labels)), "sample_weight must be"),
        (lambda: classifier.fit(x, y, validation_data=held), r"\(X, y\) or .*, got ndarray"),
        (lambda: classifier.fit(x, y, validation_data=(held, y)), "inconsistent numbers"),
        (lambda: classifier.fit(x, y, validation_data=(held, 0 * labels)), "got none of .*1"),
        (lambda: classifier.fit(x, y, validation_data=(held, 7 * labels)), "labels of y, got .*7"),
    ):
        with pytest.raises(ValueError, match="^validation_data.*" + says):
            call()


def test_verbose_prints_as_many_lines_as_it_says(rows, capsys):
    x = rows[0]
    options = QUICK | {"epochs": 21, "patience": 21}
    lines = {}
    for level in (0, 1, 2, False, True):
        NICEDensity(**options, verbose=level).fit(x)
        lines[str(level)] = capsys.readouterr().out.splitlines()
    assert lines["0"] == lines["False"] == []
    numbers = [re.findall(r"epoch (\d+):", line) for line in lines["1"]]
    assert numbers == [["1"], ["10"], ["20"], ["21"], []]
    assert re.search(r"\[NICE\] 21 epochs, the best was \d+: validation .* nats", lines["1"][-1])
    assert len(lines["2"]) == 22
    assert len(lines["True"]) == 5
    for wrong in (-1, 3, "a", None, 1.5):
        with pytest.raises(ValueError, match="verbose must be 0, 1 or 2, got"):
            NICEDensity(**QUICK, verbose=wrong).fit(x)
