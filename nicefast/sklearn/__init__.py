"""NICE flows as scikit-learn estimators, for Pipeline, GridSearchCV and clone. Needs scikit-learn.

density      NICEDensity: beside KernelDensity and GaussianMixture
outliers     NICEOutlierDetector: a density with a threshold, beside IsolationForest
classifier   NICEClassifier: Bayes' rule over one density for each class
perclass     its densities, fitted in turn
calibration  the temperature of a classifier's probabilities
weights      weights of rows and of classes
validation   rows that the caller brings to choose the epoch by
columns      integer columns and their noise, constant columns and their names
fitted       fitted densities of raw rows, to safetensors bytes and back
"""

from __future__ import annotations

try:
    from sklearn.utils.validation import validate_data  # noqa: F401  (of 1.6)
except ImportError:
    raise ImportError(
        "nicefast.sklearn needs scikit-learn 1.6 or later: pip install 'nicefast[train]'"
    ) from None

from .classifier import NICEClassifier
from .density import NICEDensity
from .outliers import NICEOutlierDetector

__all__ = ["NICEClassifier", "NICEDensity", "NICEOutlierDetector"]
