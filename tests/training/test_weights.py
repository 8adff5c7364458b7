"""nicefast.training with weights of rows: what is maximised, validated, recorded and refused."""

from dataclasses import replace

import pytest
import torch
from tiny import fit_tiny, flat, tiny_data, tiny_model

from nicefast.evaluation import evaluate, mean_score
from nicefast.preprocessing import Preprocessing
from nicefast.runtime.ranks import Ranks
from nicefast.training import Recipe, init_scaling

FULL = Recipe(epochs=6, lr=1e-2, batch_size=1000, averaging=0.0, weight_decay=0.0)  # no minibatches


def weighted(data, train, validation):
    return replace(data, weights=(train, validation))


def test_weights_do_what_repeated_rows_do():
    data = tiny_data(None)
    counts = torch.arange(100) % 3  # 0, 1 or 2 of each
    held = torch.arange(20) % 2 + 1
    repeated = replace(
        data,
        train=data.train.repeat_interleave(counts, 0),
        validation=data.validation.repeat_interleave(held, 0),
    )
    own = weighted(data, counts / counts.double().mean(), held.double())
    found = []
    for case in (repeated, own):
        model = tiny_model()
        found.append((model, fit_tiny(model, case, FULL)))
    (model, history), (other, same) = found
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-3, atol=1e-4)
    for one, two in zip(history.epochs, same.epochs, strict=True):
        assert two.train == pytest.approx(one.train, rel=1e-4)
        assert two.validation == pytest.approx(one.validation, rel=1e-4)


def test_weights_decide_what_is_fitted_and_which_epoch():
    data = tiny_data(None)
    shifted = torch.cat([data.train, data.train + 5.0])
    of = lambda w: torch.cat([torch.full((100,), w), torch.full((100,), 2 - w)])  # noqa: E731
    means = []
    for w in (1.9, 0.1):
        model = tiny_model()
        init_scaling(model, shifted)
        case = weighted(replace(data, train=shifted), of(w), torch.ones(20))
        fit_tiny(model, case, replace(FULL, epochs=40, lr=5e-2))
        means.append(evaluate(model, data.train, Preprocessing(())).log_prob)
    assert means[0] > means[1] + 0.5


def test_the_validation_score_is_the_weighted_mean():
    data, model = tiny_data(None), tiny_model()
    weights = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = Preprocessing(())
    scores = model.log_prob(data.validation).detach().double()
    found = mean_score(model, data.validation, steps, 1, 0, Ranks(), weights)
    assert found == pytest.approx(((scores * weights).sum() / weights.sum()).item(), rel=1e-6)


def test_a_beginning_takes_the_weights_into_account():
    x = torch.tensor([[0.0, 1.0, 0.0, 3.0], [2.0, 0.0, 1.0, 1.0], [1.0, 4.0, 5.0, 2.0]])
    one, two = tiny_model(), tiny_model()
    init_scaling(one, x.repeat_interleave(torch.tensor([1000, 2000, 3000]), 0))
    init_scaling(two, x, weights=torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(one.scaling.log_scale, two.scaling.log_scale, rtol=1e-3, atol=0.3)
    init_scaling(one, x)
    init_scaling(two, x, weights=torch.full((3,), 7.0))
    torch.testing.assert_close(one.scaling.log_scale, two.scaling.log_scale)


@pytest.mark.parametrize(
    ("train", "validation", "says"),
    [
        (torch.ones(99), torch.ones(20), r"one a row, \(100,\), got \(99,\)"),
        (torch.ones(100), torch.zeros(20), "none negative and some positive"),
        (-torch.ones(100), torch.ones(20), "none negative and some positive"),
        (torch.full((100,), float("nan")), torch.ones(20), "must be finite"),
    ],
)
def test_wrong_weights_are_refused(train, validation, says):
    with pytest.raises(ValueError, match=says):
        fit_tiny(tiny_model(), weighted(tiny_data(None), train, validation))


def test_a_snapshot_knows_its_weights(tmp_path):
    data = tiny_data(None)
    case = weighted(data, torch.ones(100), torch.ones(20))
    fit_tiny(tiny_model(), case, snapshot=tmp_path / "fit")
    for other in (data, weighted(data, 2 * torch.ones(100), torch.ones(20))):
        with pytest.raises(ValueError, match="is of another fit"):
            fit_tiny(tiny_model(), other, snapshot=tmp_path / "fit", resume=True)
