"""`nicefast score`: a run's model, a file, and the densities of its rows."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

for package in ("typer", "rich", "matplotlib", "safetensors", "sklearn", "pyarrow"):
    pytest.importorskip(package, reason=f"needs {package}")

from typer.testing import CliRunner

import nicefast as nf
from nicefast import cli

QUICK = ("--epochs", "1", "--hidden", "8", "--couplings", "2", "--noise-draws", "2")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    rows = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    np.save(folder / "rows.npy", rows)
    result = run("fit", folder / "rows.npy", "--out", folder / "run", *QUICK)
    assert result.exit_code == 0, result.output
    return folder


def test_a_file_is_scored_as_python_scores_it(place, tmp_path):
    out = tmp_path / "scores.npy"
    result = run("score", place / "run", place / "rows.npy", "--out", out)
    assert result.exit_code == 0, result.output
    assert "500 rows in" in result.output
    found = nf.score(place / "run", place / "rows.npy").values["log_prob"]
    np.testing.assert_array_equal(np.load(out), found)


def test_keys_columns_and_bad_rows(place, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.load(place / "rows.npy").copy()
    rows[[3, 7], 1] = np.nan
    table = {"id": [f"r{i}" for i in range(500)]} | {f"x{i}": rows[:, i] for i in range(4)}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    out = tmp_path / "scores.parquet"
    result = run(
        "score", place / "run", tmp_path / "rows.parquet", "--out", out, "--keys", "id",
        "--columns", "x0,x1,x2,x3", "--outputs", "log_prob,bits_per_dim",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 rows are not finite and have NaN: rows 3, 7" in result.output
    scored = pq.read_table(out)
    assert scored.column_names == ["id", "log_prob", "bits_per_dim"]
    assert np.isnan(scored["log_prob"].to_numpy()).nonzero()[0].tolist() == [3, 7]
    strict = run(
        "score", place / "run", tmp_path / "rows.parquet", "--out", tmp_path / "s.csv",
        "--columns", "x0,x1,x2,x3", "--keys", "id", "--strict",
    )  # fmt: skip
    assert strict.exit_code == 2
    assert "row 3" in strict.stderr


def test_an_option_that_is_given_again_adds_to_what_it_had(place, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.load(place / "rows.npy")
    table = {f"x{i}": rows[:, i] for i in range(4)} | {"id": range(500), "name": ["n"] * 500}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    out = tmp_path / "scores.parquet"
    result = run(
        "score", place / "run", tmp_path / "rows.parquet", "--out", out, "--keys", "id",
        "--keys", "name", "--columns", "x0,x1", "--columns", "x2", "--columns", "x3",
        "--outputs", "log_prob", "--outputs", "bits_per_dim",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    scored = pq.read_table(out)
    assert scored.column_names == ["id", "name", "log_prob", "bits_per_dim"]
    expected = nf.score(place / "run", rows).values["log_prob"]
    np.testing.assert_array_equal(scored["log_prob"].to_numpy(), expected)


def test_two_processes_write_the_file_of_one(place, tmp_path):
    outs = []
    for world in (1, 2):
        out = tmp_path / f"scores{world}.npy"
        command = ["score", str(place / "run"), str(place / "rows.npy"), "--out", str(out)]
        command += ["--chunk-rows", "64", "--batch-rows", "32"]
        if world == 1:
            done = run(*command)
            assert done.exit_code == 0, done.output
        else:
            ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            ranks += [f"--nproc-per-node={world}", "-m", "nicefast"]
            done = subprocess.run([*ranks, *command], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        outs.append(out.read_bytes())
    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none", "rows.npy"], "model none: no such file or run folder"),
        (["run", "none.npy"], "none.npy"),
        (["run", "rows.npy", "--outputs", "density"], "outputs must be among log_prob"),
        (["run", "rows.npy", "--columns", "0,1"], "2"),
        (["run", "rows.npy", "--resume"], "to go on from"),
        (["run", "rows.npy", "--device", "abacus"], "abacus"),
        (["run", "rows.npy", "--out", "scores.txt"], "out must end in one of"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(place, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(place)
    out = [] if "--out" in arguments else ["--out", tmp_path / "scores.npy"]
    result = run("score", *arguments, *out)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_of_a_score_needs_the_command_line(place):
    code = (
        "import nicefast as nf, sys; import torch; "
        f"found = nf.score({str(place / 'run')!r}, {str(place / 'rows.npy')!r}); "
        "assert 'typer' not in sys.modules; print(found.rows)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == 500
    assert torch.is_grad_enabled()
