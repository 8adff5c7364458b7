"""nicefast.evaluation: figures by hand, on every scale, with the noise that is stated."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_data, tiny_model, unit

import nicefast as nf
from nicefast import evaluation
from nicefast.baselines import Gaussian
from nicefast.evaluation import evaluate, mean_score, row_scores
from nicefast.preprocessing import Preprocessing
from nicefast.runtime.precision import at_precision
from nicefast.runtime.ranks import Ranks

NONE = Preprocessing(())


class Shifted:
    """A density of U[0, 1)^D, each row's log-density shifted by its mean."""

    def log_prob(self, x):
        assert 0 <= x.min() <= x.max() < 1
        return x.flatten(1).mean(1)


def test_by_hand():
    rows = torch.tensor([[[0, 0]], [[3, 3]], [[1, 2]]], dtype=torch.uint8)
    steps = unit(rows, 4)
    score = evaluate(Shifted(), rows, steps, draws=5, seed=7)
    draws = torch.stack(
        [steps.forward(rows, 7, 3 * d)[0].flatten(1).mean(1).double() for d in range(5)]
    )
    expected = draws.mean(0)
    assert score.log_prob == pytest.approx(expected.mean().item(), abs=1e-7)
    error = math.sqrt(sum((e - expected.mean()) ** 2 for e in expected.tolist()) / 2 / 3)
    assert score.standard_error == pytest.approx(error, abs=1e-7)
    assert score.draw_spread == pytest.approx(draws.mean(1).std().item(), abs=1e-7)
    # x = raw / 4 in two dimensions
    assert score.raw_log_prob == pytest.approx(score.log_prob - 2 * math.log(4), abs=1e-9)
    assert score.bits_per_dim == pytest.approx(2 - score.log_prob / (2 * math.log(2)), abs=1e-9)
    assert (score.rows, score.draws, score.seed) == (3, 5, 7)


def test_a_uniform_density_costs_exactly_log2_k_bits():
    flat_density = SimpleNamespace(log_prob=lambda x: torch.zeros(len(x)))
    rows = torch.randint(256, (10, 7), dtype=torch.uint8)
    score = evaluate(flat_density, rows, unit(rows, 256))
    assert score.bits_per_dim == pytest.approx(8.0, abs=1e-12)
    assert (score.log_prob, score.standard_error, score.draw_spread) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_bits_do_not_depend_on_the_range(low):
    rows = torch.randint(8, (50, 3), dtype=torch.uint8)
    bits = []
    for steps in (["dequantise"], [{"dequantise": {"low": low, "high": 1.0}}]):
        made = Preprocessing.fit(steps, rows, 8)
        gaussian = Gaussian.full(made.forward(rows, 5)[0])
        bits.append(evaluate(gaussian, rows, made, draws=1, seed=5).bits_per_dim)
    assert bits[0] == pytest.approx(bits[1], abs=1e-5)


def test_continuous_rows_are_scored_once_and_have_no_bits():
    data = tiny_data(None)
    gaussian = Gaussian.full(data.train)
    score = evaluate(gaussian, data.test, NONE, draws=9)
    assert score.log_prob == pytest.approx(gaussian.log_prob(data.test).mean().item())
    assert score.raw_log_prob == score.log_prob
    assert (score.draws, score.bits_per_dim, score.draw_spread) == (1, None, 0.0)


def test_rows_are_scored_in_batches_with_the_same_noise(monkeypatch):
    data, model = tiny_data(), tiny_model()
    steps = unit(data.train, 4)
    whole = row_scores(model, data.train, steps, 2, 3)[0]
    monkeypatch.setattr(evaluation, "SCORING_ROWS", 7)
    torch.testing.assert_close(row_scores(model, data.train, steps, 2, 3)[0], whole)
    part = row_scores(model, data.train, steps, 2, 3, slice(11, 31))[0]
    torch.testing.assert_close(part, whole[:, 11:31])


def test_the_ranks_shares_are_the_whole(monkeypatch):
    data, model = tiny_data(), tiny_model()
    steps = unit(data.train, 4)
    parts = []
    monkeypatch.setattr(Ranks, "sum", lambda self, value: parts.append(value.item()) or value)
    whole = mean_score(model, data.train, steps, 2, 3, Ranks())
    parts.clear()
    for rank in range(3):
        mean_score(model, data.train, steps, 2, 3, Ranks(rank, 3))
    assert sum(parts) / (2 * len(data.train)) == pytest.approx(whole, abs=1e-6)


def test_evaluation_is_in_float32_whatever_is_in_force():
    data, model = tiny_data(), nf.NICE(4, hidden=(64,))
    steps = unit(data.train, 4)
    plain = evaluate(model, data.train, steps)
    with at_precision("bf16", torch.device("cpu")):
        assert evaluate(model, data.train, steps) == plain


def test_what_gives_no_figure_is_refused():
    data = tiny_data(None)
    with pytest.raises(ValueError, match=r"two or more, got shape \(1, 4\)"):
        evaluate(tiny_model(), data.test[:1], NONE)
    with pytest.raises(ValueError, match="draws must be an integer >= 1, got 0"):
        evaluate(tiny_model(), tiny_data().test, NONE, draws=0)
    with pytest.raises(TypeError, match=r"rows must be a torch\.Tensor, got list"):
        evaluate(tiny_model(), [[1.0]], NONE)
    with pytest.raises(TypeError, match="preprocessing must be a Preprocessing, got NoneType"):
        evaluate(tiny_model(), data.test, None)
    broken = data.test.clone()
    broken[3] = math.nan
    with pytest.raises(ValueError, match="not finite in 1 rows"):
        evaluate(tiny_model(), broken, NONE)
