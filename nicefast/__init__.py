"""nicefast: a fast engine for NICE flows (Dinh, Krueger and Bengio 2014, arXiv 1410.8516)."""

from . import functional, priors, reference
from ._version import __version__
from .compat import accelerate, convert, restore
from .deprecated import choose_path
from .flow import NICE
from .io.checkpoint import load, save
from .io.export import export_onnx, export_program
from .layers import MLP, AdditiveCoupling, Scaling
from .partition import Partition
from .runtime.backend import get_backend, set_backend
from .scoring import score

__all__ = [
    "MLP",
    "NICE",
    "AdditiveCoupling",
    "Partition",
    "Scaling",
    "__version__",
    "accelerate",
    "choose_path",
    "convert",
    "export_onnx",
    "export_program",
    "functional",
    "get_backend",
    "load",
    "priors",
    "reference",
    "restore",
    "save",
    "score",
    "set_backend",
]
