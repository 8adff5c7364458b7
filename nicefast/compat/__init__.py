"""Flows that people already have, from nflows, normflows, zuko, FrEIA and torch.distributions.

    replacing      accelerate and restore: a peer's couplings made fast where they are
    convert        a peer's flow as a nicefast.NICE of the same density (reading and parts:
                   what is in it, as steps; conditioners: its networks, as MLPs)
    repositories   weights of the common NICE repositories as a nicefast.NICE
    coupling       what all fast couplings share: the features, in one pass each way

and one module for each peer, imported only when asked for: its couplings made fast, and nicefast's
couplings, scaling and logistic prior as native classes of that library.
"""

from .convert import convert
from .replacing import Acceleration, Finding, accelerate, restore
from .repositories import from_state_dict

__all__ = ["Acceleration", "Finding", "accelerate", "convert", "from_state_dict", "restore"]
