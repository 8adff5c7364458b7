"""Runs of one preset become one table."""

import json

import pytest

for package in ("typer", "rich", "matplotlib", "safetensors", "sklearn"):
    pytest.importorskip(package, reason=f"needs {package}")

from typer.testing import CliRunner

from bench import paper
from nicefast import cli

QUICK = ("--epochs", "1", "--hidden", "8", "--couplings", "2", "--noise-draws", "2")


def fit(out, *arguments):
    result = CliRunner().invoke(cli.app, ["fit", "digits", "--out", str(out), *QUICK, *arguments])
    assert result.exit_code == 0, result.output
    return str(out)


def test_runs_of_one_preset_become_one_table(tmp_path, capsys):
    runs = [fit(tmp_path / f"run{s}", "--seed", str(s)) for s in (0, 1)]
    out = tmp_path / "paper"
    assert paper.main([*runs, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for seed in (0, 1):
        result = json.loads((out / f"seed-{seed}" / "result.json").read_text())
        assert f"**{result['held_out']['NICE']['log_prob']:.2f}**" in said
    assert "Mean of 2 seeds" in said
    assert not list(out.rglob("*.safetensors"))
    assert (out / "seed-0" / "samples.png").exists()


def test_other_runs_are_refused_in_one_line(tmp_path, capsys):
    run, other = fit(tmp_path / "run"), fit(tmp_path / "other", "--lr", "0.001")
    assert paper.main([run, other, "--out", str(tmp_path / "out")]) == 2
    assert paper.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("runs must differ in their seeds alone")
    assert said[1].endswith("is no finished run: it has no result.json")
    assert not (tmp_path / "out").exists()
