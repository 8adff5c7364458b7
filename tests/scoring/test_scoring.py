"""nicefast.scoring: the same numbers as the model's, whatever the source, the file and the cut."""

import errno
import json
import math
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch

import nicefast as nf
from helpers import make
from nicefast.baselines import Gaussian
from nicefast.preprocessing import Preprocessing, Standardise
from nicefast.scoring import OUTPUTS, score
from nicefast.scoring import sinks as sinks_module
from nicefast.scoring.journal import Folder, read
from nicefast.scoring.models import default_batch, digest
from nicefast.scoring.outputs import DRAW

pytest.importorskip("safetensors")
pytest.importorskip("pyarrow")

pytestmark = pytest.mark.filterwarnings("ignore:.*the first line holds numbers")

KINDS = (".npy", ".csv", ".parquet")
D = 6


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return make(D).eval()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = {t for t in threading.enumerate() if t.name.startswith("nicefast-")}
    yield
    left = {t for t in threading.enumerate() if t.name.startswith("nicefast-")}
    assert left == before


def rows(n=103, seed=0, d=D):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def plain(model, x):
    with torch.no_grad():
        return model.log_prob(torch.as_tensor(x)).numpy()


def result(path):
    """(N,) or (N, C) of any of the kinds."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".csv":
        return np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.float32)
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return np.column_stack([c.to_numpy() for c in table.columns]).squeeze()


class Held:
    """A table in memory, which may fail at a row, or be slow."""

    keys, seekable, name, fingerprint = (), True, "held", "abc"

    def __init__(self, x, known=True, fails_at=None, error=None):
        self.x, self.rows = x, len(x) if known else None
        self.features, self.dtype = x.shape[1], x.dtype
        self.fails_at, self.error = fails_at, error
        self.reads = []  # where each reading began

    def check_unchanged(self):
        pass

    def blocks(self, size, start=0, stop=None):
        stop = len(self.x) if stop is None else stop
        self.reads.append(start)
        for at in range(start, stop, size):
            end = min(at + size, stop)
            if self.fails_at is not None and end > self.fails_at:
                raise self.error
            yield _Block(at, self.x[at:end], {})


class _Block:
    def __init__(self, *parts):
        self.start, self.values, self.keys = parts


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "tensor", "npy", "iterable", "loader", "table"])
def test_every_source_gives_the_models_log_prob(flow, tmp_path, kind):
    x = rows()
    np.save(tmp_path / "x.npy", x)
    parts = torch.utils.data.TensorDataset(torch.from_numpy(x))
    source = {
        "array": x,
        "tensor": torch.from_numpy(x),
        "npy": tmp_path / "x.npy",
        "iterable": (x[i : i + 7] for i in range(0, len(x), 7)),
        "loader": torch.utils.data.DataLoader(parts, batch_size=9),
        "table": Held(x, known=False),
    }[kind]
    found = score(flow, source, batch_rows=16, chunk_rows=40)
    np.testing.assert_allclose(found.values["log_prob"], plain(flow, x), rtol=1e-5)
    assert (found.rows, found.bad, found.bad_rows, found.path) == (len(x), 0, (), None)
    assert found.values["log_prob"].dtype == np.float32


@pytest.mark.parametrize("grid", [None, 2.0**-12])
def test_outputs_by_definition(flow, grid):
    x, flow = rows(), flow.with_grid(grid)
    reference = plain(flow, rows(50, seed=1))
    found = score(flow, x, outputs=OUTPUTS, batch_rows=32, reference=reference).values
    leaf = torch.from_numpy(x).requires_grad_()
    (gradient,) = torch.autograd.grad(flow.log_prob(leaf).sum(), leaf)
    log_prob = plain(flow, x)
    np.testing.assert_allclose(found["log_prob"], log_prob, rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_dim"], -log_prob / (D * math.log(2)), rtol=1e-5)
    z = flow(torch.from_numpy(x))[0].detach()
    np.testing.assert_allclose(found["z"], z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["terms"].sum(1), log_prob, rtol=1e-4)
    np.testing.assert_allclose(found["gradient"], gradient, rtol=1e-4, atol=1e-5)
    by_hand = [(reference < v).mean() * 100 for v in found["log_prob"]]
    np.testing.assert_allclose(found["percentile"], by_hand, rtol=1e-6)
    assert list(found) == list(OUTPUTS)


def test_integers_are_dequantised_by_row_number_and_averaged_over_draws():
    torch.manual_seed(1)
    levels = torch.randint(0, 16, (57, 1, 2, 3), dtype=torch.uint8)
    steps = Preprocessing.fit(["dequantise", "standardise"], levels, 16)
    model = nf.NICE((1, 2, 3), hidden=(8,), couplings=2)
    expected = 0
    for draw in range(3):
        x, log_det = steps.forward(levels, 5, draw * DRAW)
        expected = expected + (model.log_prob(x).double() + log_det).detach() / 3
    options = {"preprocessing": steps, "seed": 5, "draws": 3, "batch_rows": 10, "chunk_rows": 20}
    found = score(model, levels, **options).values["log_prob"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # a table with gaps has its integers as floating-point numbers
    gaps = levels.flatten(1).double().numpy()
    gaps[3, 2] = np.nan
    again = score(model, gaps, **options)
    np.testing.assert_array_equal(np.delete(again.values["log_prob"], 3), np.delete(found, 3))
    assert again.bad_rows == (3,)
    gaps[3, 2] = 0.5
    with pytest.raises(ValueError, match=r"row 3, feature 2: expected an integer.* found 0\.5"):
        score(model, gaps, **options)


def test_what_preprocessing_refuses_is_named_by_row():
    raw = torch.rand(50, 2)
    steps = Preprocessing.fit(["logit"], raw)
    raw[33] = 7
    model = make(2)
    with pytest.raises(ValueError, match="rows 30 to 39: logit takes values in"):
        score(model, raw, preprocessing=steps, batch_rows=10)
    raw[33] = torch.nan  # logit refuses it as well, and only it
    assert score(model, raw, preprocessing=steps, batch_rows=10).bad_rows == (33,)


def test_paths_of_run_folders_and_files(flow, tmp_path):
    x = rows()
    nf.save(flow, tmp_path / "model.safetensors")
    alone = score(tmp_path / "model.safetensors", x).values["log_prob"]
    np.testing.assert_array_equal(alone, score(flow, x).values["log_prob"])
    np.testing.assert_array_equal(alone, score(tmp_path, x).values["log_prob"])
    steps = Preprocessing([Standardise.fit(torch.from_numpy(rows()) * 2 + 1)])
    steps.save(tmp_path / "preprocessing.safetensors")
    x1, log_det = steps.forward(torch.from_numpy(x))
    found = score(str(tmp_path), x).values["log_prob"]
    np.testing.assert_allclose(found, plain(flow, x1) + log_det.numpy(), rtol=1e-5)
    plainly = score(tmp_path, x, preprocessing=Preprocessing(()))
    np.testing.assert_allclose(plainly.values["log_prob"], alone, rtol=1e-6)
    with pytest.raises(ValueError, match="is no run folder: it has no model"):
        score(tmp_path / "..", x)
    with pytest.raises(ValueError, match="no such file or run folder"):
        score(tmp_path / "nothing", x)


def test_any_density_and_any_dtype(flow):
    x = rows()
    gaussian = Gaussian.full(torch.from_numpy(x))
    found = score(gaussian, x).values["log_prob"]
    np.testing.assert_allclose(found, gaussian.log_prob(torch.from_numpy(x)), rtol=1e-12)
    assert found.dtype == np.float64
    double = make(D).double()
    found = score(double, x.astype(np.float64)).values["log_prob"]
    assert found.dtype == np.float64
    whole = np.arange(4 * D).reshape(4, D)
    expected = plain(flow, whole.astype(np.float32))
    np.testing.assert_allclose(score(flow, whole).values["log_prob"], expected, rtol=1e-6)


def test_bad_rows_are_nan_and_touch_no_other(flow, tmp_path):
    x = rows(2000)
    good = score(flow, x, outputs=OUTPUTS, reference=[0.0], batch_rows=64).values
    bad = [0, 5, 63, 64, 1999, *range(128, 192)]  # a whole batch is bad
    x[bad, np.arange(len(bad)) % D] = np.resize([np.nan, np.inf, -np.inf], len(bad))
    found = score(flow, x, outputs=OUTPUTS, reference=[0.0], batch_rows=64)
    for name in OUTPUTS:
        assert np.isnan(found.values[name][bad]).all()
        np.testing.assert_array_equal(
            np.delete(found.values[name], bad, 0), np.delete(good[name], bad, 0)
        )
    assert found.bad == len(bad)
    assert found.bad_rows == tuple(sorted(bad)[:20])
    huge = np.full((3, D), 1e200)  # finite, but no float32
    assert score(flow, huge).bad == 3
    for kind in KINDS:
        kept = score(flow, x, tmp_path / f"y{kind}", chunk_rows=100, batch_rows=50)
        assert (kept.bad, kept.bad_rows, kept.rows) == (found.bad, found.bad_rows, 2000)


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8", "int64", "uint8", "bool"])
def test_what_is_masked_is_missing(flow, tmp_path, dtype):
    """In arrays and in iterables of them: what lies under the mask is never scored."""
    x = (np.abs(rows(60, 3)) * 5 % 2 if dtype in ("uint8", "bool") else rows(60, 3) * 5).astype(
        dtype
    )
    mask = np.zeros(x.shape, bool)
    mask[[4, 17, 17], [0, 3, 5]] = True
    masked = np.ma.array(x, mask=mask)
    expected = score(flow, x).values["log_prob"].copy()
    expected[[4, 17]] = np.nan
    found = score(flow, masked, batch_rows=7)
    assert (found.bad, found.bad_rows) == (2, (4, 17))
    np.testing.assert_allclose(found.values["log_prob"], expected, rtol=1e-5)
    x[mask] = 100  # which has no say
    again = score(flow, np.ma.array(x, mask=mask), batch_rows=7).values["log_prob"]
    np.testing.assert_array_equal(again, found.values["log_prob"])
    plain = score(flow, np.ma.array(x, mask=np.zeros_like(mask)))
    np.testing.assert_array_equal(plain.values["log_prob"], score(flow, x).values["log_prob"])
    images = np.ma.array(x.reshape(60, 2, 3), mask=mask.reshape(60, 2, 3))
    parts = [images[:20], images[20:40], images[40:]]
    if dtype in ("float16", "float32", ">f8"):
        values = score(flow, parts).values["log_prob"]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
    else:
        with pytest.raises(
            ValueError,
            match=f"item 1: expected .* of float64 .*, found 6 of {dtype}".replace("bool", "uint8"),
        ):
            score(flow, parts)
    score(flow, masked, tmp_path / "y.npy", batch_rows=7)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="row 4 holds values that are not finite"):
        score(flow, masked, strict=True)


def test_a_mask_is_part_of_the_source(flow, tmp_path):
    x, mask = rows(60), np.zeros((60, D), bool)

    def stop(done, *_):
        if done > 30:
            raise OSError("gone")

    options = {"batch_rows": 8, "chunk_rows": 8}
    with pytest.raises(OSError, match="gone"):
        score(flow, np.ma.array(x, mask=mask), tmp_path / "y.npy", progress=stop, **options)
    mask[50, 0] = True
    with pytest.raises(ValueError, match="resume: source differs"):
        score(flow, np.ma.array(x, mask=mask), tmp_path / "y.npy", resume=True, **options)
    reference = np.ma.array([-10.0, -9.0, 1e9, -8.0], mask=[0, 0, 1, 0])
    found = score(flow, x, outputs=["percentile"], reference=reference).values["percentile"]
    expected = score(flow, x, outputs=["percentile"], reference=reference.compressed())
    np.testing.assert_array_equal(found, expected.values["percentile"])


def test_strict_names_the_first_and_keeps_what_was_finished(flow, tmp_path):
    x = rows(100)
    x[[71, 72]] = np.nan
    out = tmp_path / "y.npy"
    options = {"chunk_rows": 10, "batch_rows": 10}
    with pytest.raises(ValueError, match="row 71 holds values that are not finite"):
        score(flow, Held(x), out, strict=True, **options)
    assert not out.exists()
    kept = read(tmp_path / "y.npy.unfinished")
    assert set(kept.entries) <= set(range(7))
    assert len(kept.entries) > 3
    found = score(flow, Held(x), out, resume=True, **options)
    assert found.bad_rows == (71, 72)
    score(flow, Held(x), tmp_path / "z.npy", **options)
    assert out.read_bytes() == (tmp_path / "z.npy").read_bytes()


def test_the_model_is_as_it_was(flow):
    model = make(D, dropout=0.5)
    model.couplings[0].eval()
    modes = [m.training for m in model.modules()]
    x = rows()
    first, second = (score(model, x, outputs=["gradient"]).values["gradient"] for _ in range(2))
    np.testing.assert_array_equal(first, second)  # no dropout
    assert modes == [m.training for m in model.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [True, False])
def test_files_hold_the_same_whatever_the_cut(flow, tmp_path, kind, known):
    x = rows(211)
    out = tmp_path / f"y{kind}"
    seen = []
    found = score(
        flow, Held(x, known), out, batch_rows=8, chunk_rows=30, progress=lambda *a: seen.append(a)
    )
    np.testing.assert_allclose(result(out), plain(flow, x), rtol=1e-5)
    assert (found.path, found.rows, found.values) == (out, 211, {})
    assert seen[-1] == (211, 211 if known else None, x.nbytes)
    assert [a[0] for a in seen] == sorted(a[0] for a in seen)
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name]
    if kind == ".npy":
        np.save(tmp_path / "z.npy", np.load(out))
        assert (tmp_path / "z.npy").read_bytes() == out.read_bytes()
    other = tmp_path / f"other{kind}"
    score(flow, x, other, batch_rows=8, chunk_rows=64)
    np.testing.assert_array_equal(result(other), result(out))
    empty = tmp_path / f"empty{kind}"
    assert score(flow, Held(x[:0], known), empty).rows == 0
    assert empty.is_file()


def test_several_outputs_and_keys(flow, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    x = rows(50)
    names = [f"f{i}" for i in range(D)]
    between = ["", ",", '"', "\n", "\r", "\r\n"]
    called = [f"a{between[i % 6]}{i}" for i in range(49)] + ["\r\n"]
    keys = {"id": pa.array(range(50)), "name": pa.array(called)}
    columns = dict(zip(names, map(pa.array, x.T), strict=True))
    pq.write_table(pa.table({**keys, **columns}), tmp_path / "x.parquet")
    options = {"outputs": ["z", "log_prob"], "chunk_rows": 20, "batch_rows": 20}
    carried = {**options, "keys": ["id", "name"]}
    score(flow, tmp_path / "x.parquet", tmp_path / "y.parquet", **carried)
    table = pq.read_table(tmp_path / "y.parquet")
    assert table.column_names == ["id", "name", "z", "log_prob"]
    assert table["id"].combine_chunks() == keys["id"]
    assert table["name"].combine_chunks() == keys["name"]
    np.testing.assert_allclose(table["log_prob"], plain(flow, x), rtol=1e-5)
    z = score(flow, x, outputs=["z"]).values["z"]
    np.testing.assert_allclose(np.stack(table["z"].to_numpy()), z, rtol=1e-5)
    score(flow, tmp_path / "x.parquet", tmp_path / "y.csv", **carried)
    import csv

    with open(tmp_path / "y.csv", newline="") as file:
        head, *body = csv.reader(file)
    assert head == ["id", "name", *(f"z_{i}" for i in range(D)), "log_prob"]
    assert [line[:2] for line in body] == [[str(i), name] for i, name in enumerate(called)]
    found = np.array([line[2:] for line in body], np.float64).astype(np.float32)
    score(flow, x, tmp_path / "y.npy", **options)
    np.testing.assert_array_equal(found, np.load(tmp_path / "y.npy"))  # no digit is lost
    held = score(flow, tmp_path / "x.parquet", columns=names, keys=["name"]).values["name"]
    assert list(held) == called
    with pytest.raises(ValueError, match=r"keys are for \.parquet and \.csv"):
        score(flow, tmp_path / "x.parquet", tmp_path / "k.npy", keys=["id"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [True, False])
def test_a_source_that_fails_half_way(flow, tmp_path, kind, known):
    x = rows(200)
    options = {"chunk_rows": 16, "batch_rows": 8, "outputs": ["log_prob", "z"]}
    score(flow, Held(x, known), tmp_path / f"whole{kind}", **options)
    out = tmp_path / f"y{kind}"
    with pytest.raises(ValueError, match="torn at 130"):
        score(flow, Held(x, known, 130, ValueError("torn at 130")), out, **options)
    assert not out.exists()
    done = read(tmp_path / f"y{kind}.unfinished").entries
    assert len(done) >= 5
    table = Held(x, known)
    seen = []
    found = score(flow, table, out, resume=True, progress=lambda n, *_: seen.append(n), **options)
    assert found.rows == 200
    # what was finished last is compared, the rest is not read again
    assert table.reads == [16 * (len(done) - 1), 16 * len(done)]
    assert seen[0] == 16 * len(done) + 8
    assert out.read_bytes() == (tmp_path / f"whole{kind}").read_bytes()
    assert not (tmp_path / f"y{kind}.unfinished").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_and_done_again(flow, tmp_path, kind):
    x = rows(100)
    options = {"chunk_rows": 8, "batch_rows": 8}
    score(flow, Held(x), tmp_path / f"whole{kind}", **options)
    out, folder = tmp_path / f"y{kind}", tmp_path / f"y{kind}.unfinished"
    with pytest.raises(OSError, match="gone"):
        score(flow, Held(x, fails_at=80, error=OSError("gone")), out, **options)
    entries = read(folder).entries
    second = entries[1]
    with open(folder / second.file, "r+b") as file:
        file.seek(second.offset + 3)
        byte = file.read(1)
        file.seek(second.offset + 3)
        file.write(bytes([byte[0] ^ 1]))
        file.seek(0, 2)
        file.write(b"a piece of a chunk that was never finished")
    with open(folder / "journal.jsonl", "ab") as file:
        file.write(b'{"chunk":9,"rows":8,"bad":0,"bad_ro')
    table = Held(x)
    score(flow, table, out, resume=True, **options)
    assert table.reads == [8 * (len(entries) - 1), 8, 8 * len(entries)]
    assert out.read_bytes() == (tmp_path / f"whole{kind}").read_bytes()


def test_resume_refuses_another_job_and_names_what_differs(flow, tmp_path):
    x, out = rows(100), tmp_path / "y.npy"
    options = {"chunk_rows": 8, "batch_rows": 8}
    with pytest.raises(OSError, match="gone"):
        score(flow, Held(x, fails_at=80, error=OSError("gone")), out, **options)
    journal = (tmp_path / "y.npy.unfinished/journal.jsonl").read_bytes()
    other = make(D, hidden=(9,))
    table = Held(x)
    table.fingerprint = "abd"
    for change, what in (
        ({"model": other}, "model differs: expected '[0-9a-f]{64}', found '[0-9a-f]{64}'"),
        ({"source": table}, "source differs: expected 'abc', found 'abd'"),
        ({"chunk_rows": 16}, "chunk_rows differs: expected 8, found 16"),
        ({"batch_rows": 4}, "batch_rows differs: expected 8, found 4"),
        ({"outputs": ["z"]}, r"outputs differs: expected \['log_prob'\], found \['z'\]"),
        ({"seed": 1}, "seed differs: expected 0, found 1"),
        ({"preprocessing": Preprocessing(())}, "preprocessing differs"),
    ):
        changed = {"model": flow, "source": Held(x), "out": out, **options, **change}
        with pytest.raises(ValueError, match=f"resume: {what}"):
            score(**changed, resume=True)
    with pytest.raises(ValueError, match="unfinished: resume to go on with it, or overwrite"):
        score(flow, Held(x), out, **options)
    assert (tmp_path / "y.npy.unfinished/journal.jsonl").read_bytes() == journal
    # a batch that nobody insists on is the first run's
    score(flow, Held(x), out, resume=True, chunk_rows=8)
    with pytest.raises(ValueError, match="exists already: overwrite to replace it"):
        score(flow, Held(x), out, **options)
    with pytest.raises(ValueError, match=r"there is no .*unfinished to go on from"):
        score(flow, Held(x), out, resume=True, **options)
    before = out.read_bytes()
    score(flow, Held(x[:50]), out, overwrite=True, **options)
    assert len(np.load(out)) == 50
    with pytest.raises(OSError, match="gone"):
        score(flow, Held(x, fails_at=20, error=OSError("gone")), out, overwrite=True, **options)
    assert len(np.load(out)) == 50  # until there is something better
    with pytest.raises(ValueError, match="exists already: overwrite"):
        score(flow, Held(x), out, resume=True, **options)
    score(flow, Held(x), out, resume=True, overwrite=True, **options)
    assert out.read_bytes() == before


class Scaled(torch.nn.Module):
    """A density with a number that is neither parameter nor configuration, and which may fail."""

    def __init__(self, flow, factor, fails_after=None):
        super().__init__()
        self.flow, self.numbers = flow, {"factor": factor, "left": fails_after}

    def log_prob(self, x):
        if self.numbers["left"] is not None:
            self.numbers["left"] -= 1
            if self.numbers["left"] < 0:
                raise OSError("gone")
        return self.flow.log_prob(x) * self.numbers["factor"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_of_the_same_parameters_is_noticed(flow, tmp_path, kind, monkeypatch):
    """The last finished chunk is scored again: bit for bit here, to a tolerance elsewhere."""
    x, out = rows(200), tmp_path / f"y{kind}"
    x[48:] = np.nan  # the last chunks say nothing: the last that says something is compared
    options = {"chunk_rows": 8, "batch_rows": 8}
    whole = score(Scaled(flow, 1.0), Held(x), tmp_path / f"whole{kind}", **options).path
    with pytest.raises(OSError, match="gone"):
        score(Scaled(flow, 1.0, 6), Held(x, fails_at=190, error=OSError("gone")), out, **options)
    folder = tmp_path / f"y{kind}.unfinished"
    assert len(read(folder).entries) > 6
    left = sorted(path.name for path in folder.iterdir())
    for factor in (1.5, 1 + 1e-6):
        with pytest.raises(ValueError, match=r"resume: row 4\d comes out otherwise: .* same bits"):
            score(Scaled(flow, factor), Held(x), out, resume=True, **options)
        assert sorted(path.name for path in folder.iterdir()) == left
    other = Held(x.copy())
    other.x[40:48] += 1  # of the same fingerprint
    with pytest.raises(ValueError, match="resume: row 40 comes out otherwise"):
        score(Scaled(flow, 1.0), other, out, resume=True, **options)
    monkeypatch.setattr(sinks_module, "processor", lambda: "another")
    with pytest.raises(ValueError, match=r"resume: row 4\d comes out otherwise: .*to 0.0001"):
        score(Scaled(flow, 1.5), Held(x), out, resume=True, **options)
    found = score(Scaled(flow, 1 + 1e-6), Held(x), out, resume=True, **options)
    assert (found.rows, found.bad) == (200, 152)
    np.testing.assert_allclose(result(out), result(whole), rtol=1e-5)


def test_another_activation_of_the_same_parameters_is_noticed(tmp_path):
    def model(activation):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(D, 5), torch.nn.Linear(5, 1))

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def log_prob(self, x):
                return self.net[1](activation(self.net[0](x)))[:, 0]

        return Net()

    options = {"chunk_rows": 8, "batch_rows": 8}
    broken = Held(rows(200), fails_at=80, error=OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        score(model(torch.relu), broken, tmp_path / "y.npy", **options)
    with pytest.raises(ValueError, match=r"resume: row .* comes out otherwise"):
        score(model(torch.tanh), Held(rows(200)), tmp_path / "y.npy", resume=True, **options)
    score(model(torch.relu), Held(rows(200)), tmp_path / "y.npy", resume=True, **options)


def test_what_cannot_be_recognised_cannot_be_resumed(flow, tmp_path):
    out = tmp_path / "y.npy"

    def broken():
        yield rows(40)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        score(flow, broken(), out, chunk_rows=8, batch_rows=8)
    assert not list(tmp_path.iterdir())  # nothing that would be of use
    score(flow, iter([rows(40)]), out, chunk_rows=8, batch_rows=8)
    np.testing.assert_allclose(np.load(out), plain(flow, rows(40)), rtol=1e-5)
    with pytest.raises(ValueError, match="resume: the source is an iterable"):
        score(flow, iter([rows(40)]), out, resume=True)

    class Odd:
        def __init__(self):
            self.log_prob = lambda x: x.sum(1)

    with pytest.raises(ValueError, match="resume: the model holds what cannot be compared"):
        score(Odd(), rows(40), out, resume=True)


def test_only_one_process_at_a_time(flow, tmp_path):
    out = tmp_path / "y.npy"
    folder = Folder(out)
    folder.claim({"seed": 0}, resume=False, overwrite=False)
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match="another process is at work"):
            score(flow, Held(rows()), out, **options)
    folder.release()
    score(flow, Held(rows()), out, overwrite=True)


def test_an_interrupt_says_how_to_go_on(flow, tmp_path):
    def told(done, *_):
        if done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r", go on with --resume: .*y\.npy\.unfinished"):
        score(flow, Held(rows()), tmp_path / "y.npy", progress=told, chunk_rows=8, batch_rows=8)
    with pytest.raises(KeyboardInterrupt, match=", nothing was kept"):
        score(flow, iter([rows()]), tmp_path / "z.npy", progress=told)


def test_a_table_that_breaks_its_contract(flow):
    class Odd(Held):
        def blocks(self, size, start=0, stop=None):
            yield from super().blocks(7, start, stop)

    with pytest.raises(RuntimeError, match="held: expected 50 rows from row 7, found 7 from 7"):
        score(flow, Odd(rows()), batch_rows=50)


def test_strangers_are_left_alone(flow, tmp_path):
    folder = tmp_path / "y.npy.unfinished"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"is no unfinished score: it holds precious\.txt"):
            score(flow, Held(rows()), tmp_path / "y.npy", **options)
    assert (folder / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out": "y.txt"}, ValueError, r"out must end in one of \.npy, \.csv, \.parquet, got"),
        ({"outputs": ()}, ValueError, "outputs must name one or more"),
        ({"outputs": ["density"]}, ValueError, "outputs must be among .*, got 'density'"),
        ({"outputs": ["z", "z"]}, ValueError, "outputs names 'z' twice"),
        ({"outputs": ["percentile"]}, ValueError, "'percentile' needs a reference"),
        ({"reference": [1.0]}, ValueError, "reference is for the output 'percentile'"),
        (
            {"outputs": ["percentile"], "reference": [[1.0]]},
            ValueError,
            r"reference must be numbers of shape \(N,\), got float64 \(1, 1\)",
        ),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be an integer >= 1, got 0"),
        ({"batch_rows": True}, ValueError, "batch_rows must be an integer >= 1, got True"),
        ({"draws": 0}, ValueError, "draws must be an integer >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"draws": 1.5}, ValueError, "draws must be an integer >= 1, got 1.5"),
        ({"out": 1.5}, TypeError, "out must be a path, got float"),
        ({"outputs": None}, TypeError, "outputs must be names, got NoneType"),
        ({"columns": 1.5}, TypeError, "columns must be names or positions of columns, got float"),
        ({"keys": None}, TypeError, "keys must be names or positions of columns, got NoneType"),
        ({"progress": 3}, TypeError, "progress must be a function, got int"),
        ({"ranks": 2}, TypeError, "ranks must be a Ranks, got int"),
        ({"resume": True}, ValueError, "resume is for a file"),
        ({"device": "nowhere"}, ValueError, "device 'nowhere' cannot be used here"),
        ({"model": 3}, TypeError, "model must have log_prob or be a path, got int"),
        ({"preprocessing": 3}, TypeError, "preprocessing must be a Preprocessing or a path"),
        ({"ranks": nf.scoring.Ranks(0, 2)}, ValueError, "out must be given where 2 ranks"),
        ({"source": rows(d=5)}, ValueError, "5"),
        ({"source": Held(rows(d=5))}, ValueError, "expected rows of 6 values, found 5"),
        ({"model": nf.NICE(D, hidden=(4,), context=2)}, ValueError, "model takes a context"),
        (
            {"model": Gaussian.full(torch.from_numpy(rows())), "outputs": ["z"]},
            ValueError,
            "output 'z' needs a NICE, got Gaussian",
        ),
    ],
)
def test_bad_arguments(flow, tmp_path, options, error, message):
    if isinstance(options.get("out"), str):
        options = {**options, "out": tmp_path / options["out"]}
    with pytest.raises(error, match=message):
        score(**{"model": flow, "source": rows(), **options})
    assert not list(tmp_path.iterdir())


# --- the engine ------------------------------------------------------------------------------


class Short:
    """A model with little memory."""

    def __init__(self, model, most, error):
        self.model, self.most, self.error = model, most, error
        self.tried = []

    def log_prob(self, x):
        self.tried.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.model.log_prob(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_batches_are_halved_where_memory_is_short(flow, error):
    x = rows(100)
    model = Short(flow, 5, error)
    found = score(model, x, batch_rows=32).values["log_prob"]
    np.testing.assert_allclose(found, plain(flow, x), rtol=1e-5)
    assert model.tried[:4] == [32, 16, 8, 4]
    assert max(model.tried[4:]) == 4  # remembered
    with pytest.raises(type(error)):
        score(Short(flow, 0, error), x, batch_rows=32)
    with pytest.raises(RuntimeError, match="something else"):
        score(Short(flow, 5, RuntimeError("something else")), x, batch_rows=32)


def test_a_halved_batch_is_remembered_in_the_journal(flow, tmp_path):
    x, out = rows(300), tmp_path / "y.npy"
    options = {"batch_rows": 16, "chunk_rows": 16}

    class Module(torch.nn.Module):
        def __init__(self, most):
            super().__init__()
            self.flow, self.short = flow, Short(flow, most, MemoryError())

        def log_prob(self, x):
            return self.short.log_prob(x)

    with pytest.raises(OSError, match="gone"):
        score(Module(4), Held(x, fails_at=280, error=OSError("gone")), out, **options)
    again = Module(1000)
    score(again, Held(x), out, resume=True, **options)
    assert max(again.short.tried) == 4


def test_errors_stop_everything_promptly(flow, tmp_path, monkeypatch):
    x = rows(100_000)
    options = {"chunk_rows": 8, "batch_rows": 8}

    class Fails:
        calls = 0

        def log_prob(self, x):
            self.calls += 1
            if self.calls == 5:
                raise ZeroDivisionError("in the model")
            return flow.log_prob(x)

    def told(*_):
        raise KeyError("in progress")

    began = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="in the model"):
        score(Fails(), Held(x), tmp_path / "a.npy", **options)
    with pytest.raises(KeyError, match="in progress"):
        score(flow, Held(x), tmp_path / "b.npy", progress=told, **options)
    broken = Held(x, fails_at=50, error=AttributeError("in the reader"))
    with pytest.raises(AttributeError, match="in the reader"):
        score(flow, broken, tmp_path / "c.npy", **options)
    with pytest.raises(AttributeError, match="in the reader"):
        score(flow, broken, **options)
    add = sinks_module.ArraySink.add

    def short_add(self, piece):
        if piece.start > 30:
            raise OSError(errno.EIO, "in the writer")
        add(self, piece)

    monkeypatch.setattr(sinks_module.ArraySink, "add", short_add)
    with pytest.raises(OSError, match="in the writer"):
        score(flow, Held(x), **options)
    assert time.monotonic() - began < 20
    for name in ("a", "b", "c"):
        assert not (tmp_path / f"{name}.npy").exists()


def test_a_source_that_changes_is_noticed(flow, tmp_path):
    table = Held(rows(100))
    table.rows = 120
    with pytest.raises(ValueError, match="held: expected rows up to 120, found 100"):
        score(flow, table, batch_rows=50)


@pytest.mark.parametrize("after", [5 * 8, 200])
@pytest.mark.parametrize("change", ["rewritten", "replaced", "cut off"])
@pytest.mark.parametrize("source", ["x.npy", "x.npz", "x.arrow", "x.csv", "x.parquet"])
def test_a_file_that_changes_while_it_is_scored(flow, tmp_path, source, change, after):
    """Its rows are those of one version, or there is an error and no file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(path, x):
        table = pa.table({f"c{i}": x[:, i] for i in range(D)})
        if path.suffix == ".csv":
            np.savetxt(path, x, "%12.5f", ",", header=",".join("abcdef"), comments="")
        elif path.suffix == ".parquet":
            pq.write_table(table, path, row_group_size=16)
        elif path.suffix == ".arrow":
            with pa.ipc.new_file(path, table.schema) as file:
                file.write_table(table, 16)
        else:
            (np.save if path.suffix == ".npy" else np.savez)(path, x)

    path, out = tmp_path / source, tmp_path / "y.npy"
    options = {"chunk_rows": 8, "batch_rows": 8}
    write(path, rows(200, 1))
    other = path.read_bytes()
    write(path, rows(200))
    whole = score(flow, path, tmp_path / "whole.npy", **options).path.read_bytes()
    first, stat = path.read_bytes(), path.stat()

    def told(done, *_):
        if done != after:
            return
        if change == "cut off":
            os.truncate(path, len(first) // 3)
        elif change == "rewritten":
            path.write_bytes(other)
        else:
            (tmp_path / "new").write_bytes(other)
            (tmp_path / "new").replace(path)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with pytest.raises(ValueError, match=f"{source}: it was changed while it was read"):
        score(flow, path, out, progress=told, **options)
    assert not out.exists()
    kept = read(tmp_path / "y.npy.unfinished")
    assert len(kept.entries) >= (after // 8 - 3)  # two may wait to be written
    path.write_bytes(first)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    score(flow, path, out, resume=True, **options)
    assert out.read_bytes() == whole
    with pytest.raises(ValueError, match="changed while it was read"):
        score(flow, path, progress=told, batch_rows=8)


def test_default_batch_and_digest(flow):
    assert default_batch(nf.NICE(2, hidden=(4,)), 2, False) == 65536
    wide = nf.NICE(784, hidden=(1000,) * 5)
    assert default_batch(wide, 784, False) == 4096
    assert default_batch(wide, 784, True) < 4096
    assert digest(flow) == digest(flow)
    assert digest(flow) != digest(make(D, activation="tanh"))
    assert digest(Gaussian.full(torch.from_numpy(rows()))) is not None
    assert digest(Gaussian.full(torch.from_numpy(rows()))) != digest(
        Gaussian.full(torch.from_numpy(rows(seed=1)))
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(flow, tmp_path):
    x = rows(10_000)
    x[[3, 7777]] = np.nan
    options = {"outputs": ["log_prob", "gradient"], "batch_rows": 128, "chunk_rows": 1024}
    host = score(flow, x, **options)
    device = score(flow, x, device="cuda", **options)
    assert device.bad_rows == host.bad_rows
    np.testing.assert_allclose(device.values["log_prob"], host.values["log_prob"], rtol=1e-4)
    score(flow, Held(x), tmp_path / "y.npy", device="cuda", **options)
    columns = [device.values["log_prob"][:, None], device.values["gradient"]]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.concatenate(columns, 1))


# --- processes -------------------------------------------------------------------------------

MEMORY = """
import resource, sys
import torch, nicefast as nf
from nicefast.scoring import score
torch.manual_seed(0)
model = nf.NICE(64, hidden=(8,), couplings=2)
found = score(model, sys.argv[1], sys.argv[2], batch_rows=4096)
print(found.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def run(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_memory_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for i, count in enumerate((70_000, 700_000)):
        source = tmp_path / f"x{i}.npy"
        np.lib.format.open_memmap(source, "w+", np.float32, (count, 64))  # 179 MB of holes
        process = run(MEMORY, source, tmp_path / f"y{i}.npy")
        said, errors = process.communicate()
        assert process.returncode == 0, errors
        done, peak = map(int, said.split())
        assert done == count
        peaks.append(peak / 1024)
    assert abs(peaks[1] - peaks[0]) < 25, peaks


RANKS = """
import json, sys
from pathlib import Path
import numpy as np, torch, nicefast as nf
from nicefast.runtime.ranks import process_group
from nicefast.scoring import score
place = Path(sys.argv[1])
options = {"chunk_rows": 16, "batch_rows": 8, "outputs": ["log_prob", "z"]}
with process_group(torch.device("cpu")) as ranks:
    for source in ("x.npy", "x.csv"):
        for kind in (".npy", ".csv", ".parquet"):
            found = score(place / "model.safetensors", place / source,
                          place / f"two-{source}{kind}", **options)
            print(json.dumps([found.rows, found.bad, found.bad_rows]))
    try:
        score(place / "model.safetensors", place / "x.npy", place / "strict.csv", strict=True,
              **options)
    except (ValueError, RuntimeError) as error:
        print(error)
"""


def test_two_ranks_write_what_one_does(flow, tmp_path):
    x = rows(153)
    x[[17, 141]] = np.nan
    np.save(tmp_path / "x.npy", x)
    np.savetxt(tmp_path / "x.csv", x, "%.9g", ",")
    nf.save(flow, tmp_path / "model.safetensors")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    two = [run(RANKS, tmp_path, RANK=str(i), **common) for i in range(2)]
    said = []
    for process in two:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        said.append(out.splitlines())
    for lines in said:
        assert [json.loads(line) for line in lines[:6]] == [[153, 2, [17, 141]]] * 6
    errors = [lines[6] for lines in said]
    assert any("row 17 holds values" in e for e in errors)
    options = {"chunk_rows": 16, "batch_rows": 8, "outputs": ["log_prob", "z"]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for source in ("x.npy", "x.csv"):
            for kind in KINDS:
                one = tmp_path / f"one-{source}{kind}"
                score(tmp_path / "model.safetensors", tmp_path / source, one, **options)
                two = tmp_path / f"two-{source}{kind}"
                assert one.read_bytes() == two.read_bytes()
        # what two have left unfinished, one completes
        journals = tmp_path / "strict.csv.unfinished"
        assert {p.name for p in journals.glob("journal*")} == {"journal.jsonl", "journal.1.jsonl"}
        assert len(read(journals).entries) > 1
        score(
            tmp_path / "model.safetensors", tmp_path / "x.npy", tmp_path / "strict.csv",
            resume=True, **options,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    expected = (tmp_path / "one-x.npy.csv").read_bytes()
    assert (tmp_path / "strict.csv").read_bytes() == expected
