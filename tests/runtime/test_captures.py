"""CUDA graphs are captured where the rows are, whichever device was current before."""

from unittest import mock

import pytest
import torch

from nicefast.runtime import captures


@pytest.fixture
def cuda(monkeypatch):
    """Stands in for torch.cuda."""
    fake = mock.MagicMock()
    fake.Stream.side_effect = lambda device: mock.MagicMock(device=device)
    monkeypatch.setattr(torch, "cuda", fake)
    captures._stream.cache_clear()
    yield fake
    captures._stream.cache_clear()


def test_each_device_captures_on_one_stream_of_its_own(cuda):
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for device in (first, second, first):
        with captures.on_capture_stream(device):
            warm = cuda.stream.call_args.args[0]
        replay, result = captures.capture(lambda: 7, device)
        assert result == 7
        replay()
        assert cuda.CUDAGraph.return_value.replay.call_count == cuda.graph.call_count
        assert cuda.graph.call_args.kwargs["stream"] is warm
        assert warm.device == device
        assert cuda.device.call_args.args == (device,)
    assert cuda.Stream.call_count == 2


@pytest.mark.gpu
def test_a_replay_computes_again():
    x = torch.zeros(3, device="cuda")
    with captures.on_capture_stream(x.device):
        x + 1
    replay, y = captures.capture(lambda: x + 1, x.device)
    x.fill_(2)
    replay()
    assert y.tolist() == [3, 3, 3]
