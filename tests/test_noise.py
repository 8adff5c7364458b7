"""The words of a counter are the same by NumPy, by PyTorch, and in however many pieces."""

import pytest
import torch

from nicefast import philox


@pytest.mark.parametrize("piece", [1, 7, 1 << 13])
@pytest.mark.parametrize("threads", [1, 3])
def test_words(monkeypatch, piece, threads):
    rows = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 5])
    monkeypatch.setattr(philox, "PIECE", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for quads, word, seed in ((1, 0, 0), (9, 1, 2**63 - 1), (3, 2**32 - 1, 2**32 + 7)):
        arguments = rows, torch.arange(quads) + 2**20, word, seed
        by_numpy = philox.philox(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(philox, "is_compiled", lambda: True)
            by_torch = philox.philox(*arguments)
        assert torch.equal(by_numpy, by_torch)


@pytest.mark.parametrize(("rows", "quads"), [(0, 3), (2, 0), (0, 0)])
def test_no_words(rows, quads):
    found = philox.philox(torch.arange(rows), torch.arange(quads), 0, 1)
    assert found.shape == (rows, 4 * quads)
    assert found.dtype == torch.int32
