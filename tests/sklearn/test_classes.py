"""NICEClassifier: weights and priors of classes, the rows it is validated and calibrated by."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("safetensors", reason="needs safetensors")

from nicefast.sklearn import NICEClassifier

QUICK = {"hidden": (8,), "couplings": 2, "epochs": 3, "random_state": 0}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of such small products
    yield
    torch.set_num_threads(before)


def two_classes(n=(90, 30), seed=0, apart=1.5):
    draw = np.random.RandomState(seed)
    y = np.repeat(["few" if count < 60 else "many" for count in n], n)
    return draw.normal(size=(sum(n), 3)) + apart * (y == "few")[:, None], y


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
