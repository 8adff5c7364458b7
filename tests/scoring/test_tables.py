"""nicefast.scoring.tables: every source gives its rows in exact blocks; what is broken is named."""

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nicefast.scoring.tables import open_table

pa = pytest.importorskip("pyarrow", reason="Parquet, Arrow and CSV are read by pyarrow")
from pyarrow import feather, ipc  # noqa: E402
from pyarrow import parquet as pq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*the first line holds numbers")

N, D = 23, 3


def numbers(rows=N, columns=D, dtype=np.float32):
    values = np.random.default_rng(0).normal(size=(rows, columns)) * 50
    return np.abs(values).astype(dtype) if np.dtype(dtype).kind == "u" else values.astype(dtype)


def arrow_table(values, keys=True):
    columns = {f"c{i}": np.ascontiguousarray(values[:, i]) for i in range(values.shape[1])}
    if keys:
        columns["id"] = pa.array([f"row {i}" for i in range(len(values))])
    return pa.table(columns)


def write_idx(path, values, zipped=False):
    codes = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
    code = codes[values.dtype.str[1:]]
    head = struct.pack(f">HBB{values.ndim}I", 0, code, values.ndim, *values.shape)
    content = head + values.astype(values.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


def write_arrow(path, table, stream=False, batch=5, **options):
    make = ipc.new_stream if stream else ipc.new_file
    with make(path, table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, batch)
    return path


def write_csv(path, values, header=True):
    lines = [",".join(["id", *(f"c{i}" for i in range(values.shape[1]))])] if header else []
    lines += [",".join([f"row {i}", *map(repr, row.tolist())]) for i, row in enumerate(values)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_h5(path, values, **options):
    h5py = pytest.importorskip("h5py", reason="writes HDF5")
    with h5py.File(path, "w") as file:
        file.create_dataset("group/rows", data=values, **options)
    return path


def make(kind, folder, values=None):
    """A source of that kind with these rows, and whether it has keys."""
    values = numbers() if values is None else values
    path = folder / f"rows{kind}"
    if kind == ".npy":
        np.save(path, values)
    elif kind == "-f.npy":
        np.save(path, np.asfortranarray(values))
    elif kind == "-big.npy":
        np.save(path, values.astype(values.dtype.newbyteorder(">")))
    elif kind == ".npz":
        np.savez(path, X=values, other=np.zeros(3))
    elif kind == "-packed.npz":
        np.savez_compressed(path, X=values)
    elif kind == "-f.npz":
        np.savez(path, X=np.asfortranarray(values))
    elif kind == "-packed-f.npz":
        np.savez_compressed(path, X=np.asfortranarray(values))
    elif kind == ".parquet":
        pq.write_table(arrow_table(values), path, row_group_size=7)
    elif kind == "-folder":
        path.mkdir()
        for i, start in enumerate(range(0, max(len(values), 1), 9)):
            table = arrow_table(values).slice(start, 9)
            pq.write_table(table, path / f"part-{i}.parquet", row_group_size=4)
        (path / "_metadata.parquet").write_text("not to be read")
    elif kind == ".arrow":
        write_arrow(path, arrow_table(values))
    elif kind == "-stream.arrow":
        write_arrow(path, arrow_table(values), stream=True)
    elif kind == ".feather":
        feather.write_feather(arrow_table(values), path, compression="lz4", chunksize=6)
    elif kind == ".csv":
        write_csv(path, values)
    elif kind == "-bare.csv":
        write_csv(path, values, header=False)
    elif kind in ("-ubyte", "-ubyte.gz"):
        write_idx(path, values, kind.endswith("gz"))
    elif kind == ".h5":
        write_h5(path, values, chunks=(4, D), compression="gzip")
    else:
        raise AssertionError(kind)
    return path


ARRAYS = [".npy", "-f.npy", "-big.npy", ".npz", "-packed.npz", "-f.npz", "-packed-f.npz"]
ARRAYS += ["-ubyte", "-ubyte.gz", ".h5"]
KEYED = [".parquet", "-folder", ".arrow", "-stream.arrow", ".feather", ".csv", "-bare.csv"]
KINDS = ARRAYS + KEYED


def keys_of(kind):
    return () if kind in ARRAYS else (0,) if kind == "-bare.csv" else ("id",)


def rows_of(table, size=1000, start=0, stop=None):
    blocks = [np.asarray(block.values) for block in table.blocks(size, start, stop)]
    return np.concatenate(blocks) if blocks else np.empty((0, table.features), table.dtype)


def refused(reason, source, *args, error=ValueError, **kwargs):
    """Opening or reading is refused, the message of one line beginning with the source."""
    with pytest.raises(error, match=reason) as caught:
        rows_of(open_table(source, *args, **kwargs), 4)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4, 7, 23, 100])
def test_exact_blocks(tmp_path, kind, size):
    values = numbers()
    table = open_table(make(kind, tmp_path), keys=keys_of(kind), event_shape=(D,))
    assert (table.rows, table.features, table.seekable) == (None if "csv" in kind else N, D, True)
    blocks = list(table.blocks(size))
    assert table.rows == N
    assert [len(b.values) for b in blocks] == [min(size, N - s) for s in range(0, N, size)]
    assert [b.start for b in blocks] == list(range(0, N, size))
    assert all(b.values.dtype == table.dtype and b.values.dtype.isnative for b in blocks)
    assert np.array_equal(np.concatenate([b.values for b in blocks]), values)
    for block in blocks:
        for key in table.keys:
            texts = [f"row {block.start + i}" for i in range(len(block.values))]
            assert block.keys[key].to_pylist() == texts
            assert block.keys[key].type == table.key_types[key]
    assert table.keys == (("column_0",) if kind == "-bare.csv" else tuple(keys_of(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_starts_and_stops_anywhere(tmp_path, kind):
    values, table = numbers(), open_table(make(kind, tmp_path), keys=keys_of(kind))
    for start in (0, 1, 4, 7, 9, 13, 18, 22, 23, 40):
        for stop in (None, 0, 1, 7, 9, 10, 22, 23, 40):
            blocks = list(table.blocks(5, start, stop))
            got = [b.values for b in blocks]
            want = values[start:stop]
            assert np.array_equal(np.concatenate(got) if got else want[:0], want), (start, stop)
            assert all(len(b.values) == 5 for b in blocks[:-1])
            assert [b.start for b in blocks] == list(range(start, start + len(want), 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one(tmp_path, kind, rows):
    if rows == 0 and kind == ".h5":
        path = write_h5(tmp_path / "rows.h5", numbers(0))
    elif rows == 0 and kind == "-bare.csv":
        path = tmp_path / "rows.csv"
        path.write_text("\n\n")
        assert refused("holds no rows", path).startswith(f"{path}: ")
        return
    else:
        path = (
            make(kind, tmp_path, numbers(rows))
            if kind != ".h5"
            else write_h5(tmp_path / "rows.h5", numbers(rows))
        )
    table = open_table(path, keys=keys_of(kind), event_shape=(D,))
    assert table.features == D
    assert np.array_equal(rows_of(table), numbers(rows))
    assert table.rows == rows
    assert list(table.blocks(3, 1)) == []


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("-folder", ".csv", "-bare.csv")])
def test_truncated_files_are_refused(tmp_path, kind):
    path = make(kind, tmp_path, numbers(200))
    whole = path.read_bytes()
    cuts = {1, 3, len(whole) - 1, len(whole) - 9, len(whole) // 2, len(whole) // 3, 100}
    for length in cuts - ({len(whole) - 1, len(whole) - 9} if kind == "-stream.arrow" else set()):
        path.write_bytes(whole[:length])
        assert refused(".", path).startswith(f"{path}: "), length
    path.write_bytes(b"")
    assert refused("empty", path).startswith(f"{path}: ")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_do_nothing_worse_than_a_named_error(tmp_path, kind):
    if kind in ("-folder",):
        return
    path = make(kind, tmp_path, numbers(50))
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    if kind == ".h5":  # which libhdf5 answers for
        return
    for _ in range(25):
        broken = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 300), 3):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            rows_of(open_table(path, keys=keys_of(kind)), 7)
            message = f"{path}: "
        except ValueError as error:
            message = str(error)
        assert message.startswith(f"{path}: ")


def test_values_keep_their_dtype(tmp_path):
    for dtype in ("u1", "i1", "i2", "u2", "i4", "i8", "f2", "f4", "f8"):
        np.save(tmp_path / "a.npy", numbers(dtype=dtype))
        assert open_table(tmp_path / "a.npy").dtype == np.dtype(dtype)
        if dtype not in ("u2", "f2", "i8"):
            write_idx(tmp_path / "a-idx", numbers(dtype=dtype))
            assert open_table(tmp_path / "a-idx").dtype == np.dtype(dtype)
    np.save(tmp_path / "a.npy", numbers() > 0)
    table = open_table(tmp_path / "a.npy")
    assert table.dtype == np.uint8
    assert np.array_equal(rows_of(table), numbers() > 0)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (["float32", "float32"], "f4"),
        (["float16", "float32"], "f4"),
        (["float16"], "f4"),
        (["float32", "float64"], "f8"),
        (["int8", "uint8"], "i2"),
        (["int32", "int64"], "i8"),
        (["uint64", "int64"], "i8"),
        (["bool"], "u1"),
        (["bool", "int16"], "i2"),
        (["uint8", "float32"], "f4"),
        (["int64", "float32"], "f8"),
    ],
)
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_columns_become_one_dtype(tmp_path, types, expected, ending):
    plain = [[1, 0, 1]] * len(types)
    arrays = [
        pa.array(np.array(x, t)) if t == "float16" else pa.array(x).cast(t)
        for x, t in zip(plain, types, strict=True)
    ]
    table = pa.table(arrays, names=[f"c{i}" for i in range(len(types))])
    path = tmp_path / f"a.{ending}"
    pq.write_table(table, path) if ending == "parquet" else write_arrow(path, table)
    opened = open_table(path)
    assert opened.dtype == np.dtype(expected)
    assert np.array_equal(rows_of(opened), np.array(plain).T)


def test_missing_values_are_nan(tmp_path):
    for kind, dtype in (("int32", "f8"), ("float32", "f4"), ("bool", "f8"), ("float64", "f8")):
        # What is missing stands in the last row group alone.
        table = pa.table({"a": pa.array([1, 0, 1, 1, None]).cast(kind)})
        paths = [tmp_path / f"a.{ending}" for ending in ("parquet", "arrow")]
        pq.write_table(table, paths[0], row_group_size=2)
        pq.write_table(table, tmp_path / "b.parquet", row_group_size=2, write_statistics=False)
        write_arrow(paths[1], table, batch=2)
        for path in [*paths, tmp_path / "b.parquet"]:
            opened = open_table(path)
            assert opened.dtype == np.dtype(dtype), (kind, path)
            values = rows_of(opened, 2)[:, 0]
            assert values[:4].tolist() == [1, 0, 1, 1]
            assert np.isnan(values[4])
    (tmp_path / "a.csv").write_text("a,b\n1,2\n,3\n4,NaN\n")
    values = rows_of(open_table(tmp_path / "a.csv"))
    assert np.isnan(values).tolist() == [[False, False], [True, False], [False, True]]


def test_non_finite_values_pass(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\ninf,2\n1,-inf\nnan,0\n")
    assert np.isfinite(rows_of(open_table(tmp_path / "a.csv"))).sum() == 3


def test_columns_by_name_and_position(tmp_path):
    values = numbers()
    for kind in (".parquet", ".arrow", ".feather", "-folder", ".csv"):
        path = make(kind, tmp_path)
        first = ["id", "c0", "c1", "c2"] if kind == ".csv" else ["c0", "c1", "c2", "id"]
        table = open_table(path, ["c2", "c0"])
        assert np.array_equal(rows_of(table, 5), values[:, [2, 0]])
        assert table.names == ("c2", "c0")
        table = open_table(path, [first.index("c2"), "c1"], keys="id", event_shape=(2,))
        assert np.array_equal(rows_of(table, 5), values[:, [2, 1]])
        assert np.array_equal(rows_of(open_table(path, "c1", keys=["c2", "id"])), values[:, [1]])
    for kind in ARRAYS:
        path = make(kind, tmp_path)
        assert np.array_equal(rows_of(open_table(path, [2, 0]), 5), values[:, [2, 0]])
        assert np.array_equal(rows_of(open_table(path, [-2, -1]), 5), values[:, 1:])
    for source in (values, torch.from_numpy(values), [values[:9], values[9:]]):
        assert np.array_equal(rows_of(open_table(source, (2, 0)), 5), values[:, [2, 0]])
        assert np.array_equal(rows_of(open_table(source, 1), 5), values[:, [1]])


def test_wrong_columns_are_named(tmp_path):
    parquet, npy = make(".parquet", tmp_path), make(".npy", tmp_path)
    csv = make(".csv", tmp_path)
    for path in (parquet, csv):
        assert refused("no column 'x': expected one of .*'c0'", path, ["x"]).startswith(str(path))
        refused("no column 4: expected a position below 4", path, [4])
        refused("columns has column 'c1' twice", path, ["c1", "c1"])
        refused("no column 'k'", path, ["c0"], keys=["k"])
        refused("expected rows of 4 values.*found 3", path, None, ["id"], event_shape=(2, 2))
        refused("columns must be names or positions", path, [1.5], error=TypeError)
    refused("'id': expected integers, floats or bools, found string", parquet)
    refused("line 2, column 'id': expected a number, found 'row 0'", csv)
    refused("no columns are left", parquet, None, ["id", "c0", "c1", "c2"])
    refused("no names of columns, give positions", npy, ["c0"])
    refused("no column 3", npy, [3])
    refused("keys are columns of Parquet", npy, keys=[0])
    refused("expected rows of 784 values.*found 3", npy, event_shape=(1, 28, 28))
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    write_arrow(tmp_path / "twice.arrow", table)
    refused("'a' is there 2 times", tmp_path / "twice.arrow")


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array(["1.5", "2"]),
        pa.array([1, 2]).cast(pa.decimal128(30, 2)),
        pa.array([1, 2]).cast("timestamp[ms]"),
        pa.array([None, None]),
        pa.array([[1.0], [2.0]]),
        pa.array([{"x": 1}, {"x": 2}]),
    ],
)
def test_columns_that_are_no_numbers_are_refused_but_can_be_keys(tmp_path, values):
    table = pa.table({"good": [1.0, 2.0], "bad": values})
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        pq.write_table(table, path) if path.suffix == ".parquet" else write_arrow(path, table)
        assert refused("column 'bad': expected integers", path).startswith(f"{path}: ")
        opened = open_table(path, keys=["bad"])
        blocks = list(opened.blocks(1))
        assert [b.keys["bad"].to_pylist() for b in blocks] == [[x] for x in values.to_pylist()]
        assert next(opened.blocks(2)).keys["bad"].type == opened.key_types["bad"] == values.type


def test_keys_cross_files_whatever_their_dictionaries(tmp_path):
    for i, texts in enumerate((["a", "b"], ["c", "a"])):
        keys = pa.array(texts).dictionary_encode()
        pq.write_table(pa.table({"x": [1.0, 2.0], "k": keys}), tmp_path / f"{i}.parquet")
    blocks = list(open_table(tmp_path, keys="k").blocks(3))
    assert [b.keys["k"].to_pylist() for b in blocks] == [["a", "b", "c"], ["a"]]
    pq.write_table(pa.table({"x": [1.0], "k": [7]}), tmp_path / "2.parquet")
    refused("2.parquet: key 'k': expected dictionary.* found int64", tmp_path, keys="k")


def test_csv_keys_are_text_as_it_stands(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('zip,a\n00501,1\nNA,2\n"x,\n""y""",3\n,4\n')
    (block,) = open_table(path, keys="zip").blocks(9)
    assert block.keys["zip"].to_pylist() == ["00501", "NA", 'x,\n"y"', ""]
    assert block.values[:, 0].tolist() == [1, 2, 3, 4]


def test_csv_errors_name_line_and_column(tmp_path):
    path = tmp_path / "a.csv"
    lines = ["a,b", "", '1.5,"2"'] + ["1,2"] * 20_000
    for bad, reason in (
        ("7", "expected 2 cells, found 1"),
        ("1,2,3", "expected 2 cells, found 3"),
        ("1,x", "column 'b': expected a number, found 'x'"),
        ("1_0,2", "column 'a': expected a number, found '1_0'"),
    ):
        for place in (5, 19_000):
            path.write_text("\n".join([*lines[:place], bad, *lines[place:]]) + "\n")
            found = refused(f"line {place + 1}.*{reason}", path, event_shape=(2,))
            assert found.startswith(f"{path}: line {place + 1}")
    path.write_text("1;2\n3;4\n5;6\n")
    refused("expected a number, found '3;4'", path)
    path.write_bytes(b"a,b\n1,2\n3,\xff\xfe\n")
    refused("line 3, column 'b'", path)


def test_csv_rows_before_a_bad_one_are_given(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "1.5,2.25\n" * 300_000 + "1,2,3\n")
    seen = []
    with pytest.raises(ValueError, match="line 300002: expected 2 cells, found 3"):
        seen.extend(len(block.values) for block in open_table(path).blocks(1000))
    assert sum(seen) > 100_000


def test_csv_headers_and_dtypes(tmp_path):
    path = tmp_path / "a.csv"
    cases = [
        ("1,2\n3,4\n", None, [[1, 2], [3, 4]], "i8"),
        ("\ufeffa,b\r\n1,2\r\n\r\n3,4", ("a", "b"), [[1, 2], [3, 4]], "i8"),
        ('"a\nb",c\n1,2\n', ("a\nb", "c"), [[1, 2]], "i8"),
        ("1,2\n3,4.5\n", None, [[1, 2], [3, 4.5]], "f8"),
        ("a,b\n", ("a", "b"), [], "i8"),
        ("x\n" + "1\n" * 200 + "1.5\n", ("x",), [[1]] * 200 + [[1.5]], "f8"),
        ("x\n" + "1\n" * 200 + "\n99999999999999999999\n", ("x",), [[1]] * 200 + [[1e20]], "f8"),
    ]
    for text, names, values, dtype in cases:
        path.write_text(text, encoding="utf-8", newline="")
        table = open_table(path)
        assert (table.names, table.dtype) == (names, np.dtype(dtype)), text
        assert rows_of(table).tolist() == values
    path.write_text("0,a\n1,2\n")  # a header only because its names are asked for
    assert rows_of(open_table(path, ["a", "0"])).tolist() == [[2, 1]]


def test_several_files(tmp_path):
    values = numbers()
    for i in range(3):
        np.save(tmp_path / f"part{i}.npy", values[8 * i : 8 * i + 8])
    for source in (
        str(tmp_path / "part*.npy"),
        tmp_path / "*.npy",
        sorted(tmp_path.iterdir()),
        [str(tmp_path / "part[01].npy"), tmp_path / "part2.npy"],
    ):
        table = open_table(source)
        assert (table.rows, len(table.parts)) == (N, 3)
        assert np.array_equal(rows_of(table, 5, 3), values[3:])
    table = open_table([tmp_path / "part1.npy", tmp_path / "part0.npy"])
    assert np.array_equal(rows_of(table), np.concatenate([values[8:16], values[:8]]))
    np.save(tmp_path / "part1.npy", np.zeros((2, 5)))
    assert refused("part1.npy: expected 3 columns as in .*part0.npy, found 5", tmp_path / "p*.npy")
    assert refused("no file matches", tmp_path / "*.nothing").startswith(str(tmp_path / "*.noth"))
    np.save(tmp_path / "part1.npy", np.zeros((2, 3), np.float64))
    assert open_table(tmp_path / "p*.npy").dtype == np.float64
    assert {b.values.dtype for b in open_table(tmp_path / "p*.npy").blocks(4)} == {np.dtype("f8")}


def test_columns_of_several_files_go_by_name(tmp_path):
    for i, names in enumerate((["a", "b"], ["b", "a"])):
        pq.write_table(pa.table({n: [float(ord(n))] for n in names}), tmp_path / f"{i}.parquet")
    for columns in (None, ["a", "b"], [0, 1]):
        assert rows_of(open_table(tmp_path, columns), 2).tolist() == [[97, 98]] * 2
    pq.write_table(pa.table({"a": [1], "b": [2], "c": [3]}), tmp_path / "2.parquet")
    found = refused("expected the 2 columns of .*0.parquet, found 3: it has also 'c'", tmp_path)
    assert found.startswith(str(tmp_path / "2.parquet"))
    assert len(rows_of(open_table(tmp_path, ["a", "b"]))) == 3
    pq.write_table(pa.table({"a": [1]}), tmp_path / "2.parquet")
    refused("2.parquet: expected the 2 columns of .*: it lacks 'b'", tmp_path)
    refused("2.parquet: no column 'b'", tmp_path, ["a", "b"])
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("1,2\n")
    refused("b.csv: expected names of columns, found none", tmp_path / "*.csv")
    (tmp_path / "b.csv").write_text("y,x\n1.5,2\n")
    assert rows_of(open_table(tmp_path / "*.csv")).tolist() == [[1, 2], [2, 1.5]]
    assert rows_of(open_table(tmp_path / "*.csv"), 1, 1).tolist() == [[2, 1.5]]


def test_what_is_not_there(tmp_path):
    refused("no such file", tmp_path / "a.npy")
    refused("expected a folder of Parquet files", tmp_path)
    refused("empty list", [])
    (tmp_path / "notes.txt").write_text("hello, this is text")
    refused("known format.*68 65 6c 6c", tmp_path / "notes.txt")
    refused("got int", 3, error=TypeError)
    refused("item 1 of a list of paths", [make(".npy", tmp_path), np.zeros(3)], error=TypeError)
    refused("picks an array", f"{tmp_path / 'rows.npy'}::X")


def test_picked_arrays(tmp_path):
    path = tmp_path / "two.npz"
    np.savez(path, a=numbers(), b=numbers(4))
    refused("expected an array called 'X' or 'x_train', found a, b", path)
    assert open_table(f"{path}::b").rows == 4
    refused("called 'c'", f"{path}::c")
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "two.h5"
    with h5py.File(path, "w") as file:
        file["text"] = "hello"
        file["deep/rows"] = numbers()
        file["labels"] = np.array([b"a", b"b"])
    assert open_table(path).rows == N
    with h5py.File(path, "a") as file:
        file["y"] = np.arange(N)
    refused("expected one dataset of numbers, found /deep/rows, /y", path)
    assert np.array_equal(rows_of(open_table(f"{path}::/deep/rows"), 5), numbers())
    assert open_table(f"{path}::y").features == 1
    refused("a dataset '/z', found", f"{path}::z")
    refused("text", f"{path}::labels")


def test_arrays_that_are_no_numbers(tmp_path):
    for values in (
        np.array([["a"]]),
        np.array([[1j]]),
        np.array([[None]]),
        np.zeros((2, 0)),
        np.float64(3),
        np.zeros(2, [("a", "f4")]),
        np.array([["2020-01-01"]], "datetime64[D]"),
    ):
        np.save(tmp_path / "a.npy", values)
        assert refused(".", tmp_path / "a.npy").startswith(str(tmp_path / "a.npy"))
        refused("source, array of shape", values) if values.ndim else None
    for tensor in (torch.zeros(2, dtype=torch.cfloat), torch.zeros(()), torch.eye(2).to_sparse()):
        refused("source, tensor", tensor)


def test_images_are_flattened(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 2, 4, 4)).astype(np.uint8)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "f.npy", np.asfortranarray(images))
    paths = [tmp_path / "a.npy", tmp_path / "f.npy", write_idx(tmp_path / "a-ubyte", images)]
    for source in (*paths, images, torch.from_numpy(images), [images[:2], images[2:]]):
        table = open_table(source, event_shape=(2, 4, 4))
        assert table.features == 32
        assert np.array_equal(rows_of(table, 2), images.reshape(9, 32))
    refused("expected rows of 16 values", paths[0], event_shape=(4, 4))


def test_blocks_of_an_array_are_views():
    values = numbers()
    assert all(np.shares_memory(b.values, values) for b in open_table(values).blocks(4))
    tensor = torch.from_numpy(values)
    assert all(
        b.values.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        for b in open_table(tensor).blocks(4)
    )


def cut_off(path, _):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path, _):
    os.truncate(path, 0)


def rewritten(path, other):
    """In place, and as if nothing had been."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(other[: stat.st_size])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replaced(path, other):
    stat = path.stat()
    path.with_name("new").write_bytes(other)
    path.with_name("new").replace(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def removed(path, _):
    path.unlink()


@pytest.mark.parametrize("change", [cut_off, emptied, rewritten, replaced, removed])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_meanwhile_is_an_error_not_a_crash(tmp_path, kind, change):
    """No row of the other version is given, whatever the format keeps in memory."""
    values = numbers(2000)
    (tmp_path / "other").mkdir()
    other = make(kind, tmp_path / "other", -values)
    path = make(kind, tmp_path, values)
    file = path if path.is_file() else max(path.rglob("*.parquet"))
    theirs = other if path.is_file() else other / file.relative_to(path)
    table = open_table(path, keys=keys_of(kind))
    blocks = table.blocks(100)
    first = next(blocks)
    expected = rows_of(open_table(path, keys=keys_of(kind)), 1000)
    change(file, theirs.read_bytes())
    seen, changed = [first.values], f"^{file}: it was (changed|removed) while it was read"
    if kind.endswith(".csv"):  # of which all these rows were read at once
        seen.extend(block.values for block in blocks)
    else:
        with pytest.raises(ValueError, match=changed):
            seen.extend(block.values for block in blocks)
    assert np.array_equal(np.concatenate(seen), expected[: 100 * len(seen)])
    with pytest.raises(ValueError, match=changed):
        table.check_unchanged()


def test_an_array_that_changes_meanwhile():
    values = numbers()
    table = open_table(values)
    table.check_unchanged()
    values[7, 1] += 1
    with pytest.raises(ValueError, match=r"array of shape .* changed while it was read"):
        table.check_unchanged()


@pytest.mark.parametrize("kind", [".npy", ".arrow", "-f.npy"])
def test_a_file_that_is_cut_off_under_the_reader(tmp_path, kind):
    """Between two looks at the file, too: a mapping would end the process here."""
    values = numbers(500_000)
    path = tmp_path / f"rows{kind}"
    if kind == ".arrow":
        write_arrow(path, arrow_table(values, keys=False), batch=1 << 20)
    else:
        np.save(path, np.asfortranarray(values) if kind == "-f.npy" else values)
    (part,) = open_table(path).parts
    pieces = part.pieces(0, None, 50_000, 50_000, part.dtype)
    next(pieces)
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(ValueError, match=r"truncated: expected \d+ bytes at \d+, found \d+"):
        list(pieces)


def test_keys_of_an_arrow_file_outlive_its_pages(tmp_path):
    """Of all kinds of types, in batches packed and not, of files and streams."""
    n = 3000
    dictionary = pa.array([f"name {i % 7}" for i in range(n)]).dictionary_encode()
    keys = {
        "text": pa.array([None if i % 5 == 0 else f"text {i}" for i in range(n)]),
        "large": pa.array([f"large {i}" for i in range(n)], pa.large_string()),
        "bytes": pa.array([bytes([i % 256]) * (i % 9) for i in range(n)]),
        "fixed": pa.array([b"%05d" % i for i in range(n)], pa.binary(5)),
        "flag": pa.array([None if i % 3 == 0 else i % 2 == 0 for i in range(n)]),
        "time": pa.array(range(n), pa.timestamp("us")),
        "sort": dictionary,
        "list": pa.array([list(range(i % 4)) for i in range(n)]),
        "both": pa.array([{"a": i, "b": str(i)} for i in range(n)]),
        "none": pa.nulls(n),
    }
    values = pa.array(np.arange(float(n)))
    table = pa.table({"x": values, **keys})
    for stream in (False, True):
        for options in ({}, {"compression": "zstd"}):
            path = tmp_path / "rows.arrow"
            write_arrow(path, table, stream, 1300, **options)
            for names in ([*keys], ["text", "flag"], ["list"]):
                blocks = list(open_table(path, ["x"], names).blocks(17, 5))
                assert np.concatenate([b.values for b in blocks])[:, 0].tolist() == [*range(5, n)]
                for name in names:
                    found = [one for block in blocks for one in block.keys[name].to_pylist()]
                    assert found == keys[name].to_pylist()[5:], (name, stream, options)


def test_tensors_and_loaders():
    values = torch.from_numpy(numbers())
    table = open_table(values.clone().requires_grad_())
    block = next(table.blocks(7, 2))
    assert torch.equal(block.values, values[2:9])
    assert not block.values.requires_grad
    assert table.dtype == torch.float32
    assert open_table(values > 0).dtype == torch.uint8
    labels = torch.arange(N)
    for data in (TensorDataset(values, labels), TensorDataset(values)):
        table = open_table(DataLoader(data, batch_size=4), event_shape=(D,))
        assert (table.rows, table.fingerprint, table.seekable) == (None, None, False)
        for _ in range(2):  # a loader can be gone through again
            blocks = list(table.blocks(7))
            assert [len(b.values) for b in blocks] == [7, 7, 7, 2]
            assert torch.equal(torch.cat([b.values for b in blocks]), values)
        assert table.rows == N


def test_iterables():
    values = numbers()
    batches = [values[:1], values[1:1], values[1:20], values[20:]]
    assert np.array_equal(rows_of(open_table(batches), 6), values)
    table = open_table(iter(batches))
    assert np.array_equal(rows_of(table, 6, 2, 9), values[2:9])
    with pytest.raises(ValueError, match="only once"):
        list(table.blocks(3))
    assert rows_of(open_table(x for x in batches), 30).shape == (N, D)
    empty = open_table(iter([]), event_shape=(2, 2))
    assert (empty.rows, empty.features, list(empty.blocks(3))) == (0, 4, [])
    refused(
        "item 2: expected rows of 3 .*float32 as in item 0, found 2", [*batches[:2], values[:, :2]]
    )
    refused("item 1: .*float32 as in item 0, found 3 of float64", [values, values.astype("f8")])
    refused("item 1: expected rows of 3 values", iter([values, values[:, :2]]), event_shape=(3,))
    refused("item 1: .*got str", iter([values, "x"]), error=TypeError)
    refused("item 0: .*got dict", [{"x": values}], error=TypeError)
    refused("item 0: .*found one number", [np.array(3.0)])
    refused("item 1: .*torch.float32", [values, torch.from_numpy(values)])


@pytest.mark.parametrize("kind", [".npy", ".parquet", ".csv", "-folder", "-packed.npz"])
def test_fingerprints(tmp_path, kind):
    path = make(kind, tmp_path)
    keys = keys_of(kind)

    def found(**more):
        return open_table(path, **{"keys": keys, **more}).fingerprint

    first = found()
    assert first == found()
    assert len(first) == 64
    assert found(columns=[1, 2]) != first
    file = path if path.is_file() else path / "part-1.parquet"
    content, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    os.utime(file, ns=(times[0], times[1] + 1_000_000_000))
    assert found() != first
    os.utime(file, ns=times)
    assert found() == first
    (tmp_path / "other").mkdir()
    other = make(kind, tmp_path / "other", np.float32(2) * numbers())
    file.write_bytes((other if path.is_file() else other / file.name).read_bytes())
    os.utime(file, ns=times)
    assert found() != first
    file.write_bytes(content)
    os.utime(file, ns=times)
    assert found() == first


def test_fingerprint_of_a_large_file_sees_ends_and_size(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((1 << 20, 4), np.uint8))
    stat, first = path.stat(), open_table(path).fingerprint
    for place in (200, stat.st_size - 1):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert open_table(path).fingerprint != first
        content[place] ^= 1
        path.write_bytes(content)
    values = numbers()
    assert open_table(values).fingerprint == open_table(values.copy()).fingerprint
    assert open_table(values).fingerprint != open_table(values + 1).fingerprint
    assert open_table(torch.from_numpy(values)).fingerprint is not None


def test_sizes_are_checked():
    table = open_table(numbers())
    for arguments in ((0,), (-1,), (3, -1), (3, 0, -1)):
        with pytest.raises(ValueError, match="must be at least"):
            table.blocks(*arguments)
    for arguments in ((2.5,), (True,), ("3",), (3, 1.0)):
        with pytest.raises(TypeError, match="must be an integer"):
            table.blocks(*arguments)
    assert len(list(table.blocks(np.int64(10)))) == 3


@pytest.mark.parametrize("kind", ["-packed.npz", "-ubyte.gz", ".h5", "-f.npz", ".npy"])
def test_memory_does_not_grow_with_the_rows(tmp_path, kind):
    values = np.zeros((300_000, 16), np.float32)  # 19 MB
    path = write_h5(tmp_path / "rows.h5", values) if kind == ".h5" else make(kind, tmp_path, values)
    del values
    tracemalloc.start()
    try:
        rows = sum(len(block.values) for block in open_table(path).blocks(1000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 300_000
    assert peak < 10 << 20


def resident(kind):
    """MiB that this process holds of its own; of .npy files also the pages that are mapped.

    (Of an Arrow file the kernel may map 2 MiB of each column at once.)
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    held = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return held["RssAnon"] + (held["RssFile"] if kind == ".npy" else 0) >> 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".csv", ".npy"])
def test_resident_memory_does_not_grow_with_the_rows(tmp_path, kind):
    values = np.random.default_rng(0).random((500_000, 64), np.float32)  # 128 MB
    for name, rows in (("warm", 50_000), ("big", 500_000)):
        path = tmp_path / f"{name}{kind}"
        if kind == ".csv":
            path.write_text((",".join(["1.25"] * 64) + "\n") * rows)
        elif kind == ".npy":
            np.save(path, values[:rows])
        elif kind == ".arrow":  # one batch for all
            write_arrow(path, arrow_table(values[:rows], keys=False), batch=1 << 20)
        else:  # one row group for all, in pages
            table, plain = arrow_table(values[:rows], keys=False), {"compression": "none"}
            pq.write_table(table, path, row_group_size=1 << 20, use_dictionary=False, **plain)
            del table
    del values
    for _ in open_table(tmp_path / f"warm{kind}").blocks(4096):
        pass
    before, most, seen = resident(kind), 0, 0
    for block in open_table(tmp_path / f"big{kind}").blocks(4096):
        seen += float(block.values.sum()) > 0
        most = max(most, resident(kind))
    assert seen == 123
    assert most - before < 90, f"{most - before} MiB more than for a tenth of the rows"
