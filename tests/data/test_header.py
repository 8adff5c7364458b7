"""The first line of a CSV file: names or a row, never a silent shift of all rows."""

import warnings

import numpy as np
import pytest
import torch

import nicefast as nf
from nicefast.data import load_data
from nicefast.data.errors import FileFormatError
from nicefast.data.header import HeaderWarning, is_header
from nicefast.data.readers import read

pytest.importorskip("pyarrow")
pytest.importorskip("safetensors")

REAL = [["0.5", "-1.25", "3.75"], ["0.1", "1e-3", "2.5"]]
WHOLE = [["5", "7", "2"], ["1", "8", "0"]]

UNSURE = [
    ("0,1,2", REAL), ("0,1,2", WHOLE), ("1,2,3", REAL), ("2,0,1", WHOLE), ("3,2,1", WHOLE),
    ("0.0,1.0,2.0", REAL), ("2001,2002,2003", WHOLE), ("2000,2005,2010", WHOLE),
    ("400.5,401.0,401.5", WHOLE), (" 0 , 1 , 2 ", REAL), (",0,1", [["0", "0.5", "0.25"]]),
    ("10,30,20", REAL), ("3,17,25", REAL), (",30,20", [["0", "0.5", "0.25"]]), ("0,1,2", []),
    ("0", [["0.5"]]), ("7", [["0.5"]]), ("0,1", [["5", "7"]]), ("NA,NA,NA", REAL), (",,", REAL),
    ("nan,,nan", REAL), ("inf,inf,inf", REAL),
]  # fmt: skip
NAMES = ["a,b,c", ",b,c", "a0,a1,a2", "x 1,2nd,1_0", "é,ü,一"]
ROWS = ["0,0,1", "5,5,5", "1.5,1.5,2", "1,nan,x", "a,1,2", "1,b,2", "nan,b,c"]
SAID = ["0.5,0.25,-1", "3.5,17,25", "-1.5,nan,2.5"]


def cut(line):
    return line.split(",")


@pytest.mark.parametrize(("line", "below"), UNSURE)
def test_what_nobody_can_tell_is_refused(line, below):
    with pytest.raises(
        FileFormatError, match=r"the first line may be a header or a row: .*header=True"
    ):
        is_header("f", cut(line), below)
    assert is_header("f", cut(line), below, True)
    assert not is_header("f", cut(line), below, "no")


def test_names_and_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line in NAMES:
            assert is_header("f", cut(line), REAL), line
        for line in ROWS:
            assert not is_header("f", cut(line), REAL), line
    for line in SAID:
        with pytest.warns(HeaderWarning, match="f: the first line holds numbers and is taken for"):
            assert not is_header("f", cut(line), WHOLE)
    with pytest.raises(ValueError, match=r"header must be 'auto', True .* got 'maybe'"):
        is_header("f", ["a"], [], "maybe")


@pytest.fixture
def files(tmp_path):
    """A table as pandas writes it, without and with its index, and the rows."""
    rows = np.random.default_rng(0).standard_normal((50, 3))
    lines = [",".join(map(repr, row)) for row in rows.tolist()]
    (tmp_path / "numbers.csv").write_text("\n".join(["0,1,2", *lines]) + "\n")
    index = [f"{i},{line}" for i, line in enumerate(lines)]
    (tmp_path / "index.csv").write_text("\n".join([",0,1,2", *index]) + "\n")
    (tmp_path / "id.csv").write_text("\n".join(["id,0,1,2", *index]) + "\n")
    (tmp_path / "bare.csv").write_text("\n".join(lines) + "\n")
    return tmp_path, rows


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return nf.NICE(3, hidden=(4,), couplings=2).eval()


def test_scores_are_never_shifted_silently(flow, files):
    place, rows = files
    expected = nf.score(flow, rows).values["log_prob"]
    columns = {"numbers": None, "index": [1, 2, 3], "id": [-3, -2, -1]}
    for name, chosen in columns.items():
        with pytest.raises(ValueError, match=f"{name}.csv: the first line may be a header"):
            nf.score(flow, place / f"{name}.csv", columns=chosen)
        for header in (True, "yes"):
            found = nf.score(flow, place / f"{name}.csv", columns=chosen, header=header)
            assert np.array_equal(found.values["log_prob"], expected)
    found = nf.score(flow, place / "numbers.csv", header=False)
    assert found.rows == len(rows) + 1
    assert np.array_equal(found.values["log_prob"][1:], expected)
    with pytest.raises(ValueError, match=r"id\.csv: the first line may be a header"):
        nf.score(flow, place / "id.csv", place / "y.csv", keys=[0])
    by_name = nf.score(flow, place / "id.csv", keys=["id"])
    assert np.array_equal(by_name.values["log_prob"], expected)
    with pytest.warns(HeaderWarning, match=r"bare\.csv: the first line holds numbers"):
        found = nf.score(flow, place / "bare.csv")
    assert np.array_equal(found.values["log_prob"], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nf.score(flow, place / "bare.csv", header=False)
    assert np.array_equal(found.values["log_prob"], expected)
    (place / "more.csv").write_bytes((place / "bare.csv").read_bytes())
    with pytest.warns(HeaderWarning) as said:
        nf.score(flow, [place / "bare.csv", place / "more.csv"])
    assert len(said) == 1
    for header in ("maybe", 1, None):
        with pytest.raises(ValueError, match="header must be"):
            nf.score(flow, place / "bare.csv", header=header)


def test_another_header_is_another_job(flow, files):
    place, _ = files
    options = {"batch_rows": 8, "chunk_rows": 8}

    def stop(done, *_):
        if done > 30:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        nf.score(
            flow, place / "numbers.csv", place / "y.npy", header=False, progress=stop, **options
        )
    with pytest.raises(ValueError, match="resume: source differs"):
        nf.score(flow, place / "numbers.csv", place / "y.npy", header=True, resume=True, **options)


def test_data_to_fit_go_by_the_same_rule(files):
    place, rows = files
    with pytest.raises(ValueError, match=r"numbers\.csv: the first line may be a header"):
        load_data(place / "numbers.csv")
    assert read(place / "numbers.csv", header=True).columns == ("0", "1", "2")
    assert np.array_equal(read(place / "numbers.csv", header="yes").values, rows)
    assert len(read(place / "numbers.csv", header=False).values) == len(rows) + 1
    data = load_data(place / "numbers.csv", header="yes")
    assert sum(map(len, (data.train, data.validation, data.test))) == len(rows)
    with pytest.warns(HeaderWarning, match=r"bare\.csv: the first line holds numbers"):
        assert np.array_equal(read(place / "bare.csv").values, rows)
    np.save(place / "x.npy", rows)
    with pytest.raises(ValueError, match=r"x\.npy: header is for \.csv files, got 'yes'"):
        read(place / "x.npy", header="yes")


def command(*arguments):
    from typer.testing import CliRunner

    from nicefast import cli

    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr.splitlines()


def test_on_the_command_line(flow, files):
    pytest.importorskip("typer")
    place, rows = files
    nf.save(flow, place / "m.safetensors")
    expected = nf.score(flow, rows).values["log_prob"]
    start = ("score", place / "m.safetensors", place / "numbers.csv", "--out", place / "y.npy")
    code, (line,) = command(*start)
    assert code == 2
    assert line.startswith(f"nicefast: error: {place}/numbers.csv: the first line may be a header")
    assert "--header yes" in line
    assert command(*start, "--header", "yes") == (0, [])
    np.testing.assert_allclose(np.load(place / "y.npy"), expected, rtol=1e-5)
    start = ("score", place / "m.safetensors", place / "bare.csv", "--out", place / "y.npy")
    code, (line,) = command(*start, "--overwrite")
    assert code == 0
    assert line.startswith(f"nicefast: warning: {place}/bare.csv: the first line holds numbers")
    small = ("--epochs", 1, "--hidden", 4, "--couplings", 2, "--noise-draws", 2)
    fit = ("fit", place / "numbers.csv", "--out", place / "run", *small)
    code, (line,) = command(*fit)
    assert code == 2
    assert "numbers.csv: the first line may be a header" in line
    assert command(*fit, "--header", "yes")[0] == 0
    assert 'header = "yes"' in (place / "run/config.toml").read_text()
