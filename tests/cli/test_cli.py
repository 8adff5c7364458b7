"""The command line: a whole run, its files, and one line for every mistake."""

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
from nicefast.evaluation import evaluate
from nicefast.preprocessing import Preprocessing
from nicefast.training.configuration import Configuration
from nicefast.training.presets import PRESETS

QUICK = ("--epochs", "2", "--hidden", "8", "--couplings", "2", "--noise-draws", "2")
FILES = [
    "config.toml", "learning_curve.png", "metrics.jsonl", "model.safetensors",
    "preprocessing.safetensors", "result.json", "samples.png", "spectrum.png",
]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "deep" / "digits"
    result = run("fit", "digits", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_a_run_leaves_its_files_and_nothing_beside_them(finished):
    out, _ = finished
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert list(out.parent.iterdir()) == [out]
    for name in FILES:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_result_json_states_the_whole_protocol(finished):
    out, _ = finished
    result = json.loads((out / "result.json").read_text())
    config = Configuration.of_file(out / "config.toml")
    assert (config.model["hidden"], config.seed, config.preset) == ((8,), 0, "digits")
    assert result["model"]["hidden"] == [8]
    assert result["data"]["rows"] == {"train": 1258, "validation": 180, "test": 359}
    assert (result["noise"]["draws"], result["noise"]["seed"]) == (2, 0)
    assert result["versions"]["nicefast"] == nf.__version__
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["held_out"]) == {"NICE", "full Gaussian", "diagonal Gaussian"}


def test_the_saved_model_scores_as_reported(finished):
    out, output = finished
    reported = json.loads((out / "result.json").read_text())["held_out"]["NICE"]
    model = nf.load(out / "model.safetensors")
    steps = Preprocessing.load(out / "preprocessing.safetensors")
    score = evaluate(model, load_data("digits").test, steps, 2, 0)
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
    assert "scores held-out rows exactly the same" in output


def test_the_seed_decides_the_figures(finished, tmp_path):
    first = json.loads((finished[0] / "result.json").read_text())["held_out"]
    run("fit", "digits", "--out", tmp_path / "same", *QUICK)
    assert json.loads((tmp_path / "same" / "result.json").read_text())["held_out"] == first


def test_a_stored_configuration_repeats_the_run(finished, tmp_path):
    first = json.loads((finished[0] / "result.json").read_text())["held_out"]
    config = finished[0] / "config.toml"
    result = run("fit", "--config", config, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "again" / "result.json").read_text())["held_out"] == first
    assert (tmp_path / "again" / "config.toml").read_text() == config.read_text()


def test_an_interrupted_run_is_resumed_with_the_same_figures(finished, tmp_path, monkeypatch):
    first = json.loads((finished[0] / "result.json").read_text())["held_out"]
    out, plot = tmp_path / "run", plots.plot_samples

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "fit", with_snapshots(runs.fit))
    monkeypatch.setattr(plots, "plot_samples", fail)
    result = run("fit", "digits", "--out", out, *QUICK)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.unfinished"]
    refused = run("fit", "digits", "--out", out, *QUICK)
    assert refused.exit_code == 2
    assert "unfinished: give --resume to go on with it, or --overwrite" in refused.stderr
    other = run("fit", "digits", "--out", out, *QUICK, "--seed", "1", "--resume")
    assert other.exit_code == 2
    assert "is of another fit: its seed is 0, expected 1" in other.stderr

    monkeypatch.setattr(plots, "plot_samples", plot)
    result = run("fit", "digits", "--out", out, *QUICK, "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "result.json").read_text())["held_out"] == first
    assert sorted(path.name for path in out.iterdir()) == FILES
    nothing = run("fit", "digits", "--out", tmp_path / "new", *QUICK, "--resume")
    assert nothing.exit_code == 2
    assert "to go on from" in nothing.stderr


def test_two_processes_fit_as_one(tmp_path):
    """Under torchrun each takes its share of every batch; the first writes the run."""
    found = []
    for world in (1, 2):
        out = tmp_path / f"run{world}"
        command = ["fit", "digits", *QUICK, "--out", str(out)]
        if world == 1:
            done = run(*command)
            assert done.exit_code == 0, done.output
        else:
            ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            ranks += [f"--nproc-per-node={world}", "-m", "nicefast"]
            done = subprocess.run([*ranks, *command], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        result = json.loads((out / "result.json").read_text())
        assert result["versions"]["processes"] == world
        found.append(result["held_out"]["NICE"]["log_prob"])
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run1", "run2"]


def test_events_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run("fit", "digits", "--out", tmp_path / "run", *QUICK, "--tensorboard")
    assert result.exit_code == 0, result.output
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation")] == [1, 2]


def with_snapshots(fit):
    return lambda *arguments, **options: fit(*arguments, **options, snapshot_seconds=0)


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
    "noise": (["digits", "--noise-draws", "0"], "noise_draws must be at least 1, got 0"),
    "seed": (["digits", "--seed", "-1"], "seed must be from 0"),
    "preset": (["--preset", "mnits"], "preset must be one of digits, digits-lossless, tabular, "),
    "nothing": ([], "DATA, --preset or --config must be given"),
    "set": (["digits", "--set", "recipe.clip"], "--set must be KEY=VALUE, got 'recipe.clip'"),
    "key": (["digits", "--set", "recipe.clap=1"], "'recipe.clap' is no key"),
    "value": (["digits", "--set", "recipe.clip=-1"], "clip must be non-negative and finite"),
    "config": (["--config", "no/such.toml"], "no/such.toml cannot be read"),
    "device": (["digits", "--device", "abacus"], "device 'abacus' cannot be used here"),
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


def test_a_diverging_fit_is_one_line_and_exit_code_1(tmp_path):
    result = run("fit", "digits", *QUICK, "--lr", "1e30", "--out", tmp_path / "run")
    assert result.exit_code == 1, result.output
    assert "try a smaller lr" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_presets_and_data_are_listed():
    listed = run("presets")
    assert listed.exit_code == 0
    assert all(name in listed.output for name in PRESETS)
    known = run("data", "--data-dir", "no/such/folder")
    assert known.exit_code == 0, known.output
    for name in ("digits", "mnist", "cifar10", "tfd"):
        assert f"{name}: " in known.output
    assert "missing: train_32x32.mat" in known.output
    assert "looked in no/such/folder, and in folders there" in known.output


def test_data_names_every_folder_that_it_looked_in(monkeypatch, tmp_path):
    monkeypatch.delenv("NICEFAST_DATA", raising=False)
    assert "looked in data, /usr/share/datasets, and" in run("data").output
    monkeypatch.setenv("NICEFAST_DATA", f"{tmp_path}/a:{tmp_path}/b")
    assert f"looked in {tmp_path}/a, {tmp_path}/b, and" in run("data").output


def test_hidden_that_is_given_again_adds_layers(table, tmp_path):
    quick = [*QUICK, "--hidden", "5,4"]  # QUICK has 8
    assert run("fit", table, "--out", tmp_path / "run", *quick).exit_code == 0
    assert Configuration.of_file(tmp_path / "run" / "config.toml").model["hidden"] == (8, 5, 4)


def test_an_existing_folder_is_kept_unless_told_otherwise(table, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "result.json").write_text("old")
    refused = run("fit", table, "--out", out, *QUICK)
    assert refused.exit_code == 2
    assert "give --overwrite" in refused.stderr
    assert (out / "result.json").read_text() == "old"

    assert run("fit", table, "--out", out, *QUICK, "--overwrite").exit_code == 0
    assert json.loads((out / "result.json").read_text())["fit"]["epochs"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "table.npy"]


def test_overwrite_never_removes_what_is_not_a_run_folder(table, tmp_path):
    result = run("fit", table, "--out", tmp_path, *QUICK, "--overwrite")
    assert result.exit_code == 2
    assert "not a run folder" in result.stderr
    assert table.exists()


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError("disk full"), 2)], ids=["int", "os"]
)
def test_an_interrupted_run_can_be_resumed_and_keeps_the_old_one(
    table, tmp_path, monkeypatch, error, code
):
    out = tmp_path / "run"
    out.mkdir()
    (out / "result.json").write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(plots, "plot_learning_curve", fail)
    result = run("fit", table, "--out", out, *QUICK, "--overwrite")
    assert result.exit_code == code
    # training was over: what it came to is not lost
    left = ["run", "run.unfinished", "table.npy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert (out / "result.json").read_text() == "old"
    monkeypatch.undo()
    again = run("fit", table, "--out", out, *QUICK, "--overwrite", "--resume")
    assert again.exit_code == 0, again.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "table.npy"]
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_a_model_that_does_not_reload_the_same_is_not_delivered(table, tmp_path, monkeypatch):
    def other(path, device=None):
        model = nf.load(path, device)
        torch.nn.init.zeros_(model.scaling.log_scale)
        return model

    monkeypatch.setattr(runs, "load", other)
    result = run("fit", table, "--out", tmp_path / "run", *QUICK)
    assert result.exit_code == 1
    assert "the saved model does not score the test rows" in result.stderr
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
    assert errors == "nicefast: interrupted, nothing was kept\n"
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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 9 TiB"), "Unable to allocate 9 TiB"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory. Tried"),
    ],
)
def test_a_lack_of_memory_is_one_line(error, said, capsys):
    import typer

    from nicefast.cli.common import one_line_errors

    with pytest.raises(typer.Exit) as ended, one_line_errors():
        raise error
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"nicefast: error: {said}\n"
