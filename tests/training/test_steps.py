"""A training step captured as a graph does what the step does: here with a stand-in for CUDA."""

import contextlib

import pytest
import torch
from tiny import flat, tiny_model

from helpers import Operators
from nicefast.runtime.ranks import Ranks
from nicefast.training import steps
from nicefast.training.optimisers import make_optimiser
from nicefast.training.steps import Step


def step_of(model, clip=0.0, name="adamw"):
    return Step(model, make_optimiser(model, name, 1e-2, 0.9, 0.99, 1e-8, 0.0), clip, Ranks())


@pytest.fixture
def capturing(monkeypatch):
    """Steps that believe themselves on a GPU; returns how often a graph was captured."""
    captures = []

    def capture(self, given, rows):
        places = [value.clone() for value in given]
        captures.append(rows)
        return (lambda: self._take(places, rows)), places

    monkeypatch.setattr(Step, "_capture", capture)
    monkeypatch.setattr(steps.captures, "on_capture_stream", lambda _: contextlib.nullcontext())
    return captures


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_replayed_steps_are_the_steps(capturing, name, weighted):
    plain, graphed = tiny_model(), tiny_model()
    eager, replayed = step_of(plain, name=name), step_of(graphed, name=name)
    replayed._captures = True
    for i in range(9):
        x = torch.randn(32 if i != 6 else 7, 4, generator=torch.Generator().manual_seed(i))
        momentum = 0.5 * (i > 7) if name == "rmsprop" else None
        weights = x[:, 0].abs() if weighted else None
        for step in (eager, replayed):
            step(x, 1e-2 / (i + 1), momentum, len(x), len(x) == 32, weights)
    assert torch.equal(flat(plain), flat(graphed))
    assert eager.take_total() == replayed.take_total() != 0
    assert eager.take_total() == 0
    # after the warm-up once; again where a number that a graph has within it changed
    assert capturing == [32]
    assert replayed._warm == (steps.WARM_UP if name == "adamw" else 1)


def test_the_capture_is_asked_for_what_the_warm_up_was(monkeypatch):
    asked = []

    def capture(call, device):
        with Operators() as seen:
            call()
        asked.append(seen.seen)
        return call, None

    @contextlib.contextmanager
    def on_capture_stream(device):
        with Operators() as seen:
            yield
        asked.append(seen.seen)

    monkeypatch.setattr(steps.captures, "capture", capture)
    monkeypatch.setattr(steps.captures, "on_capture_stream", on_capture_stream)
    step = step_of(tiny_model(), clip=1.0)
    step._captures = True
    for i in range(steps.WARM_UP + 1):
        step(torch.randn(8, 4, generator=torch.Generator().manual_seed(i)), 1e-3, None, 8, True)
    *warm, captured = asked
    assert len(warm) == steps.WARM_UP
    assert captured == warm[-1] == warm[-2]
    assert {"mm", "_fused_adamw_"} & set(captured)


def test_every_step_takes_its_turn(capturing):
    """Warm-up, capture, replay, and a step of fewer rows may each be on another stream."""
    step, turns = step_of(tiny_model()), []

    @contextlib.contextmanager
    def turn():
        before = step._taken.item()
        yield
        turns.append(step._taken.item() - before)

    class Turns:
        def __enter__(self):
            self.block = turn()
            self.block.__enter__()

        def __exit__(self, *error):
            self.block.__exit__(*error)

    step._captures, step._turns = True, Turns()
    for i in range(7):
        rows = 8 if i != 5 else 3
        step(torch.randn(rows, 4), 1e-3, None, rows, full=rows == 8)
    assert turns == [1] * 7
    assert step._taken == 7


def test_the_first_step_that_is_not_finite_is_remembered():
    step = step_of(tiny_model())
    x = torch.randn(8, 4)
    step(x, 1e-3, None, 8, full=True)
    assert step.first_bad() is None
    step(torch.full_like(x, torch.nan), 0.0, None, 8, full=True)
    assert step.first_bad() == 1


def test_clipping_bounds_the_norm_of_the_gradient():
    model = tiny_model()
    step = step_of(model, clip=0.5)
    step(100 * torch.randn(8, 4), 1e-3, None, 8, full=True)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)
