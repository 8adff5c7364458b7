"""nicefast.data.readers: every format written by hand and read back; what is broken is refused."""

import gzip
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest

from nicefast.data.readers import has_format, read

IDX = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


pytestmark = pytest.mark.filterwarnings("ignore:.*the first line holds numbers")


def idx(values, code):
    head = struct.pack(f">HBB{values.ndim}I", 0, code, values.ndim, *values.shape)
    return head + values.astype(IDX[code]).tobytes()


def integers(shape, dtype="u1", top=100):
    return np.random.default_rng(0).integers(0, top, shape).astype(dtype)


def refused(path, reason="."):
    with pytest.raises(ValueError, match=reason) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("code", IDX)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 2)])
def test_idx(tmp_path, code, shape, packed):
    values = integers(shape) - (0 if code == 0x08 else 50)
    path = tmp_path / "train-images-idx3-ubyte"
    content = idx(values, code)
    path.write_bytes(gzip.compress(content) if packed else content)
    got = read(path).values
    assert got.dtype == np.dtype(IDX[code]).newbyteorder("=")
    assert np.array_equal(got, values.astype(IDX[code]))


def test_cifar(tmp_path):
    labels, pixels = integers((6, 1), top=10), integers((6, 3072), top=256)
    np.hstack([labels, pixels]).tofile(tmp_path / "data_batch_1.bin")
    got = read(tmp_path / "data_batch_1.bin")
    assert np.array_equal(got.labels, labels[:, 0])
    assert np.array_equal(got.values, pixels.reshape(6, 3, 32, 32))
    assert got.values.dtype == np.uint8


@pytest.mark.parametrize("packed", [False, True])
def test_svhn(tmp_path, packed):
    io = pytest.importorskip("scipy.io", reason="writes the file with SciPy")
    images, digits = integers((12, 3, 32, 32), top=256), np.arange(12) % 10
    labels = np.where(digits == 0, 10, digits)[:, None].astype("u1")
    path = tmp_path / "train_32x32.mat"
    official = {"X": images.transpose(2, 3, 1, 0), "y": labels}
    io.savemat(path, official, do_compression=packed)
    got = read(path)
    assert got.values.dtype == np.uint8
    assert np.array_equal(got.values, images)
    assert np.array_equal(got.labels, digits)
    assert np.array_equal(read(path, key="X").values, official["X"])


@pytest.mark.parametrize("size", [48, 96])
@pytest.mark.parametrize("rows_first", [True, False])
def test_tfd(tmp_path, size, rows_first):
    io = pytest.importorskip("scipy.io", reason="writes the file with SciPy")
    images, folds = integers((9, size, size), top=256), integers((9, 5), top=4)
    labels = np.array([[-1, 1, 2, 3, 4, 5, 6, 7, -1]]).T.astype("f8")
    path = tmp_path / f"TFD_{size}x{size}.mat"
    held = images if rows_first else images.transpose(1, 2, 0)
    official = {"images": held, "labs_ex": labels, "labs_id": labels, "folds": folds}
    io.savemat(path, official, do_compression=True)
    got = read(path)
    assert np.array_equal(got.values, images)
    assert np.array_equal(got.labels, labels[:, 0])
    assert np.array_equal(read(path, key="folds").values, folds)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_mat_has_every_class_of_number(tmp_path, dtype, packed):
    io = pytest.importorskip("scipy.io", reason="writes the file with SciPy")
    values = integers((6, 5), dtype)
    others = {"note": "text", "cell": np.array([[1, "a"]], object), "record": {"a": 1}}
    path = tmp_path / "table.mat"
    io.savemat(path, {**others, "values": values, "one": np.array([[3]])}, do_compression=packed)
    got = read(path, key="values").values
    assert (got.dtype, got.tolist()) == (values.dtype, values.tolist())
    assert read(path, key="one").values.tolist() == [[3]]  # lies in the tag itself
    refused(path, "expected an array called 'X' or 'images', found .*values, one")


def test_npy_is_mapped(tmp_path):
    values = np.asfortranarray(integers((5, 4), ">i2"))
    np.save(tmp_path / "table.npy", values)
    got = read(tmp_path / "table.npy").values
    assert isinstance(got, np.memmap)
    assert np.array_equal(got, values)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    path, x, y = tmp_path / "table.npz", integers((8, 3), ">i4"), np.arange(8)
    save(path, X=np.asfortranarray(x), y=y, more=y)
    assert np.array_equal(read(path).values, x)
    assert np.array_equal(read(path).labels, y)
    assert np.array_equal(read(path, key="more").values, y)
    save(path, x_train=x, y_train=y, x_test=x)
    assert np.array_equal(read(path).labels, y)
    save(path, x)
    assert np.array_equal(read(path).values, x)
    assert read(path).labels is None
    save(path, a=x, b=x)
    refused(path, "'X' or 'x_train', found a, b")


@pytest.mark.parametrize(
    ("text", "columns", "values"),
    [
        ("1,2\n3,-4\n", None, [[1, 2], [3, -4]]),
        ('\ufeffa,"b c"\r\n1,2\r\n\r\n3,4', ("a", "b c"), [[1, 2], [3, 4]]),
        ("1,2\n3,4.5\n1e2, 6", None, [[1.0, 2.0], [3.0, 4.5], [100.0, 6.0]]),
    ],
)
def test_csv(tmp_path, text, columns, values):
    (tmp_path / "table.csv").write_text(text, encoding="utf-8", newline="")
    got = read(tmp_path / "table.csv")
    assert (got.columns, got.values.tolist()) == (columns, values)
    assert got.values.dtype == (np.float64 if isinstance(values[0][0], float) else np.int64)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1,2\n1,2,3\n", "line 3: expected 2 cells, found 3"),
        ("1,2\n3\n", "line 2: expected 2 cells, found 1"),
        ("1,2\n3,x\n", "line 2, column 2: expected a number, found 'x'"),
        ("a,2\n3,4\n", "line 1, column 1: expected a number, found 'a'"),
        ("1,2\n1_0,4\n", "line 2, column 1: expected a number, found '1_0'"),
        ("1,2\n,4\n", "line 2, column 1: expected a number, found ''"),
        ("a,b\n1,2\n3,nan\n", r"not finite: nan at \(1, 1\), column 'b'"),
        ("1,2\n1e999,4\n", r"not finite: inf at \(1, 0\)"),
        ("a,b\n", "no rows"),
        ("\n\n", "no rows"),
        ('1,2\n"3,4\n', "line 2"),
    ],
)
def test_bad_csv_is_named_by_its_line(tmp_path, text, reason):
    (tmp_path / "table.csv").write_text(text)
    refused(tmp_path / "table.csv", reason)


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    path, columns = tmp_path / "table.parquet", {"a": [1, 2, 3], "b": [0.5, 1.5, 2.5]}
    pq.write_table(pa.table(columns), path)
    got = read(path)
    assert got.columns == ("a", "b")
    assert got.values.tolist() == [[1, 0.5], [2, 1.5], [3, 2.5]]

    pq.write_table(pa.table({"a": [1, 2], "b": pa.array([1, 2], pa.int16())}), path)
    assert read(path).values.dtype == np.int64
    for bad, reason in (
        (["x", "y"], "column 'b': .*string"),
        ([1, None], "column 'b': 1 .*missing"),
    ):
        pq.write_table(pa.table({"a": [1, 2], "b": bad}), path)
        refused(path, reason)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"table.parquet: .*needs pyarrow: pip install"):
        read(tmp_path / "table.parquet")


def mat_element(name, values, size=None, code=9):
    """A MATLAB 5 matrix element of doubles; ``size`` is what it claims of its values."""

    def tag(kind, data, size=None):
        return struct.pack("<II", kind, size or len(data)) + data + b"\0" * (-len(data) % 8)

    flags, shape = struct.pack("<II", 6, 0), struct.pack("<2i", *values.shape)
    parts = tag(6, flags), tag(5, shape), tag(1, name), tag(code, values.T.tobytes(), size)
    return tag(14, b"".join(parts))


MAT_HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


def packed_element(element):
    packed = zlib.compress(element)
    return struct.pack("<II", 15, len(packed)) + packed


TABLE = integers((10, 4), "f8")
BYTES = {
    "images-idx2-ubyte": idx(TABLE, 0x08),
    "images-idx2-ubyte.gz": gzip.compress(idx(TABLE, 0x08)),
    "batch.bin": bytes(2 * 3073),
    "table.mat": MAT_HEADER + mat_element(b"X", TABLE),
    "packed.mat": MAT_HEADER + packed_element(mat_element(b"X", TABLE)),
}
NAMES = [*BYTES, "table.npy", "table.npz", "table.parquet"]


def made(name, tmp_path):
    """A small file of a format that knows its own length."""
    x, path = TABLE, tmp_path / name
    if name.endswith(".npy"):
        np.save(path, x)
    elif name.endswith(".npz"):
        np.savez_compressed(path, X=x)
    elif name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"a": x[:, 0]}), path)
    else:
        path.write_bytes(BYTES[name])
    return path


@pytest.mark.parametrize("name", NAMES)
def test_no_truncated_or_lengthened_file_is_read(tmp_path, name):
    path = made(name, tmp_path)
    whole = path.read_bytes()
    assert len(read(path).values) in (2, 10)
    step = 1 if len(whole) < 1000 else 37
    for length in range(0, len(whole), step):
        # The records of .bin have no header: a whole number of them is a shorter file.
        if not name.endswith(".bin") or length not in (0, 3073):
            path.write_bytes(whole[:length])
            refused(path)
    path.write_bytes(whole + b"\1")
    if not name.endswith(".npz"):  # the archive's directory is found from behind, past a comment
        refused(path)


@pytest.mark.parametrize("name", ["images-idx2-ubyte", "images-idx2-ubyte.gz"])
def test_no_flipped_byte_of_an_idx_header_is_read(tmp_path, name):
    path = made(name, tmp_path)
    whole = path.read_bytes()
    for at in range(12 if name.endswith("byte") else 3):
        for flip in (0x80, 0xFF, 0x10):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            refused(path)


@pytest.mark.parametrize("name", ["table.mat", "packed.mat", "table.npy", "table.npz"])
def test_a_flipped_byte_is_refused_or_does_no_harm(tmp_path, name):
    path = made(name, tmp_path)
    whole, read_all = path.read_bytes(), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1 :])
        try:
            content = read(path)
        except ValueError as why:
            assert str(why).startswith(f"{path}: ")  # noqa: PT017
        else:
            read_all += 1
            if name in ("packed.mat", "table.npz"):  # these have checksums
                assert np.array_equal(content.values, TABLE)
    assert read_all < len(whole)


LIES = """
import resource, sys
from nicefast.data.readers import read
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    try:
        read(path)
        print(path, "was read")
    except ValueError as why:
        print("MemoryError" if "MemoryError" in str(why) else "refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_header_that_lies_takes_no_memory(tmp_path):
    """Headers that promise 4 GiB to 16 EiB, to a process that may take one more GiB."""
    giant = struct.pack(">HBB3I", 0, 0x08, 3, 2**32 - 1, 2**32 - 1, 1) + bytes(100)
    (tmp_path / "plain-idx3-ubyte").write_bytes(giant)
    (tmp_path / "packed-idx3-ubyte.gz").write_bytes(gzip.compress(giant))
    lie = mat_element(b"X", np.ones((10, 4)), 2**32 - 16)
    (tmp_path / "plain.mat").write_bytes(MAT_HEADER + lie)
    for name, inside in (("element", lie), ("matrix", struct.pack("<II", 14, 2**32 - 16) + lie)):
        (tmp_path / f"{name}.mat").write_bytes(MAT_HEADER + packed_element(inside))
    for name, dtype in (("table", "<f8"), ("text", "<U0"), ("none", "|V0")):
        head = str({"descr": dtype, "fortran_order": False, "shape": (2**40, 4)}).ljust(117) + "\n"
        npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + bytes(320)
        (tmp_path / f"{name}.npy").write_bytes(npy)
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("X.npy", npy)
    files = sorted(map(str, tmp_path.iterdir()))
    command = [sys.executable, "-c", LIES, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[:-1] == ["refused"] * len(files)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_pickles_are_never_opened(tmp_path):
    traps = np.array([[Trap()] * 2] * 30)
    np.save(tmp_path / "objects.npy", traps, allow_pickle=True)
    np.savez(tmp_path / "objects.npz", X=traps, allow_pickle=True)
    (tmp_path / "pickle").write_bytes(b"\x80\x04N.")
    refused(tmp_path / "objects.npy", "Python objects")
    refused(tmp_path / "objects.npz", "Python objects")
    refused(tmp_path / "pickle", "expected the magic bytes 00 00 of IDX.*found 80 04 4e 2e")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.ones((3, 2), complex), "complex numbers .complex128"),
        (np.array([["a", "b"]]), "text .<U1"),
        (np.array(["2020"], "M8[Y]"), "no numbers .datetime64"),
        (np.zeros(3, [("a", "f4")]), "no numbers"),
        (np.array([[1.0, np.nan]]), r"not finite: nan at \(0, 1\)"),
        (np.array([[1.0], [-np.inf]], "f2"), r"not finite: -inf at \(1, 0\)"),
        (np.ones((0, 4)), r"no rows: shape \(0, 4\)"),
        (np.array(1.0), r"no rows: shape \(\)"),
    ],
)
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_what_are_no_finite_numbers_is_named(tmp_path, values, reason, ending):
    path = tmp_path / f"table.{ending}"
    np.savez(path, X=values) if ending == "npz" else np.save(path, values)
    refused(path, reason)


def test_bad_files_are_named(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    refused(tmp_path / "none.csv", "no such file")
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "folder.npy", "folder or a device")
    for name in ("e.npy", "e.npz", "e.csv", "e.mat", "e.bin", "e.parquet", "e"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "it is empty")
        if name not in ("e.csv", "e.bin"):
            (tmp_path / name).write_bytes(b"wrong magic " * 100)
            refused(tmp_path / name, "expected|not a readable")
    (tmp_path / "e.bin").write_bytes(bytes(3074))
    refused(tmp_path / "e.bin", "records of 3073 bytes, found 3074 bytes")
    (tmp_path / "e.bin").write_bytes(bytes(3073) + b"\x0a" + bytes(3072))
    refused(tmp_path / "e.bin", r"labels 0 \.\. 9, found 10 in record 1")
    (tmp_path / "e.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(9))
    refused(tmp_path / "e.mat", "MATLAB 7.3: save it with -v7")
    (tmp_path / "e.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"e.csv: key selects .*got 'X'"):
        read(tmp_path / "e.csv", key="X")


def test_svhn_labels_and_complex_arrays_are_checked(tmp_path):
    io = pytest.importorskip("scipy.io", reason="writes the file with SciPy")
    path, images = tmp_path / "test_32x32.mat", integers((32, 32, 3, 4))
    io.savemat(path, {"X": images, "y": np.array([[1, 2, 3, 11]]).T})
    refused(path, r"labels 1 \.\. 10, found 1\.\.11")
    io.savemat(path, {"X": images, "y": np.array([[1, 2, 3]]).T})
    refused(path, "expected 4 labels, found 3")
    io.savemat(path, {"X": np.ones((3, 2)) * 1j})
    refused(path, "'X' holds complex numbers")


def test_only_named_endings_are_formats():
    assert has_format("a.NPZ")
    assert not has_format("digits")
    assert not has_format("table.txt")
