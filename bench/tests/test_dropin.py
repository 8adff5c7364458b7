"""The measurement of what accelerate gains: what it checks and prints."""

import pytest
import torch

for package in ("nflows", "normflows", "zuko", "FrEIA"):
    pytest.importorskip(package, reason=f"needs {package}")

from bench import dropin  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.providers import Shape  # noqa: E402


def test_every_library_is_measured_before_and_after(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dropin, "SHAPES", (Shape(6, (8,), 16),))
    out = tmp_path / "t.md"
    assert main(["dropin", "--rounds", "1", "--seconds", "0", "--out", str(out)]) == 0
    text = out.read_text()
    assert text == capsys.readouterr().out
    for library in dropin.LIBRARIES:
        assert text.count(f"| {library} |") == 2


def test_counts_alone(monkeypatch, capsys):
    monkeypatch.setattr(dropin, "SHAPES", (Shape(6, (8,), 16),))
    assert main(["dropin", "--counts"]) == 0
    text = capsys.readouterr().out
    for library in dropin.LIBRARIES:
        assert text.count(f"| {library} |") == 1
    assert main(["dropin", "--rounds", "0"]) == 2
    assert "--rounds must be >= 1" in capsys.readouterr().err


def test_other_densities_after_accelerate_are_an_error(monkeypatch):
    monkeypatch.setattr(dropin, "SHAPES", (Shape(6, (8,), 16),))
    accelerate = dropin.nf.accelerate

    def wrong(module):
        report = accelerate(module)
        with torch.no_grad():
            next(p for p in module.parameters() if p.ndim == 2).add_(1)
        return report

    monkeypatch.setattr(dropin.nf, "accelerate", wrong)
    with pytest.raises(AssertionError, match="nflows: other densities after accelerate"):
        list(dropin.measure(dropin.SHAPES, 1, 0.0, torch.device("cpu")))
