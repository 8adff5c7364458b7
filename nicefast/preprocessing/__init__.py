"""From raw rows to what a flow sees, by steps that are invertible and recorded.

pipeline     Preprocessing: steps in order, fitted, saved, with their log-determinant
transforms   dequantise, rescale, logit, standardise
whitening    ZCA, PCA and approximate whitening
moments      means and covariances in one pass
"""

from .pipeline import Preprocessing, bits_per_dim
from .transforms import Dequantise, Logit, Rescale, Standardise
from .whitening import Whiten

__all__ = [
    "Dequantise",
    "Logit",
    "Preprocessing",
    "Rescale",
    "Standardise",
    "Whiten",
    "bits_per_dim",
]
