"""nicefast.io.files: the whole of it under its name, or what was there before."""

import subprocess
import sys

import pytest

from nicefast.io.files import written


@pytest.mark.parametrize("name", ["flow.pt2", "set.tar.gz", "plain", ".hidden"])
def test_a_file_gets_its_name_when_it_is_whole(tmp_path, name):
    path = tmp_path / name
    path.write_text("before")
    with written(str(path)) as partial:
        assert partial.parent == tmp_path
        assert partial.name.endswith(path.suffix)
        assert partial.name.startswith(".")
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [True, False])
def test_after_an_error_all_is_as_it_was(tmp_path, error, begun):
    path = tmp_path / "flow.pt2"
    path.write_text("before")

    def interrupted():
        with written(path) as partial:
            if begun:
                partial.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written(tmp_path / "flow.pt2"):
        pass
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, sys
import numpy as np, torch, nicefast as nf
from pathlib import Path
from nicefast import plots, runs
from nicefast.compression.sources import Sink
from nicefast.io.files import naming, written

def text(path):
    runs._write_text(path, "x" * 100_000)

def levels(path):
    with naming(path), Sink("npy", 20_000, 8, b'["|u1",8]', path) as sink:
        sink.begin()
        sink.put(np.zeros((20_000, 8), np.int64))
        sink.finish()

def picture(path):
    plots.sample_grid(torch.rand(64, 28, 28), path)

def flow(path):
    nf.save(nf.NICE(64, hidden=(64,)), path)

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file can grow
try:
    {what}(Path("{path}"))
except OSError as error:
    print(type(error).__name__, error.filename)
"""


@pytest.mark.parametrize("what", ["text", "levels", "picture", "flow"])
def test_where_nothing_more_can_be_written_the_file_is_named(tmp_path, what):
    """And nothing is left of it: of everything that is written."""
    pytest.importorskip("resource")
    pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    path = tmp_path / {"levels": "x.npy", "picture": "x.png"}.get(what, "x")
    code = FULL_DISK.format(what=what, path=path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["OSError", str(path)], done.stderr
    assert not list(tmp_path.iterdir())
