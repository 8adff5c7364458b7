"""Fitting a flow to a data set.

configuration   all that decides a fit, to TOML and back
presets         fits that have a name: the paper's, the released code's, ours
fitting         Recipe and fit: epochs, validation, the best weights, resumption
steps           one step; on a GPU a CUDA graph
optimisers      optimisers, learning rates, the weights' moving average
snapshots       what an interrupted fit goes on from
"""

from .beginnings import init_scaling, initialise
from .configuration import Configuration
from .epochs import Epoch
from .fitting import History, fit
from .presets import PRESETS, Preset
from .recipe import Recipe

__all__ = [
    "PRESETS",
    "Configuration",
    "Epoch",
    "History",
    "Preset",
    "Recipe",
    "fit",
    "init_scaling",
    "initialise",
]
