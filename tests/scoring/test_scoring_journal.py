"""The journal of an interrupted score: damage means scoring again or an error, never wrong rows."""

import json
import shutil
import time

import numpy as np
import pytest
import torch

from helpers import make
from nicefast.scoring import score
from nicefast.scoring.journal import Journal, read

pytest.importorskip("safetensors")
pytest.importorskip("pyarrow")

KINDS = (".npy", ".csv", ".parquet")
OPTIONS = {"chunk_rows": 4, "batch_rows": 4}
D = 3


class Held:
    """A table in memory that fails at a row."""

    keys, seekable, name, fingerprint = (), True, "held", "abc"

    def __init__(self, x, fails_at=None, known=True):
        self.x, self.rows, self.fails_at = x, len(x) if known else None, fails_at
        self.features, self.dtype = x.shape[1], x.dtype

    def blocks(self, size, start=0, stop=None):
        stop = len(self.x) if stop is None else stop
        for at in range(start, stop, size):
            if self.fails_at is not None and at + size > self.fails_at:
                time.sleep(0.2)  # until what was read before is written
                raise OSError("gone")
            yield Block(at, self.x[at : min(at + size, stop)])


class Block:
    def __init__(self, start, values):
        self.start, self.values, self.keys = start, values, {}


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return make(D, hidden=(4,), couplings=2).eval()


@pytest.fixture(scope="module")
def x():
    x = np.random.default_rng(0).standard_normal((40, D)).astype(np.float32)
    x[[1, 9, 10]] = np.nan
    return x


@pytest.fixture(params=KINDS)
def begun(request, flow, x, tmp_path):
    """A half-done score: its out, its journal, and the bytes and counts of an unbroken run."""
    kind = request.param
    whole = score(flow, Held(x), tmp_path / f"whole{kind}", **OPTIONS)
    out = tmp_path / f"y{kind}"
    with pytest.raises(OSError, match="gone"):
        score(flow, Held(x, fails_at=20), out, **OPTIONS)
    journal = tmp_path / f"y{kind}.unfinished/journal.jsonl"
    assert len(read(journal.parent).entries) == 5
    return out, journal, whole.path.read_bytes(), whole[1:3]


def resumed(flow, x, begun, content, saved=None, known=True):
    """Score on with a journal of this content: the bytes, or the one line of an error."""
    out, journal, expected, counts = begun
    kept = shutil.copytree(journal.parent, out.with_name("kept"))
    journal.write_bytes(content)
    try:
        found = score(flow, Held(x, known=known), out, resume=True, **OPTIONS)
        assert out.read_bytes() == expected
        assert found[:3] == (len(x), *counts)
        return "as if unbroken"
    except ValueError as error:
        return None if out.exists() else str(error)
    finally:
        out.unlink(missing_ok=True)
        shutil.rmtree(journal.parent, ignore_errors=True)
        kept.rename(journal.parent)


@pytest.mark.parametrize("begun", KINDS[:1], indirect=True)
def test_no_bit_of_a_journal_can_be_flipped_unseen(begun):
    """Every bit: the lines that are read are true ones, and only those near the bit are lost."""
    _, journal, _, _ = begun
    content = journal.read_bytes()
    true = read(journal.parent)
    first = content.index(b"\n") + 1
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            journal.write_bytes(flipped)
            found = read(journal.parent)
            assert found.assembled is None
            assert found.entries.items() <= true.entries.items()
            if place < first:
                assert found == (None, {}, None)
            else:
                assert found.identity == true.identity
                assert len(true.entries) - len(found.entries) in (1, 2)


def test_a_job_goes_on_from_a_flipped_bit(begun, flow, x):
    """Here and there: the file is that of an unbroken run, and so are the counts."""
    content = begun[1].read_bytes()
    for place in range(5, 8 * len(content), 8 * len(content) // 60):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        assert resumed(flow, x, begun, bytes(flipped)) == "as if unbroken"


@pytest.mark.parametrize("known", [True, False])
def test_lines_that_are_cut_repeated_or_elsewhere(begun, flow, x, known):
    content = begun[1].read_bytes()
    lines = content.splitlines(keepends=True)
    for changed in (
        *(content[:size] for size in range(0, len(content), len(content) // 25)),
        b"".join([*lines, *lines[1:]]),
        b"".join([*lines, lines[2], lines[1]]),
        b"".join([lines[0], *lines[:0:-1]]),
        b"".join(lines[1:]),
        b"".join([lines[0], lines[2], lines[5]]),
        content.replace(b"\n", b"\r\n"),
        content.replace(b"\n", b" "),
        content + b"[1, 2]\n" + b"9" * 5000 + b"\n" + b"[" * 100_000 + b"\n\xff\n",
        bytes(len(content)),
    ):
        assert resumed(flow, x, begun, changed, known=known) == "as if unbroken"


WRONG = [
    {"chunk": -1}, {"chunk": 10}, {"chunk": True}, {"chunk": "0"}, {"chunk": 0.0}, {"chunk": None},
    {"rows": 0}, {"rows": 3}, {"rows": 5}, {"rows": -4}, {"rows": 1 << 70}, {"bad": 4}, {"bad": -1},
    {"bad": 5}, {"bad_rows": [4]}, {"bad_rows": []}, {"bad_rows": ["1"]}, {"bad_rows": 1},
    {"bad": 2, "bad_rows": [1, 1]}, {"bad": 1, "bad_rows": [9]}, {"batch": 0}, {"batch": -1},
    {"batch": 5}, {"batch": 1 << 62}, {"batch": 2.5}, {"file": "../y"}, {"file": "/etc/passwd"},
    {"file": "journal.jsonl"}, {"file": "data.9.npz"}, {"file": 3}, {"offset": -1},
    {"offset": 1 << 80}, {"length": 0, "crc": 0}, {"length": -1}, {"crc": -1}, {"crc": 1 << 32},
    {"more": 1},
]  # fmt: skip


def test_fields_that_cannot_be(begun, flow, x):
    """Under a right checksum, too: each field is looked at."""
    _, journal, _, _ = begun
    content, kept = journal.read_bytes(), read(journal.parent)
    lines = content.splitlines(keepends=True)
    entry = kept.entries[0]._asdict()
    for change in WRONG:
        journal.write_bytes(b"".join([lines[0], *lines[2:]]))
        rewritten = Journal(journal.parent, 0, kept.identity)
        rewritten.append([{**entry, **change}])
        rewritten.close()
        changed = journal.read_bytes()
        if change not in ({"chunk": 10}, {"rows": 3}):  # which only the table can tell
            assert 0 not in read(journal.parent).entries, change
            assert len(read(journal.parent).entries) == 4, change
        journal.write_bytes(content)
        assert resumed(flow, x, begun, changed) == "as if unbroken", change


def test_a_line_of_another_job_is_none(begun, flow, x):
    out, journal, _, _ = begun
    lines = journal.read_bytes().splitlines(keepends=True)
    other = out.with_name(f"other{out.suffix}")
    with pytest.raises(OSError, match="gone"):
        score(flow, Held(x + 1, fails_at=20), other, seed=1, **OPTIONS)
    theirs = other.with_name(f"{other.name}.unfinished") / "journal.jsonl"
    mixed = [lines[0], *theirs.read_bytes().splitlines(keepends=True)[1:]]
    journal.write_bytes(b"".join(mixed))
    assert read(journal.parent).entries == {}


def test_the_complete_file_and_what_is_said_of_it(begun, flow, x):
    """Killed just after the file got its name: the counts do not hang on the chunks' lines."""
    out, journal, expected, counts = begun
    kept = read(journal.parent)
    lines = journal.read_bytes().splitlines(keepends=True)
    out.write_bytes(expected)
    for name in [p.name for p in journal.parent.iterdir() if p.name.startswith("data")]:
        (journal.parent / name).unlink()
    assembled = "data.npy" if out.suffix == ".npy" else f"assembled{out.suffix}"
    said = {"assembled": assembled, "length": len(expected), "rows": len(x)}
    journal.write_bytes(b"".join(lines[:3]))
    rewritten = Journal(journal.parent, 0, kept.identity)
    rewritten.append([{**said, "bad": counts[0], "bad_rows": counts[1]}])
    rewritten.close()
    content = journal.read_bytes()
    journal.write_bytes(content.replace(b'"rows":40', b'"rows":41'))
    with pytest.raises(ValueError, match="exists already: overwrite"):
        score(flow, Held(x), out, resume=True, **OPTIONS)
    journal.write_bytes(content)
    found = score(flow, Held(x), out, resume=True, **OPTIONS)
    assert found[:3] == (len(x), *counts)
    assert out.read_bytes() == expected
    assert not journal.parent.exists()


def test_a_journal_without_checksums_is_refused_in_one_line(begun, flow, x):
    """That of nicefast 0.1.0."""
    content = []
    for line in begun[1].read_bytes().splitlines():
        said = json.loads(line)
        del said["sum"]
        if "identity" in said:
            said["identity"]["versions"]["format"] = "nicefast.scores/1"
        content.append(json.dumps(said).encode() + b"\n")
    said = resumed(flow, x, begun, b"".join(content))
    assert "begun by nicefast 0.1.0" in said
    assert "overwrite" in said
    score(flow, Held(x), begun[0], overwrite=True, **OPTIONS)
    assert begun[0].read_bytes() == begun[2]
