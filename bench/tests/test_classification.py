"""bench.classification: the table says what was measured, and whether the goal is met."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("safetensors", reason="needs safetensors")

from bench import classification


def test_the_table_says_what_was_measured(tmp_path, monkeypatch):
    draw = np.random.RandomState(0)
    y = np.arange(90) % 3
    x = draw.normal(size=(90, 3)) + y[:, None]
    monkeypatch.setattr(classification, "SETS", {"wine": ("Wine", lambda return_X_y: (x, y))})
    monkeypatch.setattr(classification.torch, "set_num_threads", lambda count: None)
    assert classification.main(["--quick", "--seeds", "2", "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "results.ndjson").read_text().splitlines()]
    assert len(records) == 2 * 5
    early, warm, plain, cool = (
        [r for r in records if r["method"] == method] for method in classification.NICE
    )
    assert all(r["temperature"] == 1 for r in (*early, *plain))
    for one, other in zip(early + plain, warm + cool, strict=True):
        assert one["accuracy"] == other["accuracy"]  # a temperature changes no prediction
        assert one["log_loss"] != other["log_loss"]
    text = (tmp_path / "table.md").read_text()
    assert "--seeds 2 --quick" in text
    assert "63 / 27 x 3, 3 classes" in text


def test_the_goal_is_counted():
    def records(data, losses):
        return [
            {
                "data": data, "method": method, "seed": 20, "log_loss": loss, "accuracy": 0.9,
                "sure": 0.5, "temperature": 1.0, "fit_seconds": 1.0, "rows": [2, 1], "columns": 1,
                "classes": 2,
            }
            for method, loss in zip(
                (classification.REFERENCE, *classification.NICE), losses, strict=True
            )
        ]  # fmt: skip

    found = records("wine", (0.1, 1, 1, 1, 0.19)) + records("iris", (0.1, 1, 1, 1, 0.21))
    assert "on 1 of 2 sets: Wine." in classification.table(found)


def test_no_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        classification.main(["--seeds", "0"])
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err
