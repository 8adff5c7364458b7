"""Files that earlier versions wrote: each gives the values stored beside it, or is refused.

tests/fixtures/write.py wrote them, one folder for each version. Checkpoints, exact flows, run
folders and estimators must load. An interrupted job, and a compressed file, which belongs to one
arithmetic, may be refused in one line instead, and is then left as it was.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("typer", "rich", "matplotlib", "safetensors", "sklearn", "pyarrow"):
    pytest.importorskip(package, reason=f"needs {package}")

from typer.testing import CliRunner

import nicefast as nf
from nicefast import cli
from nicefast.data import load_data
from nicefast.evaluation import evaluate
from nicefast.preprocessing import Preprocessing

FOLDERS = sorted(p.parent for p in (Path(__file__).parent / "fixtures").glob("*/about.json"))
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}
FLOWS = [
    folder / f"{name}.safetensors"
    for folder in FOLDERS
    for name in sorted(p.stem for p in folder.glob("*.npz"))
    if (folder / f"{name}.safetensors").is_file()
]


def ids(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def old(request, tmp_path, monkeypatch):
    """A copy of a version's files, with the time of change by which a score knows its source."""
    folder = tmp_path / "old"
    shutil.copytree(request.param, folder)
    moment = about(folder)["score"]["mtime_ns"]
    os.utime(folder / "rows.npy", ns=(moment, moment))
    monkeypatch.chdir(folder)
    return folder


def about(folder):
    return json.loads((folder / "about.json").read_text())


def command(*arguments):
    """``nicefast`` with the number of threads that the files were written with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def is_done(done, before, names):
    """Whether the command did its work; otherwise it must have been refused in one line that names
    one of ``names``, with every old file as it was."""
    if done.exit_code == 0:
        return True
    assert done.exit_code == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("nicefast: error: ")
    assert any(name in done.stderr for name in names), done.stderr
    for path, content in before.items():
        assert path.read_bytes() == content, path
    return False


def test_there_are_files_of_the_first_version():
    assert "0.1.0" in [folder.name for folder in FOLDERS]
    assert len([path for path in FLOWS if path.parent.name == "0.1.0"]) == 7


@pytest.mark.parametrize("path", FLOWS, ids=ids)
def test_a_checkpoint_loads_with_its_weights_and_densities(path):
    model = nf.load(path)
    stored = {k: torch.from_numpy(v) for k, v in np.load(path.with_suffix(".npz")).items()}
    state = model.state_dict()
    weights = {k.removeprefix("state/"): v for k, v in stored.items() if k.startswith("state/")}
    assert weights
    for name, value in weights.items():
        assert torch.equal(state[name], value), name
    x, context = stored["x"], stored.get("context")
    close = CLOSE[x.dtype]
    z, log_det = model(x, context)
    torch.testing.assert_close(model.log_prob(x, context), stored["log_prob"], **close)
    torch.testing.assert_close(log_det, stored["log_det"], **close)
    x_back, _ = model.inverse(stored["z"], context)
    if model.grid is None:
        torch.testing.assert_close(z, stored["z"], **close)
        torch.testing.assert_close(x_back, stored["x_back"], **close)
    else:  # the arithmetic of an exact flow is the same on every machine
        assert torch.equal(z, stored["z"])
        assert torch.equal(x_back, stored["x_back"])


def test_a_run_folder_loads_and_scores_as_reported(old):
    reported = json.loads((old / "run" / "result.json").read_text())["held_out"]["NICE"]
    model = nf.load(old / "run" / "model.safetensors")
    steps = Preprocessing.load(old / "run" / "preprocessing.safetensors")
    found = evaluate(model, load_data(str(old / "rows.npy")).test, steps, 2, 0)._asdict()
    assert found.keys() >= reported.keys()
    for name, value in reported.items():
        assert found[name] == (value if value is None else pytest.approx(value, abs=1e-4)), name
    scored = nf.score(old / "run", old / "rows.npy", outputs=["log_prob", "z"]).values
    for name, value in np.load(old / "scores.npz").items():
        np.testing.assert_allclose(scored[name], value, rtol=1e-4, atol=1e-4)
    done = command("spectrum", "run", "--out", "spectrum.png")
    assert done.exit_code == 0, done.stderr


def test_the_configuration_of_a_run_folder_repeats_it(old):
    done = command("fit", "--config", "run/config.toml", "--out", "again")
    assert done.exit_code == 0, done.stderr
    result = json.loads((old / "again" / "result.json").read_text())
    expected = about(old)["run"]
    assert result["held_out"]["NICE"]["log_prob"] == pytest.approx(expected["log_prob"], abs=1e-2)


def test_an_interrupted_fit_is_completed_or_refused(old):
    before = contents(old)
    config = "interrupted.unfinished/config.toml"
    done = command("fit", "--config", config, "--out", "interrupted", "--resume")
    if not is_done(done, before, ["snapshot.safetensors", "--resume", "resume:"]):
        return
    result = json.loads((old / "interrupted" / "result.json").read_text())
    expected = about(old)["run"]
    assert result["fit"]["epochs"] == 4
    assert result["fit"]["best_epoch"] == expected["best_epoch"]
    assert result["held_out"]["NICE"]["log_prob"] == pytest.approx(expected["log_prob"], abs=1e-2)
    kept = before[old / "interrupted.unfinished" / "metrics.jsonl"].splitlines()
    lines = (old / "interrupted" / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines[: len(kept)]] == [json.loads(x) for x in kept]


@pytest.mark.parametrize("kind", ["npy", "csv", "parquet"])
def test_an_interrupted_score_is_completed_or_refused(old, kind):
    before = contents(old)
    out = old / f"scores.{kind}"
    options = [*about(old)["score"]["options"], "--resume"]
    done = command("score", "run", "rows.npy", "--out", out.name, *options)
    if not is_done(done, before, ["resume:", f"{out.name}.unfinished"]):
        assert not out.exists()
        return
    stored = np.load(old / "scores.npz")
    expected = np.column_stack([stored["log_prob"], stored["z"]])
    if kind == "npy":
        found = np.load(out)
    elif kind == "csv":
        found = np.loadtxt(out, delimiter=",", skiprows=1)
    else:
        import pyarrow.parquet as pq

        columns = pq.read_table(out)
        found = np.column_stack([columns["log_prob"].to_numpy(), np.stack(columns["z"].to_numpy())])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not out.with_name(f"{out.name}.unfinished").exists()


def test_a_compressed_file_comes_back_or_is_refused(old):
    pytest.importorskip("constriction", reason="needs constriction")
    before = contents(old)
    done = command(
        "decompress", "levels.nf", "--model", "exact.safetensors", "--out", "back.npy",
        "--preprocessing", "exact.preprocessing.safetensors",
    )  # fmt: skip
    if is_done(done, before, ["levels.nf"]):
        assert (old / "back.npy").read_bytes() == (old / "levels.npy").read_bytes()
    else:
        assert not (old / "back.npy").exists()


def test_pickled_estimators_score_as_they_did(old):
    stored = np.load(old / "estimators.npz")
    density = pickle.loads((old / "density.pickle").read_bytes())
    classifier = pickle.loads((old / "classifier.pickle").read_bytes())
    rows = stored["rows"]
    np.testing.assert_allclose(
        density.score_samples(rows), stored["score_samples"], rtol=1e-8, atol=1e-8
    )
    np.testing.assert_array_equal(density.integer_columns_, stored["integer_columns"])
    np.testing.assert_allclose(classifier.predict_proba(rows), stored["predict_proba"], atol=1e-8)
    np.testing.assert_array_equal(classifier.classes_, stored["classes"])
    assert density.sample(3, random_state=0).shape == (3, rows.shape[1])
