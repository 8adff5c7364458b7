"""The command line: a thin face over runs, data, pictures and inpainting.

common    what every command shares: errors in one line, the console, finished runs
compress  compress and decompress levels, without loss
fit       fit a flow to a data set; list presets and data sets
progress  how a fit goes on, for people
score     densities of data of any size
look      sample, inpaint, spectrum, interpolate, density: pictures of a finished run
"""

from .common import app, main
from .compress import compress_command
from .fit import fit_command
from .look import sample_command
from .score import score_command

__all__ = ["app", "compress_command", "fit_command", "main", "sample_command", "score_command"]
