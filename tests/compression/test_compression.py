"""Compression: every byte comes back, the length is the model's, nothing else is ever decoded."""

import gzip
import json
import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("constriction", reason="needs constriction")

import nicefast as nf
from nicefast.compression import Codec, compress, decompress
from nicefast.compression.container import Head, Reader, Writer
from nicefast.compression.tables import BEYOND, SYMBOLS, Coder, digest, make_tables
from nicefast.preprocessing import Preprocessing
from nicefast.preprocessing.transforms import Dequantise, Standardise


def make(event=(1, 4, 6), levels=256, low=0.0, high=1.0, **options):
    torch.manual_seed(0)
    step = Dequantise(levels, low, high) if levels else Dequantise(None)
    model = nf.NICE(event, **{"hidden": (16,), "couplings": 4, "grid": step.scale, **options})
    with torch.no_grad():
        model.scaling.log_scale.normal_(1.5 if levels else -2, 0.5)
        for coupling in model.couplings:
            coupling.conditioner.linears[-1].reset_parameters()
            coupling.conditioner.linears[-1].weight.mul_(1 if levels else 5)
    return model, Preprocessing((step,))


def sample(model, steps, rows, seed=0):
    """Levels that are as the model says."""
    x = model.sample(rows, generator=torch.Generator().manual_seed(seed))
    scale = Codec(model, steps).scale
    levels = (x.double() / scale.grid).round().long() - scale.first
    return levels if scale.levels is None else levels.clamp(0, scale.levels - 1)


def idx(values):
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.tobytes()


def images(rows=50, seed=0):
    model, steps = make()
    return sample(model, steps, rows, seed).to(torch.uint8).numpy()


def as_file(kind, place):
    """A source of each kind, its model, and the bytes that must come back."""
    model, steps = make()
    values = images()
    path = place / f"source.{kind}"
    if kind == "idx":
        path = place / "source-idx4-ubyte"
        path.write_bytes(idx(values))
    elif kind == "gz":
        path.write_bytes(gzip.compress(idx(values)))
        return path, model, steps, idx(values)
    elif kind == "npy":
        np.save(path, values)
    elif kind == "odd.npy":  # a header that NumPy would not write
        text = (
            b"{'shape': (50, 1, 4, 6), 'fortran_order': False, 'descr': '|u1'}" + b" " * 9 + b"\n"
        )
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
        path.write_bytes(head + values.tobytes())
    elif kind == "big-endian.npy":
        model, steps = make(7, None)
        np.save(path, sample(model, steps, 40).numpy().astype(">i4"))
    elif kind == "csv":
        model, steps = make(7, None)
        rows = sample(model, steps, 40).tolist()
        path.write_text("a,b,c,d,e,f,g\n" + "".join(",".join(map(str, r)) + "\n" for r in rows))
    elif kind == "windows.csv":
        model, steps = make(7, None)
        rows = sample(model, steps, 40).tolist()
        path.write_bytes("\r\n".join(",".join(map(str, r)) for r in rows).encode())
    return path, model, steps, path.read_bytes()


@pytest.mark.parametrize(
    "kind", ["idx", "gz", "npy", "odd.npy", "big-endian.npy", "csv", "windows.csv"]
)
def test_every_byte_comes_back(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("nicefast.compression.codec.CHUNK_ELEMENTS", 24 * 16)
    path, model, steps, content = as_file(kind, tmp_path)
    done = compress(path, model, tmp_path / "out.nf", steps)
    assert done.raw_bytes == len(content)
    assert done.bytes == os.path.getsize(tmp_path / "out.nf")
    back = decompress(tmp_path / "out.nf", model, tmp_path / "back", steps)
    assert back.read_bytes() == content
    again = compress(path, model, tmp_path / "again.nf", steps)
    assert again.path.read_bytes() == done.path.read_bytes()
    left = {p.name for p in tmp_path.iterdir()} - {path.name}
    assert left == {"out.nf", "back", "again.nf"}


@pytest.mark.parametrize("name", ["x.npy", "x-idx", "x.gz", "head.csv", "x.csv"])
def test_no_rows_at_all(name, tmp_path):
    model, steps = make((2, 3), 256 if name[-3:] != "csv" else None)
    path = tmp_path / name
    if name == "x.npy":
        np.save(path, np.zeros((0, 2, 3), np.uint8))
    else:
        empty = idx(np.zeros((0, 2, 3), np.uint8))
        made = {"x-idx": empty, "x.gz": gzip.compress(empty), "head.csv": b"a,b,c,d,e,f\n"}
        path.write_bytes(made.get(name, b""))
    done = compress(path, model, tmp_path / "out.nf", steps)
    back = decompress(done.path, model, tmp_path / "back", steps).read_bytes()
    assert back == (empty if name == "x.gz" else path.read_bytes())
    assert done.rows == 0


def test_latents_beyond_a_table_cost_no_more_than_they_should(tmp_path):
    model = nf.NICE(64, hidden=(16,), grid=1.0)
    steps = Preprocessing((Dequantise(None),))
    levels = np.random.default_rng(0).integers(22, 33, (200, 64))
    np.save(tmp_path / "x.npy", levels)
    done = compress(tmp_path / "x.npy", model, tmp_path / "x.nf", steps)
    assert done.bytes <= 1.02 * Codec(model, steps).bits(levels) / 8 + 64


@pytest.mark.parametrize("bands", [1, 3])
def test_a_folder_of_images(bands, tmp_path):
    image = pytest.importorskip("PIL.Image")
    model, steps = make((bands, 4, 6))
    values = sample(model, steps, 9).to(torch.uint8).numpy()
    (tmp_path / "in").mkdir()
    for i, one in enumerate(values):
        picture = one[0] if bands == 1 else np.ascontiguousarray(one.transpose(1, 2, 0))
        image.fromarray(picture).save(tmp_path / "in" / f"digit {i % 3}-{i}.png")
    compress(tmp_path / "in", model, tmp_path / "out.nf", steps)
    decompress(tmp_path / "out.nf", model, tmp_path / "back", steps)
    names = sorted(p.name for p in (tmp_path / "in").iterdir())
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == names
    for name in names:
        with image.open(tmp_path / "in" / name) as a, image.open(tmp_path / "back" / name) as b:
            assert a.mode == b.mode
            assert np.array_equal(np.asarray(a), np.asarray(b))
    (tmp_path / "in" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"folder of PNG images alone, got notes\.txt"):
        compress(tmp_path / "in", model, tmp_path / "more.nf", steps)


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("rows", [1, 30, 3000])
def test_the_length_is_the_models(prior, rows, tmp_path):
    model, steps = make(prior=prior, couplings=3)
    values = sample(model, steps, rows).to(torch.uint8)
    np.save(tmp_path / "x.npy", values.numpy())
    done = compress(tmp_path / "x.npy", model, tmp_path / "x.nf", steps)
    with torch.no_grad():
        nats = -model.cell_log_prob(values.float() / 256).double().sum().item()
    ideal = nats / math.log(2) / 8
    assert done.bytes <= 1.02 * ideal + 64
    assert done.bytes >= 0.999 * ideal
    codec = Codec(model, steps)
    assert codec.bits(values.flatten(1).numpy().astype(np.int64)) / 8 == pytest.approx(ideal)


def test_ranges_and_models_without_a_grid(tmp_path):
    values = images(20)
    for low, high in ((-1.0, 1.0), (0.0, 0.5), (2.0, 4.0)):
        model, steps = make(low=low, high=high)
        np.save(tmp_path / "x.npy", values)
        files = []
        for number, one in enumerate((model, model.with_grid(None))):
            done = compress(
                tmp_path / "x.npy", one, tmp_path / f"{number}.nf", steps, overwrite=True
            )
            files.append(done.path.read_bytes())
            decompress(done.path, one, tmp_path / "y.npy", steps, overwrite=True)
            assert np.array_equal(np.load(tmp_path / "y.npy"), values)
        assert files[0] == files[1]


def test_any_bytes_not_only_likely_ones(tmp_path):
    model, steps = make()
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (40, 24), np.uint8))
    compress(tmp_path / "x.npy", model, tmp_path / "x.nf", steps)
    decompress(tmp_path / "x.nf", model, tmp_path / "y.npy", steps)
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "x.npy").read_bytes()


def test_a_run_folder_and_the_command_line(tmp_path):
    testing = pytest.importorskip("typer.testing")
    from nicefast.cli import app

    model, steps = make()
    run = tmp_path / "run"
    run.mkdir()
    nf.save(model, run / "model.safetensors")
    steps.save(run / "preprocessing.safetensors")
    np.save(tmp_path / "x.npy", images())

    def call(*arguments):
        return testing.CliRunner().invoke(app, [str(a) for a in arguments])

    found = call("compress", tmp_path / "x.npy", "--model", run, "--out", tmp_path / "x.nf")
    assert found.exit_code == 0, found.output
    assert "50 rows, 1,328 bytes -> " in found.output
    found = call("decompress", tmp_path / "x.nf", "--model", run, "--out", tmp_path / "y.npy")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "x.npy").read_bytes()
    found = call("decompress", tmp_path / "x.npy", "--model", run, "--out", tmp_path / "z.npy")
    assert found.exit_code == 2
    assert found.stderr.count("\n") == 1
    assert "is not a file that nicefast compressed" in found.stderr


# what is refused ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    place = tmp_path_factory.mktemp("small")
    model, steps = make()
    np.save(place / "x.npy", images(4))
    compress(place / "x.npy", model, place / "x.nf", steps)
    return place, model, steps


def test_every_flipped_byte_and_every_cut_is_refused(small):
    place, model, steps = small
    whole = (place / "x.nf").read_bytes()
    damaged = [whole[:i] for i in range(len(whole))]
    damaged += [whole + b"\0", b"", whole * 2]
    for i in range(len(whole)):
        for flip in (1, 128, 255):
            damaged.append(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
    for content in damaged:
        (place / "damaged.nf").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            decompress(place / "damaged.nf", model, place / "out", steps)
    assert sorted(p.name for p in place.iterdir()) == ["damaged.nf", "x.nf", "x.npy"]


def test_bytes_that_lie_behind_a_right_checksum(small):
    """What nobody writes by accident: still an error, no hang, and no memory for promises."""
    place, model, steps = small
    codec = Codec(model, steps)
    words = next(Reader(place / "x.nf").chunks(99))[1]
    content, wrapper = Reader(place / "x.nf").content, Reader(place / "x.nf").head.wrapper

    def lie(kind=1, rows=4, wrapper=wrapper, chunks=(words,), content=content):
        with open(place / "lie.nf", "wb") as file:
            writer = Writer(file, Head(kind, codec.identity, codec.arithmetic, rows, wrapper))
            for chunk in chunks:
                writer.chunk(np.asarray(chunk, np.uint32))
            writer.finish(content)
        return place / "lie.nf"

    assert decompress(lie(), model, place / "true.npy", steps, overwrite=True)
    bomb = json.dumps(["|u1", 1, 4, 6]).encode() + b"\0" + zlib.compress(bytes(1 << 28))
    for path in (
        {"rows": 2**62},
        {"rows": 5},
        {"rows": 3},
        {"rows": 0},
        {"kind": 9},
        {"kind": 0},
        {"kind": 3},
        {"chunks": ()},
        {"chunks": (words, words)},
        {"chunks": (words[:-1],)},
        {"chunks": ([1, 2, 3],)},
        {"wrapper": b""},
        {"wrapper": b'["|u1",1,4,7]'},
        {"wrapper": b'["O",1,4,6]'},
        {"wrapper": b'["|i1",1,4,6]'},
        {"wrapper": bomb},
        {"content": bytes(8)},
    ):
        with pytest.raises(ValueError, match="lie"):
            decompress(lie(**path), model, place / "out.npy", steps)
        assert not (place / "out.npy").exists()


def test_names_do_not_lead_out_of_the_folder(tmp_path):
    pytest.importorskip("PIL")
    model, steps = make()
    codec = Codec(model, steps)
    words = codec.encode(images(1).reshape(1, -1).astype(np.int64))
    for name in ("../x.png", "/tmp/x.png", ".hidden.png", "a/b.png", ""):
        wrapper = zlib.compress(json.dumps([[4, 6], [name]]).encode())
        with open(tmp_path / "x.nf", "wb") as file:
            writer = Writer(file, Head(3, codec.identity, codec.arithmetic, 1, wrapper))
            writer.chunk(words)
            writer.finish(bytes(8))
        with pytest.raises(ValueError, match="names of files"):
            decompress(tmp_path / "x.nf", model, tmp_path / "out", steps)
        assert [p.name for p in tmp_path.iterdir()] == ["x.nf"]


def test_another_model_or_arithmetic(small, monkeypatch):
    place, model, steps = small
    other, _ = make(hidden=(17,))
    with pytest.raises(ValueError, match="was compressed with another model"):
        decompress(place / "x.nf", other, place / "out.npy", steps)
    nudged = model.with_grid(model.grid)
    with torch.no_grad():
        nudged.couplings[0].conditioner.linears[0].weight[0, 0] += 1e-7
    with pytest.raises(ValueError, match="was compressed with another model"):
        decompress(place / "x.nf", nudged, place / "out.npy", steps)
    monkeypatch.setattr("nicefast.compression.tables.WEIGHT", 1 << 21)
    with pytest.raises(ValueError, match="where the arithmetic is another"):
        decompress(place / "x.nf", model, place / "out.npy", steps)


def test_models_that_are_no_code(tmp_path):
    np.save(tmp_path / "x.npy", images(3))
    model, steps = make()

    def refused(model, steps, error=ValueError):
        with pytest.raises(error) as found:
            compress(tmp_path / "x.npy", model, tmp_path / "x.nf", steps)
        assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]
        return str(found.value)

    assert "its only step 'dequantise', got steps: none" in refused(model, None)
    both = Preprocessing(
        (Dequantise(256), Standardise(torch.zeros(24).double(), torch.ones(24).double()))
    )
    assert "got steps: dequantise, standardise" in refused(model, both)
    assert "a power of two apart, got 0.0588" in refused(model, Preprocessing((Dequantise(17),)))
    odd = Preprocessing((Dequantise(256, 0.001, 1.001),))
    assert "a power of two apart" in refused(model, odd)
    assert "the grid of its levels, 0.00390625, got 0.5" in refused(model.with_grid(0.5), steps)
    assert "rows of 12 values, as the model does, got 24" in refused(make((12,))[0], steps)
    assert "takes a context" in refused(make(context=2)[0], steps)
    assert "no such file or run folder" in refused(tmp_path / "nothing", steps)
    assert "nicefast.NICE" in refused(torch.distributions.Normal(0.0, 1.0), steps, TypeError)


def test_sources_that_hold_no_levels(tmp_path):
    model, steps = make((3,), 4)
    files = {
        "float.npy": (np.zeros((2, 3)), "must hold integers, got float64"),
        "beyond.npy": (
            np.array([[0, 3, 0], [0, 0, 4]]),
            "row 1, feature 2: level 4 is outside 0 to 3",
        ),
        "below.npy": (np.array([[0, -1, 0]]), "row 0, feature 1: level -1 is outside"),
        "huge.npy": (np.full((1, 3), 2**63, np.uint64), "integers beyond 2\\^63"),
        "flat.npy": (np.zeros(3, np.int64), "must hold rows, got shape"),
        "fortran.npy": (np.asfortranarray(np.zeros((2, 3), np.int64)), "Fortran order"),
    }
    for name, (values, message) in files.items():
        np.save(tmp_path / name, values)
        with pytest.raises(ValueError, match=message):
            compress(tmp_path / name, model, tmp_path / "out.nf", steps)
    model, steps = make((3,), None)
    for text in ("1,2,03\n", "1, 2,3\n", "1,2,3\n\n", '"1",2,3\n', "1,2,-0\n"):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=r"would not come back byte for byte|x\.csv"):
            compress(tmp_path / "x.csv", model, tmp_path / "out.nf", steps)
    (tmp_path / "x.csv").write_text("1,2,3.5\n")
    with pytest.raises(ValueError, match="must hold integers, got float64"):
        compress(tmp_path / "x.csv", model, tmp_path / "out.nf", steps)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        compress(tmp_path / "nothing", model, tmp_path / "out.nf", steps)
    (tmp_path / "x.csv").write_text("1,2,3\n")
    with pytest.raises(ValueError, match="there is no folder"):
        compress(tmp_path / "x.csv", model, tmp_path / "no" / "out.nf", steps)
    compress(tmp_path / "x.csv", model, tmp_path / "out.nf", steps)
    with pytest.raises(ValueError, match="exists already"):
        compress(tmp_path / "x.csv", model, tmp_path / "out.nf", steps)
    with pytest.raises(TypeError, match="source must be a path, got Tensor"):
        compress(torch.zeros(2, 3), model, tmp_path / "other.nf", steps)
    with pytest.raises(TypeError, match="out must be a path, got NoneType"):
        compress(tmp_path / "x.csv", model, None, steps)
    with pytest.raises(TypeError, match="path must be a path, got int"):
        decompress(3, model, tmp_path / "other", steps)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_tables_hold_any_latent_and_cost_next_to_nothing(prior):
    grid = 2.0**-5
    log_scale = torch.tensor([-12.0, -5.0, -1.0, 0.0, 2.0, 8.0, 20.0])
    tables = make_tables(log_scale, grid, prior)
    assert max(len(t.weights) for t in tables) <= SYMBOLS + 2
    h = nf.functional.sample_prior(log_scale, 5000, prior, seed=1)
    latents = (h / grid).round().long().clamp(-(2**23), 2**23).numpy()
    for d, table in enumerate(tables):
        column = latents[:, d : d + 1]
        words = Coder([table]).encode(column)
        cells = nf.functional.cell_log_prob(
            torch.from_numpy(column) * grid, log_scale[d : d + 1].double(), grid, prior
        )
        assert 32 * len(words) <= -1.001 * cells.double().sum().item() / math.log(2) + 64
    most = 1 << (BEYOND - 1)
    latents[:4] = np.array([[most - 1], [-most], [2**24], [-(2**24)]])
    coder = Coder(tables)
    assert np.array_equal(coder.decode(coder.encode(latents), 5000), latents)
    assert coder.decode(coder.encode(latents[:0]), 0).shape == (0, 7)
    with pytest.raises(ValueError, match="more bits"):
        coder.decode(coder.encode(latents), 4999)
    assert digest(tables) != digest(
        make_tables(log_scale, grid, "logistic" if prior == "normal" else "normal")
    )
