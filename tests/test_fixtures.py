"""Files that version 0.1.0 wrote: read with the same results, or refused in one line.

tests/fixtures/make.py says how they came about.
"""

import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import nicefast as nf

pytest.importorskip("safetensors", reason="needs safetensors")
PLACE = Path(__file__).parent / "fixtures" / "v0_1_0"
EXPECTED = {k: torch.from_numpy(v) for k, v in np.load(PLACE / "expected.npz").items()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A copy of the files, in the current folder: nothing may change them."""
    found = tmp_path / "v0_1_0"
    shutil.copytree(PLACE, found)
    monkeypatch.chdir(found)
    return found


def command(*arguments):
    """Exit code and what was said."""
    pytest.importorskip("typer", reason="needs typer")
    from typer.testing import CliRunner

    from nicefast.cli import app

    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(got, name, tolerance=1e-4):
    expected = EXPECTED[name]
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def refused(code, said):
    """In one line that says what to do."""
    lines = [line for line in said.splitlines() if line.strip()]
    assert code == 2, said
    assert len(lines) == 1, said
    return True


@pytest.mark.parametrize("name", ["half", "random", "image", "double", "exact"])
def test_checkpoints(place, name):
    flow = nf.load(place / f"{name}.safetensors")
    x, c = EXPECTED[f"{name}.x"], EXPECTED.get(f"{name}.c")
    with torch.no_grad():
        same(flow.log_prob(x, c), f"{name}.log_prob")
        z = flow(x, c)[0]
        if name == "exact":
            assert torch.equal(z, EXPECTED["exact.z"])
            assert torch.equal(flow.inverse(z)[0], (x * 2**16).round() / 2**16)
        else:
            same(z, f"{name}.z")


@pytest.mark.parametrize("name", ["half", "random", "image", "double", "exact"])
def test_their_tensors_load_into_a_flow_of_the_same_kind(place, name):
    """As a state_dict of that version would: with the keys of then, and no others."""
    from safetensors.torch import load_file

    flow = nf.load(place / f"{name}.safetensors")
    keys = load_file(place / f"{name}.safetensors")
    flow.load_state_dict(keys, strict=True)
    x, c = EXPECTED[f"{name}.x"], EXPECTED.get(f"{name}.c")
    with torch.no_grad():
        same(flow.log_prob(x, c), f"{name}.log_prob")


def run_log_prob(folder, x):
    from nicefast.preprocessing import Preprocessing

    flow = nf.load(folder / "model.safetensors")
    steps = Preprocessing.load(folder / "preprocessing.safetensors")
    with torch.no_grad():
        return flow.log_prob(steps.forward(x)[0].float())


def test_run_folder(place):
    same(run_log_prob(place / "run", EXPECTED["run.x"]), "run.log_prob")
    code, said = command("score", "run", "table.csv", "--out", "of_run.npy")
    assert code == 0, said
    from nicefast.preprocessing import Preprocessing

    assert len(np.load("of_run.npy")) == 120
    found = nf.score("run", EXPECTED["run.x"].numpy())
    assert found.rows == 16
    assert Preprocessing.load(place / "run" / "preprocessing.safetensors").describe()


def test_interrupted_fit(place):
    before = contents(place / "interrupted.unfinished")
    arguments = ["--epochs", "4", "--hidden", "8", "--couplings", "2", "--noise-draws", "1"]
    code, said = command(
        "fit", "table.csv", "--out", "interrupted", *arguments, "--seed", "0", "--resume"
    )
    if code != 0:
        assert refused(code, said)
        assert contents(place / "interrupted.unfinished") == before
        return
    same(run_log_prob(place / "interrupted", EXPECTED["run.x"]), "interrupted.log_prob", 1e-2)


def test_half_done_score(place):
    before = contents(place / "scores.npy.unfinished")
    code, said = command(
        "score", "half.safetensors", "rows.npy", "--out", "scores.npy", "--chunk-rows", 10,
        "--resume",
    )  # fmt: skip
    if code != 0:
        assert refused(code, said)
        assert contents(place / "scores.npy.unfinished") == before
        return
    same(torch.from_numpy(np.load("scores.npy")), "score.log_prob")


def test_container(place):
    pytest.importorskip("constriction", reason="needs constriction")
    from nicefast.compression import decompress

    try:
        decompress("levels.nf", "levels.safetensors", "again.npy", "levels.steps.safetensors")
    except ValueError as error:  # probabilities may differ in a last place on another machine
        if "where the arithmetic is another" not in str(error):
            raise
        return
    assert (place / "again.npy").read_bytes() == (place / "levels.npy").read_bytes()


def test_estimator(place):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another version of scikit-learn
        density = pickle.loads((place / "estimator.pickle").read_bytes())
    x = EXPECTED["run.x"].numpy()
    same(torch.from_numpy(density.score_samples(x)), "estimator.log_prob")
