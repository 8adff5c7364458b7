"""Copies to and from a GPU: here with stand-ins for its streams, events and tensors."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from nicefast.scoring import staging
from nicefast.scoring.outputs import Batch


class Log:
    """Stands in for torch.cuda, and remembers what each stream is asked, in order."""

    def __init__(self):
        self.asked, self.made, self.now = [], 0, "current"

    def Stream(self, device):
        self.made += 1
        name = f"stream {self.made}"
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.asked.append((name, "waits for", self._name(other))),
            wait_event=lambda event: self.asked.append((name, "waits for", event)),
        )

    def current_stream(self, device):
        return SimpleNamespace(name="current", wait_stream=lambda s: None)

    def Event(self):
        return SimpleNamespace(
            record=lambda stream: self.asked.append((self._name(stream), "is done"))
        )

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before

    def _name(self, stream):
        return stream.name


class OnDevice:
    """A result on the GPU."""

    device, dtype = torch.device("cuda", 0), torch.float32

    def __init__(self, value, log):
        self.value, self.shape, self.log = value, value.shape, log

    def record_stream(self, stream):
        self.log.asked.append((stream.name, "holds", tuple(self.shape)))


class OnHost:
    """Memory on the host."""

    def __init__(self, shape, log):
        self.shape, self.log = shape, log

    def record_stream(self, stream):
        pass

    def copy_(self, source, non_blocking=False):
        assert non_blocking
        self.log.asked.append((self.log.now, "copies", tuple(source.shape)))
        self.value = source.value
        return self


@pytest.fixture
def lane(monkeypatch):
    """One that overlaps, and what its streams are asked after it was made."""
    log = Log()
    monkeypatch.setattr(torch, "cuda", log)

    def empty(shape, dtype, device, pin_memory=False):
        assert pin_memory == (str(device) == "cpu")
        return OnHost(shape, log)

    monkeypatch.setattr(staging.torch, "empty", empty)
    found = staging.Lane(torch.device("cuda", 0), 4, 2, torch.float32)
    log.asked.clear()
    return found, log


def test_results_come_back_by_a_stream_of_their_own(lane):
    lane, log = lane
    value, good = torch.arange(3.0), torch.ones(3, 1, dtype=torch.bool)
    batch = Batch({"log_prob": OnDevice(value, log)}, OnDevice(good, log))
    found, together, done = lane.download(batch, 7)
    back = lane._back.name
    assert back != lane._stream.name
    assert log.asked == [
        (back, "waits for", "current"),
        (back, "holds", (3,)), (back, "copies", (3,)),
        (back, "holds", (3, 1)), (back, "copies", (3, 1)),
        (back, "is done"),
    ]  # fmt: skip
    assert found.values["log_prob"].value is value
    assert found.good.value is good
    assert together == 7
    assert done is not None
    assert log.now == "current"


def test_results_that_are_on_the_host_are_not_copied(lane):
    lane, log = lane
    value = torch.arange(3.0)
    found, *_ = lane.download(Batch({"log_prob": value}, value > 0), 3)
    assert found.values["log_prob"] is value
    assert not any("copies" in entry for entry in log.asked)


def test_on_the_cpu_nothing_overlaps():
    lane = staging.Lane(torch.device("cpu"), 4, 2, torch.float32)
    value = torch.arange(3.0)
    found, together, done = lane.download(Batch({"log_prob": value}, value > 0), 3)
    assert torch.equal(found.values["log_prob"], value)
    assert (together, done) == (3, None)
