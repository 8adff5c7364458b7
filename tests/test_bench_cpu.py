"""The CPU benchmark measures what it says: same function for everybody, a gate that bites."""

import json
import mmap
import sys
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import cpu, elementwise, timing
from bench.gate import Gate, values
from bench.providers import (
    AUTOCAST,
    FLOAT32,
    PROVIDERS,
    Plain,
    Shape,
    logistic_log_prob,
    make_weights,
    modes,
    training_call,
)

SHAPE = Shape(8, (16, 12), 96)
WEIGHTS = make_weights(SHAPE)
X = torch.randn(SHAPE.rows, SHAPE.features, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _restore_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=PROVIDERS)
def provider(request):
    """Every provider that is installed."""
    try:
        return request.param, PROVIDERS[request.param](SHAPE, WEIGHTS)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def gate():
    return Gate(SHAPE, WEIGHTS, X)


def test_every_provider_computes_the_same_in_float64(provider, gate):
    _, model = provider
    got = values(model.double(), X.double(), FLOAT32, training=True)
    torch.testing.assert_close(got.log_prob, gate.exact.log_prob, rtol=1e-10, atol=1e-10)
    assert len(got.gradients) == len(gate.exact.gradients) == 4 * 3 * 2 + 1
    for g, exact in zip(got.gradients, gate.exact.gradients, strict=True):
        torch.testing.assert_close(g, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("training", [False, True], ids=["log_prob", "training"])
def test_every_provider_passes_the_gate(provider, gate, precision, training):
    name, model = provider
    for mode in modes(name, precision):
        assert gate.check(model, precision, mode, training)[1] is None


def test_plain_is_the_definition(gate):
    x = X.double()
    for i, layers in enumerate(WEIGHTS.layers):
        a, b = (x[:, 4:], x[:, :4]) if i % 2 else (x[:, :4], x[:, 4:])
        h = a
        for j, (weight, bias) in enumerate(layers):
            h = (h.relu() if j else h) @ weight.double().T + bias.double()
        x = torch.cat((b + h, a) if i % 2 else (a, b + h), 1)
    z = x * WEIGHTS.log_scale.double().exp()
    density = torch.distributions.TransformedDistribution(
        torch.distributions.Uniform(0.0, 1.0), [torch.distributions.SigmoidTransform().inv]
    )
    want = density.log_prob(z).sum(-1) + WEIGHTS.log_scale.double().sum()
    torch.testing.assert_close(gate.exact.log_prob, want, rtol=1e-8, atol=1e-8)


class Shifted(Plain):
    def latent(self, x):
        h, log_det = super().latent(x)
        return h + 1e-4, log_det


class OneRowNaN(Plain):
    def log_prob(self, x):
        found = super().log_prob(x)
        return torch.where(torch.arange(len(x)) == 5, torch.nan, found)


class WrongGradient(Plain):
    def log_prob(self, x):
        h, _ = self.latent(x)
        return logistic_log_prob(h, self.log_scale) + 1e-2 * (
            self.log_scale - self.log_scale.detach()
        ).sum() * len(self.log_scale)


class LostGradient(Plain):
    def gradients(self):
        return [torch.full_like(g, torch.nan) for g in super().gradients()]


class OneNumber(Plain):
    def log_prob(self, x):
        return super().log_prob(x).sum()


class Raises(Plain):
    def log_prob(self, x):
        raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("wrong", "training", "reason"),
    [
        (Shifted, False, "log_prob is off"),
        (OneRowNaN, False, "log_prob is off by nan"),
        (WrongGradient, True, "gradients is off"),
        (LostGradient, True, "gradients is off by nan"),
        (OneNumber, False, "shape"),
        (Raises, True, "RuntimeError: no such thing"),
    ],
)
def test_the_gate_rejects(monkeypatch, gate, wrong, training, reason):
    monkeypatch.setitem(PROVIDERS, "nflows", wrong)
    direction = "training" if training else "log_prob"
    group = cpu.flow_group(gate, [X], ["plain", "nflows"], "float32", direction, 2, 0.0)
    entry = group["entries"]["nflows"]
    assert entry["status"].startswith("failed")
    assert reason in entry["status"]
    assert "median" not in entry
    assert "median" in group["entries"]["plain"]


def test_bf16_in_float32_clothes_is_rejected(monkeypatch, gate):
    class Careless(Plain):
        def log_prob(self, x):
            with AUTOCAST.products():
                return super().log_prob(x)

    monkeypatch.setitem(PROVIDERS, "zuko", Careless)
    entry, calls = cpu._admit("zuko", gate, "float32", training=False)
    assert not calls
    assert "log_prob is off" in entry["status"]


def test_a_missing_peer_is_reported_and_the_others_go_on(monkeypatch, gate):
    monkeypatch.setitem(sys.modules, "nflows.transforms", None)
    names = ["plain", "nicefast", "nflows"]
    group = cpu.flow_group(gate, [X], names, "bf16", "log_prob", 2, 0.0)
    assert group["entries"]["nflows"]["status"].startswith("not installed: ")
    assert [n for n, e in group["entries"].items() if "median" in e] == ["plain", "nicefast"]
    text = _report(group)
    assert "not installed" in text
    assert "nicefast, times faster" not in text  # no peer to be compared with


@pytest.mark.parametrize("direction", cpu.DIRECTIONS)
def test_a_table(gate, direction):
    group = cpu.flow_group(gate, [X, X + 1], ["plain", "nicefast"], "bf16", direction, 3, 0.0)
    for entry in group["entries"].values():
        assert entry["rounds"] == 3
        assert 0 < entry["low"] <= entry["median"] <= entry["high"]
    assert set(group["entries"]["plain"]["modes"]) == {"autocast", "medium"}
    assert group["entries"]["nicefast"]["mode"] == "medium"
    text = _report(group)
    assert "D=8, hidden 16 x 2, 4 couplings, 96 rows" in text
    json.dumps(group)


def _report(group):
    group = group | {"case": "D8", "title": SHAPE.title, "allocator": "default"}
    cpu.compare(group)
    machine = timing.machine(("numpy", "no-such-package"))
    assert set(machine["packages"]) == {"numpy"}
    return cpu.report({"machine": machine, "allocators": timing.ALLOCATORS, "groups": [group]})


def test_ratios():
    entries = {
        "plain": {"median": 4.0},
        "nicefast": {"median": 1.0},
        "zuko": {"median": 3.0},
        "FrEIA": {"median": 2.0},
        "nflows": {"status": "failed"},
    }
    group = {"rows": 8, "operations": 100.0, "products": {"a": 50.0, "b": 200.0}}
    cpu.compare(group | {"entries": entries})
    mine = entries["nicefast"]
    assert (mine["to_best_peer"], mine["to_plain"]) == (2.0, 4.0)
    assert (mine["rows_per_s"], mine["flops"], mine["share"]) == (8.0, 100.0, 0.5)


@pytest.mark.parametrize("training", [False, True])
def test_operations_are_those_that_torch_counts(training):
    model = Plain(SHAPE, WEIGHTS)
    with FlopCounterMode(display=False) as counter:
        loss = model.log_prob(X).sum()
        if training:
            loss.backward()
    assert counter.get_total_flops() == SHAPE.operations(training)


def test_a_training_step_changes_every_parameter():
    model = Plain(SHAPE, WEIGHTS)
    before = [p.detach().clone() for p in model.parameters()]
    training_call(model, FLOAT32)(X)
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


def test_odd_features_are_refused():
    with pytest.raises(ValueError, match="even"):
        Shape(7, (4,), 10)


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_quantile(q, n):
    data = torch.randn(n, dtype=torch.float64)
    assert timing.quantile(data.tolist(), q) == pytest.approx(torch.quantile(data, q).item())


def test_everybody_goes_in_every_place():
    names = ["a", "b", "c", "d"]
    places = Counter()
    for turn in range(8):
        turned = timing.order(names, turn)
        assert sorted(turned) == names
        places.update(enumerate(turned))
    assert set(places.values()) == {2}


def test_interleaving():
    seen, prepared = [], []

    def call(name):
        return timing.Call(lambda x: seen.append((name, x)), lambda: prepared.append(name))

    calls = {name: call(name) for name in "abc"}
    timings = timing.interleave(calls, [0, 1], rounds=4, warmup=1)
    assert [name for name, _ in seen] == [*"abc", *"abc", *"bca", *"cab", *"cba"]
    assert [x for _, x in seen] == [i % 2 for i in range(15)]
    assert prepared == [name for name, _ in seen]
    assert {t.rounds for t in timings.values()} == {4}
    assert timing.interleave({}, [0]) == {}


def test_page_faults_are_counted():
    def touch(pages):
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = 1

    found = timing.interleave({"touch": timing.Call(touch)}, [2000], rounds=2, warmup=0)
    assert found["touch"].faults >= 3  # one for each page, or each 2 MiB where those are the pages


def test_allocator_states(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("LD_PRELOAD", "other-allocator.so")
    default = timing.allocator_environment("default")
    assert not [k for k in default if k.startswith("MALLOC_") or k == "LD_PRELOAD"]
    assert timing.allocator_environment("no-faults")["MALLOC_MMAP_MAX_"] == "0"


def test_elementwise_ways_agree():
    x = torch.randn(50, 10)
    for operation in (elementwise.coupling(50, 10), elementwise.log_prob(10)):
        exact = operation.ways[operation.exact]
        for name, way in operation.ways.items():
            if name != elementwise.COMPILED:
                assert elementwise.wrong(way, exact, x, operation.other) is None, name
        off = elementwise.wrong(lambda a, b, f=exact: f(a, b) + 1e-3, exact, x, operation.other)
        assert off.startswith("off by")


def test_elementwise_table(monkeypatch):
    monkeypatch.setattr(elementwise, "has_compiler", lambda: False)
    groups = list(cpu.elementwise_groups(64, 10, rounds=2, seconds=0.0))
    text = "\n".join(_report(g | {"operations": 1}) for g in groups)
    assert "skipped: no C++ compiler" in text
    assert groups[0]["entries"]["slice + cat"]["rounds"] == 2


@pytest.mark.parametrize("argument", ["--case=D9", "--provider=plain,nobody", "--precision=fp8"])
def test_unknown_choices_are_refused(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        cpu.main([argument])
    assert "must be some of" in capsys.readouterr().err
