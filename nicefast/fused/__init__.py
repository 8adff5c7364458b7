"""The fast ways through a flow, each in one file: :mod:`nicefast.path` chooses among them."""

from .narrow import NarrowFlow
from .onepiece import OnePiece
from .whole import WholeFlow
from .wide import WideFlow

FusedFlow = WholeFlow | WideFlow | NarrowFlow | OnePiece  # each goes all the way from x to log_prob
