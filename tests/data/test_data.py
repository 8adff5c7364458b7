"""nicefast.data: named sets and where they lie, fixed splits, downloads."""

import gzip
import hashlib
import os
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nicefast.data import DATASETS, Dataset, Source, inventory, load_data, sources, split_rows
from nicefast.data import datasets as module

REAL = os.environ.get("NICEFAST_DATA")  # where the official files are, if anywhere


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path):
    """No data set is found but where a test puts it, and nothing is downloaded."""
    monkeypatch.delenv("NICEFAST_DATA", raising=False)
    monkeypatch.setattr(sources, "FOLDERS", ("data",))
    monkeypatch.setattr(sources, "urlopen", lambda url, **_: pytest.fail(f"opened {url}"))
    monkeypatch.chdir(tmp_path)


def test_digits_are_the_1797_images_with_17_levels():
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    data = load_data("digits")
    assert (data.levels, data.event_shape, data.features) == (17, (1, 8, 8), 64)
    rows = torch.cat([data.train, data.validation, data.test])
    assert rows.shape == (1797, 1, 8, 8)
    assert rows.dtype == torch.uint8
    assert (rows.min(), rows.max()) == (0, 16)


@pytest.mark.parametrize("count", [20, 21, 99, 1797])
def test_split_is_disjoint_complete_and_fixed(count):
    parts = split_rows(count)
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert min(len(part) for part in parts) >= 2
    torch.manual_seed(1234)  # the split must not follow the global seed
    np.random.seed(1234)
    assert all(torch.equal(a, b) for a, b in zip(parts, split_rows(count), strict=True))


def test_split_never_changes():
    train, validation, test = split_rows(1797)
    assert (len(train), len(validation), len(test)) == (1258, 180, 359)
    assert train[:5].tolist() == [1081, 1707, 927, 713, 262]
    assert test[:5].tolist() == [455, 584, 147, 160, 1111]


def test_split_needs_rows():
    with pytest.raises(ValueError, match=r"at least 20 rows.*got 19"):
        split_rows(19)


def test_floats_stay_as_they_are(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 3))
    np.save(tmp_path / "table.npy", values)
    data = load_data(tmp_path / "table.npy")
    assert not data.discrete
    assert (data.name, data.levels, data.event_shape) == ("table", None, (3,))
    train, _, test = split_rows(50)
    assert torch.equal(data.train, torch.from_numpy(values)[train].float())
    assert torch.equal(data.test, torch.from_numpy(values)[test].float())


@pytest.mark.parametrize(
    ("dtype", "top", "kept"),
    [("u1", 255, torch.uint8), (">i4", 300, torch.int32), ("bool", 1, torch.uint8)],
)
def test_integers_are_levels(tmp_path, dtype, top, kept):
    values = np.random.default_rng(0).integers(0, top + 1, size=(40, 2, 2))
    values[0] = top
    np.save(tmp_path / "levels.npy", values.astype(dtype))
    data = load_data(str(tmp_path / "levels.npy"))
    assert (data.levels, data.event_shape, data.train.dtype) == (top + 1, (2, 2), kept)
    assert torch.equal(data.train.long(), torch.from_numpy(values)[split_rows(40)[0]])


def test_bools_have_two_levels(tmp_path):
    np.save(tmp_path / "bits.npy", np.zeros((40, 3), bool))
    data = load_data(tmp_path / "bits.npy")
    assert (data.levels, data.train.dtype, data.discrete) == (2, torch.uint8, True)


@pytest.mark.parametrize(("low", "high"), [(-3, 5), (-1, 2**31 - 1), (0, 2**16), (-(2**31), 0)])
def test_other_integers_are_a_table(tmp_path, low, high):
    values = np.random.default_rng(0).integers(low, high + 1, size=(40, 3))
    values[0], values[1] = low, high
    np.save(tmp_path / "table.npy", values)
    data = load_data(tmp_path / "table.npy")
    assert (data.levels, data.train.dtype, data.discrete) == (None, torch.int32, True)
    assert torch.equal(data.test.long(), torch.from_numpy(values)[split_rows(40)[2]])


def test_the_largest_level(tmp_path):
    np.save(tmp_path / "levels.npy", np.arange(2**16).reshape(-1, 2))
    assert load_data(tmp_path / "levels.npy").levels == 2**16


BAD = {
    "too_large": (np.full((30, 2), 1e300), "not finite in float32"),
    "nan": (np.full((30, 2), np.nan), "not finite"),
    "complex": (np.ones((30, 2), complex), "complex"),
    "one_dimension": (np.ones(30), r"\(30,\)"),
    "few_rows": (np.ones((19, 2)), r"at least 20 rows.*\(19, 2\)"),
    "one_feature": (np.ones((30, 1)), "2 features"),
    "constant": (np.full((30, 2), -1), "differ, got -1 everywhere"),
    "beyond": (np.arange(60).reshape(30, 2) + 2**31, "32-bit integers, got .* to 2147483707"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_named(tmp_path, name):
    array, reason = BAD[name]
    np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(ValueError, match=f"{name}.npy: .*{reason}"):
        load_data(tmp_path / f"{name}.npy")


def test_files_of_other_formats_are_data_too(tmp_path):
    rows = np.arange(60).reshape(30, 2)
    np.savetxt(tmp_path / "table.csv", rows, fmt="%d", delimiter=",", header="a,b", comments="")
    np.savez(tmp_path / "table.npz", X=rows)
    (tmp_path / "table-idx2-ubyte").write_bytes(idx(rows))
    for name in ("table.csv", "table.npz", "table-idx2-ubyte"):
        data = load_data(tmp_path / name)
        assert (data.name, data.levels) == (Path(name).stem, 60)
        assert torch.equal(data.train.long(), torch.from_numpy(rows)[split_rows(30)[0]])
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        load_data(tmp_path / "none.csv")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"one of digits, mnist, .* path of a file, got 'mnits'"):
        load_data("mnits")


def test_a_data_set_is_added_by_a_function(monkeypatch):
    rows = torch.zeros(20, 3, dtype=torch.uint8)
    source = Source("my own", "by me", lambda name, _: Dataset(name, 2, rows, rows, rows))
    monkeypatch.setitem(DATASETS, "mine", source)
    assert load_data("mine").levels == 2
    assert inventory()[-1].found


# Small sets in the official formats; each returns the images in the order of the files.


def idx(values):
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return head + values.astype("u1").tobytes()


def pixels(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape).astype("u1")


def write_mnist(folder, packed=True, first=(5, 0, 4, 1, 9, 2, 1, 3, 1, 4)):
    train, test = pixels(30, 28, 28), pixels(8, 28, 28)
    labels = np.resize(first, 30)
    files = {"train-images-idx3": train, "train-labels-idx1": labels}
    files |= {"t10k-images-idx3": test, "t10k-labels-idx1": labels[:8]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        content = idx(values)
        path = folder / f"{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return train[:, None], test[:, None]


def write_cifar10(folder):
    train, test = pixels(25, 3, 32, 32), pixels(6, 3, 32, 32)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {f"data_batch_{n + 1}": train[5 * n : 5 * n + 5] for n in range(5)}
    for name, images in {**parts, "test_batch": test}.items():
        records = np.hstack([np.arange(len(images))[:, None], images.reshape(len(images), -1)])
        records.astype("u1").tofile(folder / f"{name}.bin")
    return train, test


def write_svhn(folder):
    io = pytest.importorskip("scipy.io", reason="writes the file with SciPy")
    train, test = pixels(31, 3, 32, 32), pixels(7, 3, 32, 32)
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in {"train": train, "test": test}.items():
        official = {"X": images.transpose(2, 3, 1, 0), "y": np.ones((len(images), 1), "u1")}
        io.savemat(folder / f"{name}_32x32.mat", official, do_compression=True)
    return train, test


WRITE = {
    "mnist": (write_mnist, (20, 10, 8), (1, 28, 28)),
    "fashion-mnist": (
        lambda folder: write_mnist(folder, first=range(10)),
        (20, 10, 8),
        (1, 28, 28),
    ),
    "cifar10": (write_cifar10, (20, 5, 6), (3, 32, 32)),
    "svhn": (write_svhn, (21, 10, 7), (3, 32, 32)),
}


@pytest.mark.parametrize("name", WRITE)
def test_images_have_their_official_split(tmp_path, monkeypatch, name):
    write, split, shape = WRITE[name]
    train, test = write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"expected \d0000|expected 73257.*{name}"):
        load_data(name, tmp_path)
    monkeypatch.setitem(module.SPLITS, name, split)
    data = load_data(name, tmp_path)
    assert (data.name, data.levels, data.event_shape, data.discrete) == (name, 256, shape, True)
    for part, rows in zip(
        (data.train, data.validation, data.test),
        (train[: split[0]], train[split[0] :], test),
        strict=True,
    ):
        assert part.dtype == torch.uint8
        assert np.array_equal(part.numpy(), rows)


def write_tfd(folder, **changes):
    io = pytest.importorskip("scipy.io", reason="writes the file with SciPy")
    folds = np.tile(np.array([[0, 1, 2, 3, 1, 0]]).T, (1, 5)).astype("f8")
    official = {"images": pixels(6, 48, 48), "labs_ex": folds[:, :1], "folds": folds, **changes}
    folder.mkdir(exist_ok=True)
    io.savemat(folder / "TFD_48x48.mat", official)
    return torch.from_numpy(official["images"])[:, None]


def test_tfd_is_split_by_its_first_fold(tmp_path):
    images = write_tfd(tmp_path / "TFD")
    data = load_data("tfd", tmp_path)
    assert (data.levels, data.event_shape) == (256, (1, 48, 48))
    assert torch.equal(data.train, images[[0, 1, 4, 5]])
    assert torch.equal(data.validation, images[[2]])
    assert torch.equal(data.test, images[[3]])
    for folds, reason in ((np.ones((6, 5)), r"got \[0, 6\b"), (np.full((6, 5), 4.0), "4.0 to 4.0")):
        write_tfd(tmp_path / "TFD", folds=folds)
        with pytest.raises(ValueError, match=rf"TFD_48x48.mat: .*{reason}"):
            load_data("tfd", tmp_path)
    write_tfd(tmp_path / "TFD", images=pixels(6, 32, 32))
    with pytest.raises(ValueError, match=r"shape \(1, 48, 48\), got .*\(6, 32, 32\) of uint8"):
        load_data("tfd", tmp_path)


@pytest.mark.parametrize("file", ["tabular/adbench_cover.npz", "10_cover.npz"])
def test_tables_hold_integers_or_reals(tmp_path, file):
    rows = np.random.default_rng(0).integers(-500, 500, (50, 4))
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    np.savez(path, X=rows.astype(np.int16 if "adbench" in file else float), y=np.zeros(50))
    data = load_data("cover", tmp_path)
    assert (data.name, data.levels, data.train.dtype) == ("cover", None, torch.int32)
    assert torch.equal(data.train.long(), torch.from_numpy(rows)[split_rows(50)[0]])

    np.savez(path, X=rows / 8, y=np.zeros(50))
    with pytest.raises(ValueError, match="expected whole numbers in 'cover'"):
        load_data("cover", tmp_path)
    path.rename(path.with_name("adbench_magic_gamma.npz"))
    assert load_data("magic-gamma", tmp_path).train.dtype == torch.float32


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match="labels of 'fashion-mnist', got those of 'mnist'"):
        load_data("fashion-mnist", tmp_path)


def place(name):
    return next(entry.place for entry in inventory() if entry.name == name)


def test_where_files_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FOLDERS", ("data", str(tmp_path / "system")))
    assert place("mnist") is None
    write_mnist(tmp_path / "system" / "mnist")
    assert place("mnist") == tmp_path / "system" / "mnist"
    write_mnist(tmp_path / "data", packed=False)
    assert place("mnist") == Path("data")
    write_mnist(tmp_path / "data" / "MNIST" / "raw", packed=False)
    assert place("mnist") == Path("data/MNIST/raw")
    write_mnist(tmp_path / "data" / "mnist")
    assert place("mnist") == Path("data/mnist")
    (tmp_path / "data" / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()  # no longer whole
    assert place("mnist") == Path("data/MNIST/raw")

    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setenv("NICEFAST_DATA", os.pathsep.join(["", str(one), str(two)]))
    assert place("mnist") is None
    write_mnist(two)
    assert place("mnist") == two
    write_mnist(one)
    assert place("mnist") == one
    here = {entry.name: entry.place for entry in inventory(two)}
    assert here["mnist"] == two
    assert here["svhn"] is None


def test_the_inventory_says_what_is_missing(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    entries = {entry.name: entry for entry in inventory(tmp_path)}
    assert list(entries) == list(DATASETS)
    cifar = entries["cifar10"]
    assert (cifar.found, cifar.place, cifar.missing) == (False, None, ("data_batch_3.bin",))
    assert tmp_path / "cifar10" in cifar.looked_in
    assert (entries["tfd"].downloads, cifar.downloads) == (False, True)
    with pytest.raises(ValueError, match=r"missing data_batch_3.bin; looked in .*--download"):
        load_data("cifar10", tmp_path)
    with pytest.raises(
        ValueError, match=r"--data-dir or NICEFAST_DATA.* on request only"
    ) as caught:
        load_data("tfd", tmp_path, download=True)
    assert "--download" not in str(caught.value)


def serve(monkeypatch, name, folder, files):
    """Take the data set's files from a folder, over file:// URLs."""
    from urllib.request import urlopen

    monkeypatch.setattr(sources, "urlopen", urlopen)
    digests = [hashlib.md5((folder / file).read_bytes()).hexdigest() for file in files]
    urls = [(folder / file).as_uri() for file in files]
    remote = tuple(zip(urls, digests, strict=True))
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], remote=remote))


def test_what_is_missing_is_downloaded_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(module.SPLITS, "mnist", (20, 10, 8))
    train, _ = write_mnist(tmp_path / "server")
    files = sorted(path.name for path in (tmp_path / "server").iterdir())
    serve(monkeypatch, "mnist", tmp_path / "server", files)
    target = tmp_path / "here" / "mnist"
    with pytest.raises(ValueError, match="not found"):
        load_data("mnist", tmp_path / "here")
    assert not target.exists()
    data = load_data("mnist", tmp_path / "here", download=True)
    assert np.array_equal(data.train.numpy(), train[:20])
    assert sorted(path.name for path in target.iterdir()) == files

    (target / files[0]).unlink()
    times = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    load_data("mnist", tmp_path / "here", download=True)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    monkeypatch.setattr(sources, "urlopen", lambda url, **_: pytest.fail(f"opened {url}"))
    load_data("mnist", tmp_path / "here", download=True)


def test_a_download_with_a_wrong_digest_leaves_nothing(tmp_path, monkeypatch):
    write_mnist(tmp_path / "server")
    files = sorted(path.name for path in (tmp_path / "server").iterdir())
    serve(monkeypatch, "mnist", tmp_path / "server", files)
    (tmp_path / "server" / files[1]).write_bytes(b"something else")
    with pytest.raises(ValueError, match=rf"{files[1]}: expected MD5 \w+, got \w+; nothing kept"):
        load_data("mnist", tmp_path / "here", download=True)
    assert [path.name for path in (tmp_path / "here" / "mnist").iterdir()] == files[:1]
    (tmp_path / "server" / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"{files[1]}: could not be downloaded to .*here"):
        load_data("mnist", tmp_path / "here", download=True)
    assert [path.name for path in (tmp_path / "here" / "mnist").iterdir()] == files[:1]


def test_an_archive_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setitem(module.SPLITS, "cifar10", (20, 5, 6))
    train, _ = write_cifar10(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "readme.html").write_text("more")
    (tmp_path / "server").mkdir()
    with tarfile.open(tmp_path / "server" / "cifar.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    serve(monkeypatch, "cifar10", tmp_path / "server", ["cifar.tar.gz"])
    data = load_data("cifar10", tmp_path / "here", download=True)
    assert np.array_equal(data.validation.numpy(), train[20:])
    names = {path.name for path in (tmp_path / "here" / "cifar10").iterdir()}
    assert names == {names[0] for names in DATASETS["cifar10"].files}


@pytest.mark.parametrize(
    ("name", "split", "dtype"),
    [
        ("mnist", (50_000, 10_000, 10_000), torch.uint8),
        ("fashion-mnist", (50_000, 10_000, 10_000), torch.uint8),
        ("cifar10", (40_000, 10_000, 10_000), torch.uint8),
        ("cover", (200_233, 28_605, 57_210), torch.int32),
        ("shuttle", (34_368, 4_910, 9_819), torch.int32),
        ("magic-gamma", (13_314, 1_902, 3_804), torch.float32),
    ],
)
def test_real_data(monkeypatch, name, split, dtype):
    if REAL is None:
        pytest.skip("needs the official files: NICEFAST_DATA is not set")
    monkeypatch.setenv("NICEFAST_DATA", REAL)
    if place(name) is None:
        pytest.skip(f"{name} is not in {REAL}")
    data = load_data(name)
    assert (len(data.train), len(data.validation), len(data.test)) == split
    assert data.train.dtype == dtype


def test_real_mnist_is_the_official_one(monkeypatch):
    if REAL is None:
        pytest.skip("needs the official files: NICEFAST_DATA is not set")
    monkeypatch.setenv("NICEFAST_DATA", REAL)
    if place("mnist") is None:
        pytest.skip(f"mnist is not in {REAL}")
    data = load_data("mnist")
    for images, official in (
        (torch.cat([data.train, data.validation]), "6bbc9ace898e44ae57da46a324031adb"),
        (data.test, "2646ac647ad5339dbf082846283269ea"),
    ):
        head = struct.pack(">4I", 0x803, len(images), 28, 28)
        assert hashlib.md5(head + images.numpy().tobytes()).hexdigest() == official


@pytest.mark.parametrize("wrong", [1.5, True, ["digits"]])
def test_what_is_no_path_is_named(wrong):
    with pytest.raises(TypeError, match="source must be a path, got "):
        load_data(wrong)
    with pytest.raises(TypeError, match="data_dir must be a path, got "):
        load_data("digits", wrong)
