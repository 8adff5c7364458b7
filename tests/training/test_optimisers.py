"""What changes the weights, by hand."""

import math

import pytest
import torch
from torch import nn

from nicefast.training.optimisers import RMSProp, average, learning_rate


def test_rmsprop_by_hand():
    w = nn.Parameter(torch.tensor([1.0, 1.0]))
    rms = RMSProp([w], lr=0.1, averaging=0.95, momentum=0.5, stabiliser=1e-2)
    square, velocity, expected = [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]
    for gradient in ([4.0, 1e-3], [-2.0, 1e-3], [1.0, -1e-3]):
        w.grad = torch.tensor(gradient)
        rms.step()
        for i, g in enumerate(gradient):
            square[i] = 0.95 * square[i] + 0.05 * g * g
            velocity[i] = 0.5 * velocity[i] - 0.1 * g / max(math.sqrt(square[i]), 1e-2)
            expected[i] += velocity[i]
        torch.testing.assert_close(w.detach(), torch.tensor(expected))
    idle = nn.Parameter(torch.ones(1))
    RMSProp([idle], lr=0.1).step()  # nothing to do without a gradient
    assert idle.item() == 1.0


def test_learning_rates():
    def rates(schedule, **given):
        options = {"warmup": 0, "decay": 0.5, "least": 0.0} | given
        return [learning_rate(i, 4, 2.0, schedule, **options) for i in range(5)]

    assert rates("constant") == [2.0] * 5
    assert rates("constant", warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates("cosine") == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0])
    assert rates("exponential") == [2.0, 1.0, 0.5, 0.25, 0.125]
    assert rates("exponential", least=0.4) == [2.0, 1.0, 0.5, 0.4, 0.4]


def test_average():
    into, weights = [torch.zeros(2), torch.ones(1)], [torch.ones(2), torch.ones(1)]
    average(into, weights, 0.75)
    assert into[0].tolist() == [0.25, 0.25]
    assert into[1].item() == 1.0
