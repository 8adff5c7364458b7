"""The command line: a whole run, its files, and one line for every mistake."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nicefast as nf

for package in ("typer", "rich", "matplotlib", "safetensors", "sklearn"):
    pytest.importorskip(package, reason=f"needs {package}")

from typer.testing import CliRunner

from nicefast import cli, plots, runs
from nicefast.data import load_data
from nicefast.training import evaluate

QUICK = ("--epochs", "2", "--hidden", "8", "--couplings", "2", "--noise-draws", "2")
FILES = ["history.csv", "learning_curve.png", "model.safetensors", "result.json", "samples.png"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "deep" / "digits"
    result = run("fit", "digits", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_a_run_leaves_its_five_files_and_nothing_beside_them(finished):
    out, _ = finished
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert list(out.parent.iterdir()) == [out]
    for name in ("samples.png", "learning_curve.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    with (out / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_result_json_states_the_whole_protocol(finished):
    out, _ = finished
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["hidden"] == "8"
    assert result["config"]["seed"] == 0
    assert result["data"]["rows"] == {"train": 1258, "validation": 180, "test": 359}
    assert (result["noise"]["draws"], result["noise"]["seed"]) == (2, 0)
    assert result["versions"]["nicefast"] == nf.__version__
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["held_out"]) == {"NICE", "full Gaussian", "diagonal Gaussian"}


def test_the_saved_model_scores_as_reported(finished):
    out, output = finished
    reported = json.loads((out / "result.json").read_text())["held_out"]["NICE"]
    score = evaluate(nf.load(out / "model.safetensors"), load_data("digits").test, 17, 2, 0)
    assert score._asdict() == reported
    assert f"{score.log_prob:.2f} ± {score.standard_error:.2f}" in output
    assert f"{score.bits_per_dim:.3f}" in output


def test_output_away_from_a_terminal_is_plain_lines(finished):
    _, output = finished
    assert "\x1b" not in output
    assert "\r" not in output
    assert "epoch    2/2: training" in output
    for name in FILES:
        assert name in output
    assert "scores the held-out rows exactly the same" in output


def test_the_seed_decides_the_figures(finished, tmp_path):
    first = json.loads((finished[0] / "result.json").read_text())["held_out"]
    run("fit", "digits", "--out", tmp_path / "same", *QUICK)
    assert json.loads((tmp_path / "same" / "result.json").read_text())["held_out"] == first


@pytest.fixture
def table(tmp_path) -> Path:
    rows = np.random.default_rng(0).normal(size=(60, 3))
    np.save(tmp_path / "table.npy", rows)
    return tmp_path / "table.npy"


def test_continuous_data_has_no_bits_per_dim(table, tmp_path):
    result = run("fit", table, "--out", tmp_path / "run", *QUICK)
    assert result.exit_code == 0, result.output
    assert "bits/dim" not in result.output
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["noise"] is None
    assert stored["held_out"]["full Gaussian"]["bits_per_dim"] is None


def test_a_singular_baseline_is_left_out_and_said(table, tmp_path):
    rows = np.load(table)
    np.save(table, np.concatenate([rows, rows[:, :1] * 2], 1))
    result = run("fit", table, "--out", tmp_path / "run", *QUICK)
    assert result.exit_code == 0, result.output
    assert "no full Gaussian: the covariance" in result.output
    assert "diagonal Gaussian" in result.output


MISTAKES = {
    "data": (["digitz"], "got 'digitz'"),
    "missing file": (["no/such.npy"], "no/such.npy: no such file"),
    "hidden": (["digits", "--hidden", "64,x"], "--hidden must be positive integers"),
    "hidden zero": (["digits", "--hidden", "64,0"], "got '64,0'"),
    "prior": (["digits", "--prior", "cauchy"], "'cauchy'"),
    "partition": (["digits", "--partition", "thirds"], "'thirds'"),
    "activation": (["digits", "--activation", "sine"], "'sine'"),
    "couplings": (["digits", "--couplings", "0"], "couplings"),
    "epochs": (["digits", "--epochs", "0"], "epochs must be at least 1, got 0"),
    "lr": (["digits", "--lr", "nan"], "lr must be positive"),
    "noise": (["digits", "--noise-draws", "0"], "--noise-draws must be at least 1, got 0"),
    "seed": (["digits", "--seed", "-1"], "--seed must be"),
    "device": (["digits", "--device", "abacus"], "--device 'abacus'"),
    "diverging": (["digits", "--lr", "1e30"], "try a smaller lr"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(name, tmp_path):
    arguments, message = MISTAKES[name]
    quick = [] if name in ("hidden", "hidden zero", "couplings", "epochs", "noise") else QUICK
    result = run("fit", *quick, *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("nicefast: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_told_otherwise(table, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "result.json").write_text("old")
    refused = run("fit", table, "--out", out, *QUICK)
    assert refused.exit_code == 2
    assert "give --overwrite" in refused.stderr
    assert (out / "result.json").read_text() == "old"

    assert run("fit", table, "--out", out, *QUICK, "--overwrite").exit_code == 0
    assert json.loads((out / "result.json").read_text())["config"]["epochs"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "table.npy"]


def test_overwrite_never_removes_what_is_not_a_run_folder(table, tmp_path):
    result = run("fit", table, "--out", tmp_path, *QUICK, "--overwrite")
    assert result.exit_code == 2
    assert "not a run folder" in result.stderr
    assert table.exists()


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError("disk full"), 2)], ids=["int", "os"]
)
def test_an_interrupted_run_leaves_nothing_and_keeps_the_old_one(
    table, tmp_path, monkeypatch, error, code
):
    out = tmp_path / "run"
    out.mkdir()
    (out / "result.json").write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(runs, "plot_learning_curve", fail)
    result = run("fit", table, "--out", out, *QUICK, "--overwrite")
    assert result.exit_code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "table.npy"]
    assert (out / "result.json").read_text() == "old"


def test_a_model_that_does_not_reload_the_same_is_not_delivered(table, tmp_path, monkeypatch):
    def other(path, device=None):
        model = nf.load(path, device)
        torch.nn.init.zeros_(model.scaling.log_scale)
        return model

    monkeypatch.setattr(runs, "load", other)
    result = run("fit", table, "--out", tmp_path / "run", *QUICK)
    assert result.exit_code == 1
    assert "the saved model scores" in result.stderr
    assert not (tmp_path / "run").exists()


def test_pictures_of_every_kind_of_row(tmp_path):
    for shape in ((1, 8, 8), (3, 5, 4), (28, 28), (2, 4, 4), (2,)):
        path = tmp_path / "picture.png"
        plots.plot_samples(torch.rand(10, *shape), torch.rand(10, *shape), path, "noise")
        assert path.stat().st_size > 1000
        path.unlink()


def test_version():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"nicefast {nf.__version__}\n")


COMMAND = "import sys; {before}; from nicefast.cli import main; main()"


def test_as_a_process_a_mistake_is_one_line_without_a_traceback(tmp_path):
    command = [sys.executable, "-c", COMMAND.format(before="pass"), "fit", "digitz"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "run"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "got 'digitz'" in done.stderr


def test_ctrl_c_ends_a_process_quietly_and_leaves_nothing(tmp_path):
    # A shell's background jobs ignore the signal, and so would what they start.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", COMMAND.format(before=listen), "fit", "digits"]
    process = subprocess.Popen(
        [*command, "--out", tmp_path / "run", *QUICK, "--epochs", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "nicefast: interrupted, nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_remedy_is_one_line():
    before = "sys.modules['typer'] = None"
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(before=before)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'nicefast[train]'" in done.stderr
