"""The measurement of scoring from file to file: what it checks and prints."""

import pytest

pytest.importorskip("pyarrow", reason="needs pyarrow")

from bench import throughput


def test_every_kind_of_file_is_scored_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "HIDDEN", (8,))
    assert throughput.main(["--rows", "300", "--rounds", "1", "--out", str(tmp_path / "t.md")]) == 0
    text = (tmp_path / "t.md").read_text()
    assert text == capsys.readouterr().out
    for kind in throughput.KINDS:
        assert f".{kind} to .{kind}" in text
    assert "| 1.00 |" in text  # in memory, of itself
    assert "300 rows" in text


def test_other_densities_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "HIDDEN", (8,))
    read = throughput._read
    monkeypatch.setattr(throughput, "_read", lambda path: read(path) + 1)
    with pytest.raises(RuntimeError, match="not those of the rows in memory"):
        throughput.measure(50, 1, tmp_path)


def test_mistakes_are_one_line(capsys):
    assert throughput.main(["--rows", "0"]) == 2
    assert "must be >= 1" in capsys.readouterr().err
