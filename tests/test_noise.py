"""Noise of few rows by NumPy has the bits of the definition."""

import pytest
import torch

from nicefast import noise, philox, reference


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("features", [1, 2, 3, 4, 7, 64, 129])
@pytest.mark.parametrize("rows", [0, 1, 5, 200])
def test_bits(rows, features, prior):
    log_scale = torch.randn(features)
    assert noise.serves(log_scale, rows)
    for seed, row_offset in ((0, 0), (2**63 - 1, 2**32 - 3), (12345678901, 2**45), (5, 2**63 - 1)):
        got = noise.sample_prior(log_scale, rows, seed, prior, row_offset)
        want = reference.sample_prior(log_scale, rows, seed, prior, row_offset)
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))
        op = torch.ops.nicefast.sample_prior(
            log_scale, rows, row_offset, seed, prior, torch.float32
        )
        assert torch.equal(op, want)


def test_who_is_served():
    few = philox.FEW_QUADS // 2 - 1
    assert noise.serves(torch.zeros(8), few)
    assert not noise.serves(torch.zeros(8), few + 1)
    assert not noise.serves(torch.zeros(9), few)
    assert not noise.serves(torch.zeros(8).double(), 1)


def test_words_are_the_same_by_numpy_and_pytorch(monkeypatch):
    rows = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 5])
    for quads, word, seed in ((1, 0, 0), (9, 1, 2**63 - 1), (3, 2**32 - 1, 2**32 + 7)):
        arguments = rows, torch.arange(quads) + 2**20, word, seed
        few = philox.philox(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(philox, "FEW_QUADS", 0)
            assert torch.equal(few, philox.philox(*arguments))
