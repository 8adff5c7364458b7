"""nicefast.training: the best epoch is kept, seeds decide everything, figures by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

import nicefast as nf
from nicefast import training
from nicefast.baselines import Gaussian
from nicefast.data import Dataset, dequantise
from nicefast.training import Evaluation, evaluate, fit, init_scaling


def tiny_data(levels: int | None = 4) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(150, 4, generator=generator)
    z[:, 1] += z[:, 0].square()
    rows = z if levels is None else (z + 1.5).clamp(0, levels - 1).to(torch.uint8)
    return Dataset("tiny", levels, rows[:100], rows[100:120], rows[120:])


def tiny_model(seed: int = 0) -> nf.NICE:
    torch.manual_seed(seed)
    return nf.NICE(4, hidden=(8,), couplings=2)


def flat(model: nf.NICE) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_init_scaling_gives_each_latent_feature_the_priors_spread(prior):
    model = nf.NICE(3, hidden=(4,), prior=prior)
    x = torch.randn(500, 3) * torch.tensor([0.01, 1.0, 300.0]) + 5
    init_scaling(model, x)
    spread = (x * model.scaling.log_scale.exp()).std(0)
    torch.testing.assert_close(spread, model.prior.stddev.expand(3), rtol=1e-4, atol=0)
    assert model.scaling.log_scale.requires_grad


def test_init_scaling_names_a_constant_feature():
    with pytest.raises(ValueError, match="1 of its 4 features do not, the first of them feature 2"):
        init_scaling(tiny_model(), torch.randn(20, 4) * torch.tensor([1, 1, 0, 1]))


class Uniform:
    """Density of U[0, 1)^D with the log-density of each row shifted by its mean."""

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        assert 0 <= x.min() <= x.max() < 1
        return x.flatten(1).mean(1)


def test_evaluate_by_hand():
    rows = torch.tensor([[[0, 0]], [[3, 3]], [[1, 2]]], dtype=torch.uint8)
    score = evaluate(Uniform(), rows, levels=4, draws=5, seed=7)
    generator = torch.Generator().manual_seed(7)
    draws = [dequantise(rows, 4, generator).flatten(1).mean(1).double() for _ in range(5)]
    expected = torch.stack(draws).mean(0)
    assert score.log_prob == pytest.approx(expected.mean().item(), abs=1e-7)
    error = math.sqrt(sum((e - expected.mean()) ** 2 for e in expected.tolist()) / 2 / 3)
    assert score.standard_error == pytest.approx(error, abs=1e-7)
    assert score.bits_per_dim == pytest.approx(2 - score.log_prob / (2 * math.log(2)), abs=1e-12)
    assert (score.rows, score.draws, score.seed) == (3, 5, 7)


def test_uniform_density_costs_exactly_log2_k_bits():
    flat_density = SimpleNamespace(log_prob=lambda x: torch.zeros(len(x)))
    rows = torch.randint(256, (10, 7), dtype=torch.uint8)
    assert evaluate(flat_density, rows, 256) == Evaluation(0.0, 0.0, 8.0, 10, 16, 0)


def test_evaluate_continuous_rows_once_and_without_bits():
    data = tiny_data(None)
    gaussian = Gaussian.full(data.train)
    score = evaluate(gaussian, data.test, None, draws=9)
    assert score.log_prob == pytest.approx(gaussian.log_prob(data.test).mean().item())
    assert (score.draws, score.bits_per_dim) == (1, None)


def test_evaluate_scores_in_batches(monkeypatch):
    data, model = tiny_data(), tiny_model()
    whole = evaluate(model, data.train, 4)
    monkeypatch.setattr(training, "SCORING_BATCH", 7)
    assert evaluate(model, data.train, 4).log_prob == pytest.approx(whole.log_prob, abs=1e-5)


def test_evaluate_refuses_what_gives_no_figure():
    data = tiny_data(None)
    with pytest.raises(ValueError, match="two or more, got 1"):
        evaluate(tiny_model(), data.test[:1], None)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        evaluate(tiny_model(), tiny_data().test, 4, draws=0)
    broken = data.test.clone()
    broken[3] = math.nan
    with pytest.raises(ValueError, match="not finite in 1 rows"):
        evaluate(tiny_model(), broken, None)


@pytest.mark.parametrize("levels", [4, None])
def test_fit_improves_and_reports_every_epoch(levels):
    data, model, seen = tiny_data(levels), tiny_model(), []
    init_scaling(model, data.train.float())
    history = fit(model, data, epochs=12, lr=1e-2, batch_size=32, progress=seen.append)
    assert tuple(seen) == history.epochs
    assert [epoch.epoch for epoch in seen] == list(range(1, 13))
    assert seen[-1].validation > seen[0].validation
    assert seen[-1].train > seen[0].train
    assert not model.training


def test_the_model_ends_with_the_best_epochs_weights():
    data, model = tiny_data(), tiny_model()
    history = fit(model, data, epochs=60, patience=5, lr=0.1, averaging=0.0, weight_decay=0.0)
    assert history.stopped_early
    assert history.best == max(history.epochs, key=lambda epoch: epoch.validation)
    assert len(history.epochs) == history.best.epoch + 5
    again = evaluate(model, data.validation, 4, draws=4, seed=0)
    assert again.log_prob == history.best.validation
    assert again.log_prob != history.epochs[-1].validation


def test_one_seed_decides_everything():
    data, results = tiny_data(), []
    for seed in (3, 3, 4):
        model = tiny_model()
        torch.manual_seed(len(results))  # the global seed must not matter once a model is made
        history = fit(model, data, epochs=3, seed=seed)
        results.append((flat(model), [epoch[:3] for epoch in history.epochs]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert not torch.equal(results[0][0], results[2][0])


def test_noise_is_fresh_each_epoch_and_test_rows_are_not_touched(monkeypatch):
    seen = []

    def spy(levels, k, generator):
        seen.append((levels.data_ptr(), dequantise(levels, k, generator)))
        return seen[-1][1]

    monkeypatch.setattr(training, "dequantise", spy)
    data = tiny_data()
    fit(tiny_model(), data, epochs=2, validation_draws=1)
    (train, first), (held, fixed), (train2, second), (held2, fixed2) = seen
    assert train == train2 == data.train.data_ptr()
    assert held == held2 == data.validation.data_ptr()
    assert not torch.equal(first, second)
    assert torch.equal(fixed, fixed2)


def test_averaging_is_a_moving_average_of_the_weights():
    """Without decay of the memory's start, one step's average is (0.1 w0 + 0.9 w1)."""
    data = tiny_data()
    stepped, averaged = tiny_model(), tiny_model()
    before = flat(stepped)
    for model, averaging in ((stepped, 0.0), (averaged, 0.995)):
        fit(model, data, epochs=1, batch_size=100, averaging=averaging)
    torch.testing.assert_close(flat(averaged), before.lerp(flat(stepped), 0.9))


def test_float64_models_are_trained_in_float64():
    model = tiny_model().double()
    fit(model, tiny_data(), epochs=1)
    assert flat(model).dtype == torch.float64


def test_a_diverging_fit_names_its_epoch():
    with pytest.raises(FloatingPointError, match=r"in epoch \d+: try a smaller lr than 1e\+30"):
        fit(tiny_model(), tiny_data(None), epochs=5, lr=1e30)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("patience", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("weight_decay", -1.0),
        ("averaging", 1.0),
        ("validation_draws", 0),
    ],
)
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        fit(tiny_model(), tiny_data(), **{name: value})
