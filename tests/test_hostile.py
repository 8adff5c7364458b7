"""Files that claim much, point elsewhere or are damaged: one clear error, in little memory."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc

import nicefast as nf
from nicefast.data import readers
from nicefast.scoring.tables import arrays, open_table

MEASURE = """
import sys
from pathlib import Path
from nicefast.data import readers
from nicefast.scoring.tables import open_table

def held():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) >> 10

for path in sys.argv[1:]:
    for way in (readers.read, lambda p: [len(b.values) for b in open_table(p).blocks(1 << 16)][:0]):
        before = held()
        try:
            way(path)
            said = "read"
        except ValueError as why:
            said = "refused" if str(why).startswith(path) and "\\n" not in str(why) else str(why)
        print(said, held() - before)
"""


def measured(*paths):
    """What reader and table say of each file, and MiB by which the process grew meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    return [(said, int(grown)) for said, grown in lines]


def refusal(path, *args, **kwargs):
    with pytest.raises(ValueError, match=r".") as caught:
        list(open_table(path, *args, **kwargs).blocks(100))
    assert str(caught.value).startswith(f"{str(path).split('::', maxsplit=1)[0]}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


linux = pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")


@linux
def test_a_long_csv_line_takes_little_memory(tmp_path):
    one, quoted, later = (tmp_path / f"{name}.csv" for name in ("one", "quoted", "later"))
    one.write_bytes(b"1," * 50_000_000)
    quoted.write_bytes(b'"1\n",' * 20_000_000)
    later.write_bytes(b"1,1\n" * 500 + b"1," * 50_000_000)
    for said, grown in measured(one, quoted, later):
        assert said == "refused"
        assert grown < 600
    for path in (one, quoted):
        assert "expected rows of at most 4194304 characters, found a longer one" in refusal(path)
    assert "line 501" in refusal(later)


def test_many_csv_cells_are_refused_and_long_rows_read(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_text(",".join(["1"] * 70_000))
    assert "line 1: expected 65536 cells at most, got 70000" in refusal(path)
    row = ",".join(["1." + "5" * 900] * 3000)  # 2.7 MB
    path.write_text(f"{row}\n{row}\n")
    assert open_table(path).features == 3000
    assert sum(len(block.values) for block in open_table(path).blocks(10)) == 2
    assert readers.read(path).values.shape == (2, 3000)


def test_compressions_that_expand_without_bound_are_refused(tmp_path):
    path = tmp_path / "rows.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive, archive.open("X.npy", "w") as to:
        np.lib.format.write_array(to, np.zeros((10, 4)))
    assert "expected a member that is stored or deflated" in refusal(path)
    with pytest.raises(ValueError, match="stored or deflated"):
        readers.read(path)


def repeated(path, rows, kind):
    """A Parquet file of few bytes: one value, ``rows`` times."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([1.5]))
    column = column.cast(pa.float64())
    if kind == "list":
        column = pa.ListArray.from_arrays(pa.array([0, rows], pa.int32()), column)
    pq.write_table(pa.table({"a": column}), path, compression="zstd", write_statistics=False)
    assert path.stat().st_size < 200_000
    return path


@linux
def test_a_small_parquet_file_takes_little_memory(tmp_path):
    tall = repeated(tmp_path / "tall.parquet", 40_000_000, "rows")
    wide = repeated(tmp_path / "wide.parquet", 60_000_000, "list")
    found = measured(tall, wide)
    assert [said for said, _ in found] == ["refused", "read", "refused", "refused"]
    assert max(grown for _, grown in found) < 600
    assert "would take 480000000 bytes of memory" in refusal(wide)


def test_a_small_arrow_file_that_claims_wide_rows_is_refused(tmp_path):
    path = tmp_path / "sized.arrow"
    kind = pa.list_(pa.float32(), 2**30)
    with ipc.new_file(path, pa.schema([("a", kind)])):
        pass
    assert "a row would take 8589934592 bytes of memory" in refusal(path)


h5py = pytest.importorskip("h5py", reason="writes HDF5")


def test_hdf5_links_and_storage_elsewhere_are_refused(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.arange(40.0).tobytes())
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["rows"] = np.ones((10, 4))
    path = tmp_path / "external.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("rows", (10, 4), "f8", external=[(str(secret), 0, 320)])
    assert "dataset '/rows' has external storage, its values are in other files" in refusal(path)
    path = tmp_path / "virtual.h5"
    layout = h5py.VirtualLayout((10, 4), "f8")
    layout[:] = h5py.VirtualSource(str(other), "rows", (10, 4))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("rows", layout)
    assert "dataset '/rows' has virtual storage" in refusal(path)
    path = tmp_path / "link.h5"
    with h5py.File(path, "w") as file:
        file["rows"] = h5py.ExternalLink(str(other), "rows")
        file["group"] = h5py.ExternalLink(str(other), "/")
    for source in (path, f"{path}::rows", f"{path}::/group/rows"):
        assert "is a link to another file" in refusal(source)


@linux
def test_a_small_hdf5_file_takes_little_memory(tmp_path):
    wide, chunk, tall = (tmp_path / f"{name}.h5" for name in ("wide", "chunk", "tall"))
    with h5py.File(wide, "w") as file:
        file.create_dataset("x", (4, 2**30), "f4", chunks=(1, 1024))
    with h5py.File(chunk, "w") as file:
        file.create_dataset("x", (2**20, 1024), "f4", chunks=(2**18, 1024), compression="gzip")
    with h5py.File(tall, "w") as file:
        file.create_dataset("x", (2**22, 4), "f4", chunks=(1024, 4))
    found = measured(wide, chunk, tall)[1::2]
    assert [said for said, _ in found] == ["refused", "refused", "read"]
    assert max(grown for _, grown in found) < 600
    assert "a row would take 4294967296 bytes" in refusal(wide)
    assert "a chunk would take 1073741824 bytes" in refusal(chunk)


def test_a_damaged_hdf5_file_ends_another_process(tmp_path, monkeypatch):
    """Every damage is refused or harmless; the library may end its process, never ours."""
    path = tmp_path / "rows.h5"
    values = np.arange(400.0).reshape(100, 4)
    with h5py.File(path, "w") as file:
        file.create_dataset("rows", data=values, chunks=(10, 4), compression="gzip")
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    for _ in range(12):
        damaged = bytearray(whole)
        for place in draw.integers(0, len(whole), 8):
            damaged[place] ^= int(draw.integers(1, 256))
        path.write_bytes(damaged)
        try:
            list(open_table(path).blocks(30))
        except ValueError as why:
            assert str(why).startswith(f"{path}: ")  # noqa: PT017
    path.write_bytes(whole)
    dying = tmp_path / "dying.py"
    dying.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(arrays, "PROBE", dying)
    assert "the library ended with signal 11 when it read it" in refusal(path)


def test_the_probe_imports_no_torch_and_reads_what_is_there(tmp_path):
    path = tmp_path / "rows.h5"
    with h5py.File(path, "w") as file:
        file["group/rows"] = np.arange(12, dtype=">i2").reshape(3, 4)
        file["group/names"] = ["a", "b"]
    found = arrays._probed(path, None)
    assert (found["name"], found["shape"], found["dtype"]) == ("/group/rows", [3, 4], ">i2")
    assert "torch" not in Path(arrays.PROBE).read_text()
    assert next(open_table(path).blocks(5)).values.tolist() == np.arange(12).reshape(3, 4).tolist()


VALUES = np.arange(24.0).reshape(8, 3)
LISTS = VALUES.tolist()
VECTORS = {
    "list": pa.array(LISTS, pa.list_(pa.float64())),
    "large list": pa.array(LISTS, pa.large_list(pa.float32())),
    "fixed list": pa.array(LISTS, pa.list_(pa.float64(), 3)),
    "integers": pa.array(VALUES.astype(int).tolist(), pa.list_(pa.int16(), 3)),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(VALUES.reshape(8, 1, 3)),
    "nested": pa.array([[[a], [b], [c]] for a, b, c in LISTS]),
    "bools": pa.array((VALUES > 7).tolist()),
}


def written(path, column):
    table = pa.table({"id": [f"row {i}" for i in range(len(column))], "x": column})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, 3)
    return path


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", VECTORS)
def test_columns_of_vectors_are_rows(tmp_path, name, ending):
    path = written(tmp_path / f"rows{ending}", VECTORS[name])
    expected = VALUES > 7 if name == "bools" else VALUES
    for start in (0, 4):
        table = open_table(path, keys=["id"])
        assert (table.features, table.rows, table.names) == (3, 8, ("x",))
        got = np.concatenate([block.values for block in table.blocks(5, start)])
        np.testing.assert_array_equal(got, expected[start:])
    assert table.dtype.kind == {"integers": "i", "bools": "u"}.get(name, "f")
    model = nf.NICE(3, hidden=(8,), couplings=2)
    found = nf.score(model, path, columns="x").values["log_prob"]
    np.testing.assert_array_equal(
        found, nf.score(model, expected.astype(np.float64)).values["log_prob"]
    )
    files = [path, written(tmp_path / f"more{ending}", VECTORS[name])]
    assert open_table(files, keys=["id"]).rows == 16


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_missing_and_ragged_vectors(tmp_path, ending):
    model = nf.NICE(3, hidden=(8,), couplings=2)
    for kind in (pa.list_(pa.float64()), pa.list_(pa.int32()), pa.list_(pa.float64(), 3)):
        rows = [None, [1, 2, 3], [4, None, 6], None, [7, 8, 9]]
        path = written(tmp_path / f"rows{ending}", pa.array(rows, kind))
        found = nf.score(model, path, columns="x")
        assert (found.bad, found.bad_rows) == (3, (0, 2, 3))
        np.testing.assert_array_equal(np.isnan(found.values["log_prob"]), [1, 0, 1, 1, 0])
    ragged = [[1.0, 2, 3]] * 4 + [[4.0, 5]]
    path = written(tmp_path / f"ragged{ending}", pa.array(ragged))
    assert "column 'x': expected vectors of 3 in every row, found one of 2" in refusal(
        path, keys=["id"]
    )
    path = written(tmp_path / f"empty{ending}", pa.array([[1.0, 2, 3], []]))
    assert "expected vectors of 3 in every row, found one of 0" in refusal(path, keys=["id"])
    words = written(tmp_path / f"words{ending}", pa.array([["a", "b"]]))
    assert "column 'x': expected integers, floats or bools" in refusal(words, keys=["id"])
    with pytest.raises(ValueError, match=r"expected rows of 4 values.* found 3"):
        open_table(written(tmp_path / f"a{ending}", VECTORS["list"]), "x", event_shape=(4,))
    none = written(tmp_path / f"none{ending}", VECTORS["list"].slice(0, 0))
    assert open_table(none, "x", event_shape=(3,)).features == 3


def test_workers_take_vectors():
    pytest.importorskip("ray", reason="scores with Ray")
    from nicefast.scoring.ray import Worker, _files

    model = nf.NICE(3, hidden=(8,), couplings=2)
    worker = Worker(
        _files(model, None), ["x"], None, False, outputs=("log_prob",), seed=0, draws=1,
        reference=None,
    )  # fmt: skip

    def scores(*rows):
        column = np.empty(len(rows), object)
        column[:] = rows
        return worker({"x": column})["log_prob"]

    expected = nf.score(model, VALUES[:3]).values["log_prob"]
    np.testing.assert_allclose(scores(*VALUES[:3]), expected, rtol=1e-5)
    np.testing.assert_allclose(scores(*LISTS[:3]), expected, rtol=1e-5)
    found = scores(VALUES[0], None, [1.0, None, 2.0], VALUES[1])
    np.testing.assert_allclose(found, [expected[0], np.nan, np.nan, expected[1]], rtol=1e-5)
    with pytest.raises(ValueError, match="column 'x': expected a vector of 3 numbers in every row"):
        scores(VALUES[0], [1.0, 2.0])
    with pytest.raises(ValueError, match="column 'x': expected a vector of 3 numbers"):
        scores(["a", "b", "c"])


def test_a_data_frame_is_refused_with_the_way():
    model = nf.NICE(2, hidden=(8,), couplings=2)
    pd = pytest.importorskip("pandas", reason="makes data frames")
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    with pytest.raises(
        TypeError, match=r"source must be an array, got a pandas DataFrame: give df"
    ):
        nf.score(model, frame)
    assert nf.score(model, frame.to_numpy()).rows == 2
    with pytest.raises(TypeError, match=r"got a pandas Series: give df\.to_numpy\(\)"):
        nf.score(model, frame["a"])
    with pytest.raises(TypeError, match=r"got a pyarrow Table: give numpy\.column_stack"):
        nf.score(model, pa.table({"a": [1.0], "b": [2.0]}))


def test_a_reference_that_lies_takes_no_memory(tmp_path):
    model = nf.NICE(2, hidden=(8,), couplings=2)
    path = tmp_path / "reference.npy"
    head = str({"descr": "<f8", "fortran_order": False, "shape": (2**40,)}).ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode())
    with pytest.raises(ValueError, match=r"reference .* is not a readable \.npy file"):
        nf.score(model, np.zeros((3, 2)), outputs=["percentile"], reference=path)
