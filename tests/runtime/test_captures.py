"""CUDA graphs are captured where the rows are, whichever device was current before, and what uses
the memory of one graph takes turns."""

import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from helpers import Operators, make
from nicefast.deprecated import GraphedFlow
from nicefast.engine import kernel
from nicefast.runtime import captures
from ways import ways

GPU = torch.device("cuda", 0)


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


# Turns: threads and streams that share memory ---------------------------------------------------


class Streams:
    """Stands in for torch.cuda where streams and events matter, and remembers what they are asked.

    Every stream's work happens when it is told, so that an order that nobody has asked for shows.
    """

    def __init__(self):
        self.current, self.asked = "first", []

    def current_stream(self, device):
        return self.current

    def Event(self):
        return SimpleNamespace(
            wait=lambda stream: self.asked.append(("wait", stream)),
            record=lambda stream: self.asked.append(("record", stream)),
        )


@pytest.fixture
def streams(monkeypatch):
    found = Streams()
    monkeypatch.setattr(torch, "cuda", found)
    return found


def test_a_stream_waits_for_the_last_block_of_another_and_for_no_other(streams):
    turns = captures.Turns(GPU)
    for streams.current in ("a", "a", "b", "a"):
        with turns:
            streams.asked.append(("work", streams.current))
    a, b = (
        [("wait", s), ("work", s), ("record", s)] for s in ("a", "b")
    )  # of a block on a stream that is not the last one's
    assert streams.asked == [*a, *a[1:], *b, *a]


def test_a_block_that_fails_is_waited_for_like_any_other(streams):
    turns = captures.Turns(GPU)
    with pytest.raises(ZeroDivisionError), turns:
        _ = 1 // 0
    streams.current = "second"
    with turns:
        pass
    assert streams.asked == [
        ("wait", "first"), ("record", "first"), ("wait", "second"), ("record", "second"),
    ]  # fmt: skip


@pytest.mark.parametrize("when", ["wait", "record"])
def test_an_error_of_a_stream_leaves_no_lock(streams, when):
    def fail(stream):
        raise RuntimeError("gone")

    turns = captures.Turns(GPU)
    setattr(turns._done, when, fail)
    for _ in range(2):  # the second would wait for good
        with pytest.raises(RuntimeError, match="gone"), turns:
            pass


def test_threads_take_turns():
    turns, inside, seen = captures.Turns(torch.device("cpu")), [], []
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(50):
            with turns:
                inside.append(1)
                seen.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == [1] * 200


def test_streams_that_alternate_share_one_graph(streams, monkeypatch):
    captured, used = [], []

    def capture(call, device):
        captured.append(device)
        outputs = call()

        def replay():
            streams.asked.append(("work", streams.current))
            for out, new in zip(outputs, call(), strict=True):
                out.copy_(new)

        return replay, outputs

    monkeypatch.setattr(captures, "warm_capture", capture)
    monkeypatch.setattr(captures, "has_graphs", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: used.append((t.shape, s)))
    x = torch.arange(15.0).view(5, 3)
    graph = captures.Graph(lambda x, c: (x + 1, x.sum(1)), 2, x, None)
    for streams.current in ("a", "b", "a", "a"):
        y, total = graph(x, None)
        assert torch.equal(y, x + 1)
        assert torch.equal(total, x.sum(1))
    assert len(captured) == 1
    assert used == [((2, 3), s) for s in ("a", "b", "a")]
    work = [("work", "a")] * 3  # of five rows, two at a time
    a = [("wait", "a"), *work, ("record", "a")]
    b = [(what, "b") for what, _ in a]
    assert streams.asked == [*a, *b, *a, *a[1:]]


# what is captured is what was warmed up ---------------------------------------------------------


@pytest.fixture
def operators(monkeypatch):
    """What PyTorch is asked to do in each warm-up call and in the capture, in order."""
    found, capturing = [], [False]

    def record(call, device):
        for _ in range(captures.WARM_UP):
            with Operators() as seen:
                call()
            found.append(seen.seen)
        capturing[0] = True
        try:
            with Operators() as seen:
                outputs = tuple(t.clone() for t in call())
        finally:
            capturing[0] = False
        found.append(seen.seen[: len(seen.seen) - len(outputs)])  # but the copies made here

        def replay():
            for out, new in zip(outputs, call(), strict=True):
                out.copy_(new)

        return replay, outputs

    monkeypatch.setattr(captures, "warm_capture", record)
    monkeypatch.setattr("nicefast.engine.frozen.has_graphs", lambda device: True)
    for module in (captures, kernel):
        monkeypatch.setattr(module, "is_capturing", lambda device: capturing[0])
    for module in ("nicefast.runtime.captures", "nicefast.engine.frozen"):
        monkeypatch.setattr(f"{module}.can_capture", lambda device: True)
    return found


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("kind", ["frozen", "graphed"])
@ways("rows", "blocks", "kernel", "gemm")
def test_the_capture_is_asked_for_what_the_warm_up_was(operators, way, activation, kind):
    model = make(6, activation=activation)
    x = torch.randn(9, 6)
    with torch.no_grad():
        if kind == "frozen":
            flow = model.frozen(batch=4)
            calls = [flow.log_prob, flow.forward, flow.inverse]
        else:
            flow = way.of(model)
            calls = [GraphedFlow(flow, 4, m) for m in ("log_prob", "forward", "inverse")]
        for call in calls:
            operators.clear()
            call(x)
            *warm, captured = operators
            assert len(warm) == captures.WARM_UP
            assert captured == warm[-1] == warm[-2]
            assert captured
