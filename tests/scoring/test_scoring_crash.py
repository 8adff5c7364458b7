"""nicefast.scoring killed, over and over: the file that is completed at last is the same.

One process imports everything and forks the processes that are killed, so that each of them
begins at once.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import nicefast as nf
from helpers import make
from nicefast.scoring import score
from nicefast.scoring.journal import read

pytest.importorskip("safetensors")
pytest.importorskip("pyarrow")
if not hasattr(os, "fork"):
    pytest.skip("needs processes that fork and are killed", allow_module_level=True)

KINDS = (".npy", ".csv", ".parquet")
OPTIONS = {"chunk_rows": 16, "batch_rows": 8, "outputs": ["log_prob", "z"], "keys": []}
KILLS = 10  # at random moments, of each kind of file

CHILD = """
import json, os, shutil, signal, sys, time
import numpy, pyarrow.ipc, pyarrow.parquet, torch
import nicefast as nf
from nicefast.scoring import formats, journal, score, sinks

sinks.COMMIT_SECONDS = 0.0


class Slow(torch.nn.Module):
    def __init__(self, flow, seconds):
        super().__init__()
        self.flow, self.seconds = flow, seconds
        self.forward = flow.forward
        self.prior, self.scaling = flow.prior, flow.scaling

    def log_prob(self, x):
        time.sleep(self.seconds)
        return self.flow.log_prob(x)


def deadly(holder, name, countdown, half=None):
    plain = getattr(holder, name)

    def act(*arguments, **options):
        countdown[0] -= 1
        if countdown[0] == 0:
            if half is not None:
                half(plain, *arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **options)

    setattr(holder, name, act)


def half_of_it(write, to, data):
    write(to, data[: len(data) // 2])


def slowed(holder, name, seconds):
    plain = getattr(holder, name)

    def act(*arguments, **options):
        time.sleep(seconds)
        return plain(*arguments, **options)

    setattr(holder, name, act)


def work(order):
    if order.get("limit"):
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    if order.get("die"):
        countdown = [order["die"]]
        for module in (journal, sinks, formats):
            if hasattr(module, "write_all"):
                deadly(module, "write_all", countdown, half_of_it)
        for name in ("fsync", "replace", "truncate"):
            deadly(os, name, countdown)
        deadly(shutil, "rmtree", countdown)
    if order.get("slow"):
        for module in (journal, sinks, formats):
            if hasattr(module, "write_all"):
                slowed(module, "write_all", order["slow"])
        slowed(os, "fsync", order["slow"])
        slowed(os, "replace", 5 * order["slow"])
        slowed(formats.FileSink, "_read", order["slow"])
        slowed(shutil, "rmtree", 5 * order["slow"])
    flow = Slow(nf.load(order["model"]), order.get("slow", 0.0))
    score(flow, order["source"], order["out"], resume=order["resume"], **order["options"])


torch.set_num_threads(1)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        try:
            work(order)
        except BaseException as error:
            sys.stdout.write(f"{type(error).__name__}: {error}\\n".replace("\\n", " ") + "\\n")
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    if order.get("after") is not None:
        time.sleep(order["after"])
        os.kill(child, signal.SIGKILL)  # not waited for yet, so it is still this process
    _, status = os.waitpid(child, 0)
    print(json.dumps({"killed": os.WIFSIGNALED(status), "failed": status != 0}), flush=True)
"""


class Forks:
    """The process that forks."""

    def __init__(self, place):
        self.place = place
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, out, **order):
        """Score into ``out``, going on where something was begun; killed ``after`` some seconds,
        or at step ``die``: ``(killed, what was said)``."""
        base = {
            "model": str(self.place / "model.safetensors"),
            "source": str(self.place / "x.npy"),
            "out": str(out),
            "resume": unfinished(out).exists(),
            "options": OPTIONS,
        }
        self.process.stdin.write(json.dumps({**base, **order}) + "\n")
        self.process.stdin.flush()
        said = []
        while not (line := self.process.stdout.readline()).startswith("{"):
            said.append(line.strip())
        ended = json.loads(line)
        assert ended["killed"] or not ended["failed"] or said
        return ended["killed"], " ".join(said)


def unfinished(out):
    return out.with_name(f"{out.name}.unfinished")


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    place = tmp_path_factory.mktemp("killed")
    torch.manual_seed(0)
    nf.save(make(3, hidden=(4,), couplings=2), place / "model.safetensors")
    x = np.random.default_rng(0).standard_normal((90, 3)).astype(np.float32)
    x[[20, 77]] = np.nan
    np.save(place / "x.npy", x)
    made = Forks(place)
    yield made
    made.process.stdin.close()
    made.process.wait()


@pytest.fixture(scope="module")
def whole(forks):
    """The bytes of unbroken runs, by kind, and their seconds where all is slow."""
    found = {}
    for kind in KINDS:
        out = forks.place / f"whole{kind}"
        assert forks.run(out) == (False, "")
        slow = forks.place / f"slow{kind}"
        began = time.monotonic()
        assert forks.run(slow, slow=0.002) == (False, "")
        assert slow.read_bytes() == out.read_bytes()
        found[kind] = out.read_bytes(), time.monotonic() - began
    return found


def check(out, expected):
    """There is nothing under the final name, or all of it."""
    assert not out.exists() or out.read_bytes() == expected


def complete(forks, out, expected):
    if out.exists() and not unfinished(out).exists():
        assert out.read_bytes() == expected
        return
    assert forks.run(out) == (False, "")
    assert out.read_bytes() == expected
    assert not unfinished(out).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(forks, whole, kind, tmp_path):
    expected, seconds = whole[kind]
    moments = random.Random(kind)
    kills = tries = stages = 0
    # enough of them while there was something to go on with, however fast this machine is just now
    while kills < KILLS or stages <= KILLS // 3:
        tries += 1
        assert tries < 20 * KILLS
        out = tmp_path / f"y{tries}{kind}"
        while not out.exists() and (kills < KILLS or stages <= KILLS // 3):
            killed, said = forks.run(out, after=moments.uniform(0, seconds), slow=0.002)
            assert said == ""
            kills += killed
            check(out, expected)
            stages += killed and unfinished(out).exists()
        complete(forks, out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_step(forks, whole, kind, tmp_path, request):
    """Before, and half-way through, each write, and before whatever else changes the disk; without
    --all, at one step in three."""
    stride = 1 if request.config.getoption("--all") else 3
    expected, _ = whole[kind]
    out, step = tmp_path / f"y{kind}", 1 - stride
    while True:
        step += stride
        killed, said = forks.run(out, die=step)
        assert said == ""
        if not killed:
            break
        check(out, expected)
        if unfinished(out).exists() and step % 2:  # the second is killed as well
            forks.run(out, die=1 + step // 2)
            check(out, expected)
        complete(forks, out, expected)
        left = sorted(p.name for p in tmp_path.iterdir())
        assert left in ([out.name], [f".{out.name}.finished", out.name]), step
        out.unlink()
    assert step > 20
    assert out.read_bytes() == expected
    assert [p.name for p in tmp_path.iterdir()] == [out.name]  # what was left is gone


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_may_not_grow(forks, whole, kind, tmp_path):
    expected, _ = whole[kind]
    out = tmp_path / f"y{kind}"
    for limit in range(300, 20_000, 700):
        killed, said = forks.run(out, limit=limit)
        assert not killed
        if not said:
            break
        assert f"File too large: '{unfinished(out)}" in said, said
        check(out, expected)
    else:
        pytest.fail("no limit was enough")
    assert limit > 1000
    assert out.read_bytes() == expected
    assert not unfinished(out).exists()


def full_disk(place, size):
    """A file system of ``size`` bytes at ``place``, if this user may mount one."""
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        return False
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    return made.returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk(kind, tmp_path):
    disk = tmp_path / "disk"
    if not full_disk(disk, 256 << 10):
        pytest.skip("needs permission to mount a tmpfs")
    try:
        x = np.random.default_rng(0).standard_normal((4000, 3)).astype(np.float32)
        np.save(tmp_path / "x.npy", x)
        model = make(3, hidden=(4,), couplings=2)
        options = {"outputs": ["log_prob", "z"], "chunk_rows": 100, "batch_rows": 100}
        score(model, tmp_path / "x.npy", tmp_path / f"whole{kind}", **options)
        expected = (tmp_path / f"whole{kind}").read_bytes()
        out = disk / f"y{kind}"
        full = f"No space left on device: '{unfinished(out)}"
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(220 << 10))
        with pytest.raises(OSError, match=full):
            score(model, tmp_path / "x.npy", out, **options)
        assert not out.exists()
        with pytest.raises(OSError, match=full):
            score(model, tmp_path / "x.npy", out, resume=True, **options)
        assert len(read(unfinished(out)).entries) > 2
        for left in (210, 0):
            ballast.write_bytes(bytes(left << 10))
            if left:
                with pytest.raises(OSError, match=full):
                    score(model, tmp_path / "x.npy", out, resume=True, **options)
                assert not out.exists()
            else:
                score(model, tmp_path / "x.npy", out, resume=True, **options)
        assert out.read_bytes() == expected
        assert not unfinished(out).exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
