"""The benchmark measures what it says: same function for everybody, a gate that bites."""

import json
import mmap
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as command
from bench import elementwise, measure, records, timing, workloads
from bench.gate import Gate, values
from bench.providers import (
    AUTOCAST,
    FLOAT32,
    FROZEN,
    PRECISIONS,
    PROVIDERS,
    Plain,
    Shape,
    inference_call,
    logistic_log_prob,
    make_weights,
    training_call,
)

SHAPE = Shape(8, (16, 12), 96)
WEIGHTS = make_weights(SHAPE)
CPU = torch.device("cpu")
X = torch.randn(SHAPE.rows, SHAPE.features, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _restore_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    """Large products in bfloat16 take seconds where there are no instructions for them."""
    real = timing.product_calls

    def small(dtype, size, *args, **options):
        return real(dtype, min(size, 256), *args, **options)

    monkeypatch.setattr(timing, "product_calls", small)


@pytest.fixture(params=[p for p in PROVIDERS if "compile" not in p])
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
    direction = "training" if model.trains else "log_prob"
    got, want = values(model.double(), X.double(), FLOAT32, direction), gate.exact(direction)
    torch.testing.assert_close(got.value, want.value, rtol=1e-10, atol=1e-10)
    assert len(got.gradients) == len(want.gradients) == (4 * 3 * 2 + 1) * model.trains
    for g, exact in zip(got.gradients, want.gradients, strict=True):
        torch.testing.assert_close(g, exact, rtol=1e-9, atol=1e-12)
    back = values(model, gate.z.double(), FLOAT32, "inverse")
    torch.testing.assert_close(back.value, X.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("direction", workloads.DIRECTIONS)
def test_every_provider_passes_the_gate(provider, gate, precision, direction):
    _, model = provider
    if direction == "training" and not model.trains:
        pytest.skip("computes without gradients alone")
    for mode in PRECISIONS[precision]:
        assert gate.check(model, precision, mode, direction)[1] is None


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
    torch.testing.assert_close(gate.exact("log_prob").value, want, rtol=1e-8, atol=1e-8)


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


class TooWide(Plain):
    def sample(self, rows):
        return 1.2 * super().sample(rows)


class OtherInverse(Plain):
    def data(self, h):
        return super().data(h) + 1e-4


def table(gate, providers, direction="log_prob", precision="float32", rounds=2, inputs=None):
    task = workloads.Task("case", SHAPE, direction, precision, tuple(providers))
    found = measure.flow_records(task, gate, inputs or [gate.given(direction)], rounds, 0.0)
    json.dumps(found)
    return {r["provider"]: r for r in found}


@pytest.mark.parametrize(
    ("wrong", "direction", "reason"),
    [
        (Shifted, "log_prob", "log_prob is off"),
        (OneRowNaN, "log_prob", "log_prob is off by nan"),
        (WrongGradient, "training", "gradients is off"),
        (LostGradient, "training", "gradients is off by nan"),
        (OneNumber, "log_prob", "shape"),
        (Raises, "training", "RuntimeError: no such thing"),
        (TooWide, "sample", "sample is off"),
        (OtherInverse, "inverse", "inverse is off"),
    ],
)
def test_the_gate_rejects(monkeypatch, wrong, direction, reason):
    shape = replace(SHAPE, rows=2000)  # of a few draws little can be said
    gate = Gate(shape, WEIGHTS, torch.randn(shape.rows, shape.features))
    monkeypatch.setitem(PROVIDERS, "nflows", wrong)
    found = table(gate, ["plain", "nflows"], direction)
    assert found["nflows"]["status"].startswith("failed")
    assert reason in found["nflows"]["status"]
    assert "median" not in found["nflows"]
    assert "median" in found["plain"]


def test_bf16_in_float32_clothes_is_rejected(monkeypatch, gate):
    class Careless(Plain):
        def log_prob(self, x):
            with AUTOCAST.products():
                return super().log_prob(x)

    monkeypatch.setitem(PROVIDERS, "zuko", Careless)
    record, calls = measure.admit("zuko", gate, "float32", "log_prob")
    assert not calls
    assert "log_prob is off" in record["status"]


def test_a_missing_peer_is_reported_and_the_others_go_on(monkeypatch, gate):
    monkeypatch.setitem(sys.modules, "nflows.transforms", None)
    found = table(gate, ["plain", "nicefast", "nflows"], precision="bf16")
    assert found["nflows"]["status"].startswith("not installed: ")
    assert [n for n, r in found.items() if "median" in r] == ["plain", "nicefast"]


@pytest.mark.parametrize("direction", workloads.DIRECTIONS)
def test_a_table(gate, direction):
    found = table(gate, ["plain", "nicefast"], direction, "bf16", 3)
    for record in found.values():
        assert record["rounds"] == len(record["samples"]) == 3
        assert 0 < record["low"] <= record["median"] <= record["high"]
        assert record["launches"] > 0
        assert record["peak_bytes"] is None or record["peak_bytes"] >= 0
        assert record["rows_per_s"] == SHAPE.rows / record["median"]
        assert record["operations"] == SHAPE.operations(direction == "training")
        least = max(
            record["operations"] / record["ceilings"]["flops"],
            record["bytes"] / record["ceilings"]["bytes"],
        )
        assert record["share"] == pytest.approx(least / record["median"])
    mine, plain = found["nicefast"], found["plain"]
    assert {mine["mode"], plain["mode"]} <= {"autocast", "medium"}
    assert mine["best_other"] == "plain"
    assert mine["to_best_other"] == plain["median"] / mine["median"]
    assert plain["to_best_other"] == mine["median"] / plain["median"]


def test_a_frozen_flow_is_no_competitor_of_an_ordinary_call(gate):
    found = table(gate, ["plain", "nicefast", FROZEN])
    assert all("median" in r for r in found.values())
    assert found["nicefast"]["best_other"] == found[FROZEN]["best_other"] == "plain"
    ours = min(found["nicefast"]["median"], found[FROZEN]["median"])
    assert found["plain"]["to_best_other"] == ours / found["plain"]["median"]
    refused = table(gate, ["plain", FROZEN], "training")[FROZEN]
    assert refused["status"] == "skipped: it computes without gradients alone"


def test_a_frozen_flow_has_the_precision_it_is_timed_in(gate):
    model = PROVIDERS[FROZEN](SHAPE, WEIGHTS)
    rough, fine = (inference_call(model, mode, "log_prob")(X) for mode in (AUTOCAST, FLOAT32))
    torch.testing.assert_close(fine.double(), gate.exact("log_prob").value, rtol=1e-5, atol=1e-5)
    assert (rough - fine).abs().max() > 1e-4


def test_frozen_flows_take_part_in_small_batches_without_gradients():
    for level in command.LEVELS:
        for task in workloads.tasks(level, "cpu"):
            small = task.shape.rows < 256 and task.direction != "training"
            assert (FROZEN in task.providers) == (small and task.case in workloads.FLOWS)


def test_peak_memory_is_that_of_one_call():
    size = 64 << 20
    call = timing.Call(lambda _: torch.ones(size // 4).sum())
    found = measure.peak_bytes(call, None, CPU)
    if found is None:
        pytest.skip("the kernel does not let its count be set back")
    assert 0.9 * size < found < 1.5 * size
    assert measure.peak_bytes(timing.Call(lambda _: None), None, CPU) < size / 8


def test_operators_are_counted():
    x = torch.ones(3, 4)
    both = timing.Call(lambda x: x.t().unsqueeze(0).add(1).mul_(2))
    assert measure.launches(both, x, "plain", CPU) == 2
    assert measure.launches(timing.Call(lambda x: x), x, "compile", CPU) is None


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
    timings = timing.interleave(calls, [0, 1], CPU, rounds=4, warmup=1)
    assert [name for name, _ in seen] == [*"abc", *"abc", *"bca", *"cab", *"cba"]
    assert [x for _, x in seen] == [i % 2 for i in range(15)]
    assert prepared == [name for name, _ in seen]
    assert {t.rounds for t in timings.values()} == {4}
    assert timing.interleave({}, [0], CPU) == {}


def test_each_call_is_repeated_as_often_as_it_needs():
    seen = Counter()

    def call(name, seconds):
        return timing.Call(lambda x: (seen.update([name]), time.sleep(seconds)))

    calls = {"short": call("short", 0.001), "long": call("long", 0.06)}
    # far more than a busy machine sleeps too long
    timings = timing.interleave(calls, [0], CPU, rounds=3, warmup=1, least=0.05)
    assert seen["short"] > seen["long"] == 1 + 3
    assert timings["short"].median >= 0.001
    assert timings["long"].median >= 0.06


def test_page_faults_are_counted():
    def touch(pages):
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = 1

    found = timing.interleave({"touch": timing.Call(touch)}, [2000], CPU, rounds=2, warmup=0)
    assert found["touch"].faults >= 3  # one for each page, or each 2 MiB where those are the pages


def test_allocator_states(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("LD_PRELOAD", "other-allocator.so")
    default = timing.allocator_environment("default")
    assert not [k for k in default if k.startswith("MALLOC_") or k == "LD_PRELOAD"]
    assert timing.allocator_environment("no-faults")["MALLOC_MMAP_MAX_"] == "0"


def test_elementwise_ways_agree():
    for operation in elementwise.operations(50, 10, CPU):
        for name in operation.ways:
            if name != elementwise.COMPILED:
                assert operation.check(name)[1] is None, (operation.case, name)
        if operation.case == "sampling":
            continue  # of 500 draws little can be said
        wrong = replace(
            operation, ways={"wrong": lambda g, o=operation: o.exact(g) + 1e-3}, yardsticks={}
        )
        assert "off by" in wrong.check("wrong")[1]


def test_elementwise_records(monkeypatch):
    monkeypatch.setattr(elementwise, "has_compiler", lambda device: False)
    found = list(measure.elementwise_records(64, 10, CPU, rounds=2, seconds=0.0))
    names = {(r[0]["case"], r[0]["direction"]) for r in found}
    assert len(names) == len(found) == 7
    everything = {(r["case"], r["direction"], r["provider"]): r for rs in found for r in rs}
    compiled = everything["scaling", "forward", elementwise.COMPILED]
    assert compiled["status"] == "skipped: no C++ compiler"
    mine = everything["coupling", "in place", "nicefast"]
    assert mine["best_other"] == "x[:, d:].add_(shift)"  # not what computes less
    assert mine["rounds"] == 2


def test_tasks_of_the_levels():
    everything = {level: list(workloads.tasks(level, "cpu")) for level in command.LEVELS}
    assert 0 < len(everything["quick"]) < len(everything["default"]) < len(everything["full"])
    for level, found in everything.items():
        assert len(set(found)) == len(found), level
        assert all(t.providers for t in found)
    assert {t.case for t in everything["default"]} == set(workloads.CASES) - {"elementwise"}
    assert not [t for t in everything["quick"] if t.precision != "float32"]
    few = list(workloads.tasks("default", "cpu", ["MNIST"], ["sample"], ["bf16"], ["plain"]))
    assert {(t.case, t.direction, t.precision, t.providers) for t in few} == {
        ("MNIST", "sample", "bf16", ("plain",))
    }


def test_each_state_of_the_allocator_has_its_ratio(monkeypatch, tmp_path):
    """By default, whole flows are timed in both states and all else in one."""
    assert command._states(None, "default", "cpu") == ["no-faults", "default"]
    assert command._states(None, "full", "cpu") == ["no-faults", "default"]
    assert command._states(None, "quick", "cpu") == ["no-faults"]
    assert command._states("default", "full", "cpu") == ["default"]
    assert command._states(None, "full", "cuda") == ["default"]
    timed = []

    def seen(task, *_):
        timed.append(task)
        return []

    monkeypatch.setattr(measure, "flow_records", seen)
    monkeypatch.setattr(command, "_prepare", lambda task, device: (None, []))
    for state in ("no-faults", "default"):
        timed.clear()
        command.main(
            ["--child", state, "--device=cpu", "--case=small-batch,growth-hidden",
             f"--out={tmp_path / 'none'}"]
        )  # fmt: skip
        again = {(t.case, t.direction, t.precision) for t in timed}
        if state == "default":
            assert again == {
                ("small-batch", direction, "float32") for direction in ("log_prob", "training")
            }
        assert len(again) > 1


def test_a_case_too_large_for_memory_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1 << 20)
    out = tmp_path / "found.jsonl"
    code = command.main(
        ["run", "--quick", "--case=MNIST", "--direction=log_prob", "--provider=plain,nicefast",
         "--device=cpu", "--child=no-faults", f"--out={out}"]
    )  # fmt: skip
    assert code == 0
    found = records.read([out])
    assert {r["provider"] for r in found} == {"plain", "nicefast"}
    assert all(r["status"].startswith("skipped: needs about") for r in found)


def test_the_command(tmp_path, capfd):
    out = tmp_path / "run.jsonl"
    code = command.main(
        ["--quick", "--device=cpu", "--case=small-batch", "--direction=log_prob",
         "--provider=plain,nicefast", "--rounds=2", "--seconds=0", f"--out={out}"]
    )  # fmt: skip
    assert code == 0
    found = records.read([out])
    assert [r["provider"] for r in found] == ["plain", "nicefast"]
    assert {r["allocator"] for r in found} == {"no-faults"}
    assert not list(tmp_path.glob("*.part"))
    said = capfd.readouterr()
    assert "small-batch" in said.out
    assert "1/1 small-batch" in said.err
    assert command.main(["compare", str(out), str(out)]) == 0


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch, tmp_path):
    def interrupted(module, arguments, state):
        part = arguments[arguments.index("--out", arguments.index("--child")) + 1]
        record = {"case": "coupling", "direction": "forward", "provider": "plain"}
        record |= {"status": "failed: oh", "device": "some", "precision": "float32"}
        records.append(part, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "rerun", interrupted)
    out = tmp_path / "run.jsonl"
    assert command.main(["--quick", "--device=cpu", f"--out={out}"]) == 130
    assert [r["status"] for r in records.read([out])] == ["failed: oh"]
    assert (tmp_path / "report.md").exists()
    monkeypatch.setattr(timing, "rerun", lambda *_: 1)
    assert command.main(["--quick", "--device=cpu", f"--out={tmp_path / 'none.jsonl'}"]) == 1
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("argument", ["--case=D9", "--provider=nobody", "--dtype=fp8"])
def test_unknown_choices_are_refused_in_one_line(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([argument])
    said = capsys.readouterr().err
    assert "must be some of" in said
    assert said.count("\n") == 1


def test_known_choices_go_on_beside_unknown_ones(monkeypatch, tmp_path, capsys):
    started = []
    monkeypatch.setattr(timing, "rerun", lambda *given: started.append(given) or 0)
    out = tmp_path / "none.jsonl"
    command.main(
        ["--quick", "--device=cpu", "--case=MNIST,D9", "--provider=plain,nobody", f"--out={out}"]
    )
    assert len(started) == 1
    said = capsys.readouterr().err
    assert "--case must be some of" in said
    assert "got D9: left out" in said
    assert "got nobody: left out" in said


def test_an_option_that_is_given_again_adds_to_what_it_had():
    asked = "--direction training --direction log_prob --case tabular --case=MNIST,CIFAR"
    asked += " --dtype=bf16,float32 --dtype float32"
    options = command._parse(asked.split(), skipped := [])
    assert options.direction == ["log_prob", "training"]
    assert options.case == ["tabular", "MNIST", "CIFAR"]
    assert options.dtype == ["float32", "bf16"]
    assert options.provider == list(command.PROVIDERS)
    assert command._parse([], skipped).dtype is None
    assert not skipped
    command._parse(["--case", "D9", "--case", "MNIST"], skipped)
    assert len(skipped) == 1
    assert skipped[0].endswith("got D9: left out")


def test_unknown_commands_and_devices_are_refused(capsys):
    assert command.main(["frobnicate"]) == 2
    message = capsys.readouterr().err
    assert "must be one of run, report, compare, ablation, trace, host, dropin," in message
    assert "got 'frobnicate'" in message
    if not torch.cuda.is_available():
        assert command.main(["--device=cuda"]) == 2
        assert "no GPU" in capsys.readouterr().err
