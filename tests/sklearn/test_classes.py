"""NICEClassifier: weights and priors of classes, the rows it is validated and calibrated by."""

import pickle

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("safetensors", reason="needs safetensors")

from nicefast.sklearn import NICEClassifier
from nicefast.sklearn.calibration import temperature

QUICK = {"hidden": (8,), "couplings": 2, "epochs": 3, "random_state": 0}


def two_classes(n=(90, 30), seed=0, apart=1.5, columns=3):
    draw = np.random.RandomState(seed)
    y = np.repeat(["few" if count < 60 else "many" for count in n], n)
    return draw.normal(size=(sum(n), columns)) + apart * (y == "few")[:, None], y


@pytest.mark.parametrize("density", ["nice", "gaussian"])
def test_class_weights_are_the_priors_ratio_and_change_no_density(density):
    x, y = two_classes()
    made = {
        name: NICEClassifier(**QUICK, density=density, **options).fit(x, y)
        for name, options in {
            "plain": {},
            "balanced": {"class_weight": "balanced"},
            "uniform": {"priors": "uniform"},
            "dict": {"class_weight": {"few": 3}},
            "both": {"class_weight": {"few": 100}, "priors": [0.25, 0.75]},
        }.items()
    }
    assert made["plain"].classes_.tolist() == ["few", "many"]
    for name, expected in {
        "plain": [0.25, 0.75],
        "balanced": [0.5, 0.5],
        "uniform": [0.5, 0.5],
        "dict": [0.5, 0.5],
        "both": [0.25, 0.75],
    }.items():
        np.testing.assert_allclose(made[name].class_prior_, expected)
        densities = made[name].predict_joint_log_proba(x) - np.log(expected)
        plain = made["plain"].predict_joint_log_proba(x) - np.log([0.25, 0.75])
        np.testing.assert_allclose(densities, plain, rtol=1e-12)
    np.testing.assert_allclose(
        made["balanced"].predict_proba(x), made["uniform"].predict_proba(x), atol=1e-12
    )
    np.testing.assert_array_equal(made["both"].predict(x), made["plain"].predict(x))


def test_class_weights_multiply_sample_weights():
    x, y = two_classes()
    w = np.where(y == "few", 3.0, 1.0)
    made = NICEClassifier(**QUICK, class_weight={"few": 2}).fit(x, y, w)
    np.testing.assert_allclose(made.class_prior_, [180 / 270, 90 / 270])
    made = NICEClassifier(**QUICK, class_weight="balanced").fit(x, y, w)
    np.testing.assert_allclose(made.class_prior_, [0.5, 0.5])
    assert NICEClassifier(**QUICK, class_weight={"few": 0}).fit(x, y).class_prior_[0] == 0


def nats(joint, labels, temperature):
    scores = joint / temperature
    scores = scores - scores.max(1, keepdims=True)
    return (np.log(np.exp(scores).sum(1)) - scores[np.arange(len(labels)), labels]).mean()


def test_the_temperature_is_the_best_one():
    draw = np.random.RandomState(0)
    logits = draw.normal(size=(4000, 4)) * 2
    labels = (logits + draw.gumbel(size=(4000, 4))).argmax(1)  # these logits are calibrated
    for scale in (0.1, 1.0, 7.0, 300.0):
        found = temperature(scale * logits, labels)
        assert found == pytest.approx(scale, rel=0.06)
        best = nats(scale * logits, labels, found)
        assert best <= min(nats(scale * logits, labels, found * f) for f in (0.97, 1.03))


def test_the_temperature_of_few_rows():
    right = np.array([[50.0, 0.0], [0.0, 40.0], [60.0, 0.0]])
    labels = np.array([0, 1, 0])
    assert 1 < temperature(right, labels) < 50  # all are right: not as sure as can be
    assert temperature(right, 1 - labels) > 1000  # all are wrong
    assert temperature(right[:0], labels[:0]) == 1.0
    assert temperature(right, labels, np.zeros(3)) == 1.0
    never = np.insert(right, 2, -np.inf, 1)
    assert temperature(never, labels) == temperature(right, labels)
    assert temperature(never, np.full(3, 2)) == 1.0
    tripled = temperature(right[:2], np.array([0, 0]), np.array([3.0, 1.0]))
    assert 1 < tripled < temperature(right[:2], np.array([0, 0]))


def test_probabilities_are_cooled_and_predictions_stay():
    x, y = two_classes((80, 50), apart=0.35, columns=20)
    options = QUICK | {"epochs": 60, "weight_decay": 0.0, "hidden": (64,), "patience": 60}
    hot = NICEClassifier(**options, calibrate=False).fit(x, y)
    cool = NICEClassifier(**options).fit(x, y)
    test, _ = two_classes((300, 59), seed=1, apart=0.35, columns=20)
    truth = np.repeat([1, 0], [300, 59])
    assert hot.temperature_ == 1.0 < cool.temperature_
    np.testing.assert_array_equal(hot.predict(test), cool.predict(test))
    surest = cool.classes_[cool.predict_proba(test).argmax(1)]
    np.testing.assert_array_equal(surest, cool.predict(test))
    np.testing.assert_array_equal(hot.decision_function(test), cool.decision_function(test))
    joint = cool.predict_joint_log_proba(test)
    expected = nats(joint, truth, cool.temperature_)
    found = -cool.predict_log_proba(test)[np.arange(359), truth].mean()
    assert found == pytest.approx(expected)
    assert expected < nats(joint, truth, 1.0)


def test_the_temperature_is_of_rows_that_nobody_was_trained_on():
    x, y = two_classes((100, 30))
    made = NICEClassifier(**QUICK).fit(x, y)
    assert made.temperature_ != 1.0
    assert NICEClassifier(**QUICK, validation_fraction=0).fit(x, y).temperature_ == 1.0
    assert NICEClassifier(**QUICK, density="gaussian").fit(x, y).temperature_ == 1.0
    held = two_classes((80, 20), seed=3)
    given = NICEClassifier(**QUICK, validation_fraction=0, priors="uniform")
    given.fit(x, y, validation_data=held)
    number = (held[1] == "many").astype(int)
    joint = given.predict_joint_log_proba(held[0])
    weights = np.where(number, 1 / 80, 1 / 20)
    expected = temperature(joint, number, weights)
    assert given.temperature_ == pytest.approx(expected)
    twice = given.fit(x, y, validation_data=(*held, np.where(number, 5.0, 3.0)))
    assert twice.temperature_ == pytest.approx(expected)  # a class counts by its prior
    gaussian = NICEClassifier(density="gaussian").fit(x, y, validation_data=held)
    assert gaussian.temperature_ != 1.0


def test_a_pickle_keeps_the_temperature_and_an_old_one_has_none():
    x, y = two_classes()
    made = NICEClassifier(**QUICK).fit(x, y)
    again = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(again.predict_proba(x), made.predict_proba(x))
    state = made.__getstate__()
    for name in ("temperature_", "calibrate", "class_weight"):
        del state[name]
    old = NICEClassifier.__new__(NICEClassifier)
    old.__setstate__(state)
    assert old.temperature_ == 1.0
    assert old.get_params()["class_weight"] is None
