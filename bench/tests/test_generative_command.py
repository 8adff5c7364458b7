"""`python -m bench generative`: the whole of it, small; a replay gives the same figures."""

import json

import pytest

for package in ("matplotlib", "sklearn"):
    pytest.importorskip(package, reason=f"needs {package}")

from bench.__main__ import main
from bench.generative import measure, models, pictures, planar

TIMES = ("seconds", "cpu_seconds", "train_rate", "sample_rate", "density_rate")
NAMES = ("bayes.png", "moons.png", "reconstructions.png", "samples.png")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(models, "HELD_OUT", 60)
    monkeypatch.setattr(measure, "WEIGHTS", (1, 4, 16))
    monkeypatch.setattr(measure, "TIMED_ROWS", {"sample": 64, "density": 64, 1: 64, 4: 64, 16: 8})
    monkeypatch.setattr(planar, "TEST_ROWS", 1000)
    monkeypatch.setattr(planar, "GRID", 200)
    monkeypatch.setattr(pictures, "SIDE", 40)


def figures(path):
    found = json.loads(path.read_text())
    for records in found["models"].values():
        for record in records:
            for name in TIMES:
                record.pop(name, None)
    found.pop("budget")
    return found


def test_a_replay_of_the_recorded_steps_gives_the_same_figures(tmp_path, small, capsys):
    usual = ["generative", "--seeds", "2", "--draws", "1", "--out"]
    assert main([*usual, str(tmp_path / "a"), "--budget", "0.1"]) == 0
    record = tmp_path / "a" / "results.json"
    # with all the time there is, the recorded steps alone end the fits
    again = [str(tmp_path / "b"), "--budget", "1e6", "--replay", str(record)]
    assert main([*usual, *again]) == 0
    assert figures(record) == figures(tmp_path / "b" / "results.json")
    found = json.loads(record.read_text())
    for one in found["models"]["VAE"]:
        level = one["log_prob"]
        assert level["IWAE_1"] < level["IWAE_4"] < level["IWAE_16"]
    assert "log_prob" not in found["models"]["GAN"][0]
    assert found["reconstruction"]["NICE"] < 1e-4 < found["reconstruction"]["VAE"]
    text = (tmp_path / "b" / "table.md").read_text()
    assert "--budget 1e+06 --seeds 2 --draws 1 --replay" in text
    assert text in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert written == {"table.md", "results.json", *NAMES}
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert main(["generative", "--replay", str(tmp_path / "other.json")]) == 2
    assert "is no results.json of this command" in capsys.readouterr().err
    monkeypatch.setenv("NICEFAST_DATA", str(tmp_path))
    assert main(["generative", "--data", "tabular"]) == 2
    assert "magic-gamma" in capsys.readouterr().err
    for wrong in (["--budget", "0"], ["--seeds", "0"], ["--data", "cifar10"]):
        with pytest.raises(SystemExit):
            main(["generative", *wrong])
