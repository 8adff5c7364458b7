"""nicefast.training: the best epoch is kept, seeds decide all, interruptions change nothing."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import RECIPE, fit_tiny, flat, tiny_data, tiny_model, unit

import nicefast as nf
from nicefast.evaluation import evaluate
from nicefast.fingerprint import fingerprint
from nicefast.preprocessing import Preprocessing
from nicefast.training import Recipe, fit, init_scaling, initialise


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_init_scaling_gives_each_latent_feature_the_priors_spread(prior):
    model = nf.NICE(3, hidden=(4,), prior=prior)
    x = torch.randn(500, 3) * torch.tensor([0.01, 1.0, 300.0]) + 5
    init_scaling(model, x)
    spread = (x * model.scaling.log_scale.exp()).std(0)
    torch.testing.assert_close(spread, model.prior.stddev.expand(3), rtol=1e-4, atol=0)
    assert model.scaling.log_scale.requires_grad
    init_scaling(model, x, limit=1.0)
    assert model.scaling.log_scale.max() == 1.0


def test_init_scaling_names_a_constant_feature():
    with pytest.raises(ValueError, match="1 of its 4 features do not, the first of them feature 2"):
        init_scaling(tiny_model(), torch.randn(20, 4) * torch.tensor([1, 1, 0, 1]))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m, x: init_scaling("a", x), TypeError, r"model must be a nicefast\.NICE, got str"),
        (lambda m, x: init_scaling(m, None), TypeError, r"x must be a torch\.Tensor, got NoneType"),
        (lambda m, x: init_scaling(m, x, math.nan), ValueError, "limit must be a number, got nan"),
        (lambda m, x: init_scaling(m, x, "a"), TypeError, "limit must be a number, got 'a'"),
        (lambda m, x: initialise(3, "data", x), TypeError, r"model must be a nicefast\.NICE"),
        (lambda m, x: initialise(m, "here", x), ValueError, "start must be one of data, paper"),
    ],
)
def test_a_beginning_that_cannot_be_leaves_the_model_alone(call, error, says):
    model = tiny_model()
    before = flat(model)
    with pytest.raises(error, match=says):
        call(model, torch.randn(50, 4))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": torch.nn.Linear(4, 4)}, r"model must be a nicefast\.NICE, got Linear"),
        ({"data": None}, "data must be a Dataset, got NoneType"),
        ({"preprocessing": "a"}, "preprocessing must be a Preprocessing, got str"),
        ({"recipe": 3}, "recipe must be a Recipe, got int"),
        ({"progress": 3}, "progress must be a function, got int"),
        ({"snapshot": 1.5}, "snapshot must be a path, got float"),
        ({"snapshot_seconds": "a"}, "snapshot_seconds must be a number, got 'a'"),
    ],
)
def test_a_fit_names_what_is_of_a_wrong_kind(wrong, says):
    data = tiny_data()
    given = {"model": tiny_model(), "data": data, "preprocessing": unit(data.train, data.levels)}
    with pytest.raises(TypeError, match=says):
        fit(**given | wrong)


@pytest.mark.parametrize("seed", [1.5, "a", None, True, math.nan])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match=r"seed must be from 0 to 2\^62 - 1, got "):
        fit_tiny(tiny_model(), seed=seed)


def test_starts():
    model, x = tiny_model(), torch.randn(50, 4)
    initialise(model, "data", x)
    assert all((c.conditioner.linears[-1].weight == 0).all() for c in model.couplings)
    assert (model.couplings[0].conditioner.linears[0].weight != 0).any()
    z, _ = model(x)
    torch.testing.assert_close(z.std(0), model.prior.stddev.expand(4), rtol=1e-4, atol=0)
    initialise(model, "paper", x)
    for coupling in model.couplings:
        for linear in coupling.conditioner.linears:
            assert 0 < linear.weight.abs().max() <= 0.01
    assert (model.scaling.log_scale == 0).all()


@pytest.mark.parametrize("levels", [4, None])
def test_fit_improves_and_reports_every_epoch(levels):
    data, model, seen = tiny_data(levels), tiny_model(), []
    init_scaling(model, data.train.float())
    history = fit_tiny(model, data, progress=seen.append)
    assert tuple(seen) == history.epochs
    assert [epoch.epoch for epoch in seen] == list(range(1, 13))
    assert seen[-1].validation > seen[0].validation
    assert seen[-1].train > seen[0].train
    assert all(epoch.rate > 0 for epoch in seen)
    assert not model.training


def test_the_model_ends_with_the_best_epochs_weights():
    data, model = tiny_data(), tiny_model()
    recipe = Recipe(epochs=60, patience=5, lr=0.1, averaging=0.0, weight_decay=0.0)
    history = fit_tiny(model, data, recipe)
    assert history.stopped_early
    assert history.best == max(history.epochs, key=lambda epoch: epoch.validation)
    assert len(history.epochs) == history.best.epoch + 5
    again = evaluate(model, data.validation, unit(data.train, 4), draws=4, seed=0)
    assert again.log_prob == pytest.approx(history.best.validation, abs=1e-9)
    assert again.log_prob != pytest.approx(history.epochs[-1].validation, abs=1e-3)


def test_one_seed_decides_everything():
    data, results = tiny_data(), []
    for seed in (3, 3, 4):
        model = tiny_model(dropout=0.2)
        torch.manual_seed(len(results))  # the global seed must not matter once a model is made
        state = torch.random.get_rng_state()
        history = fit_tiny(model, data, replace(RECIPE, epochs=3), seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)  # nor is it touched
        results.append((flat(model), [epoch[:3] for epoch in history.epochs]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert not torch.equal(results[0][0], results[2][0])


def test_the_largest_seed_is_a_seed():
    history = fit_tiny(tiny_model(), recipe=replace(RECIPE, epochs=1), seed=2**62 - 1)
    assert history.best.epoch == 1
    with pytest.raises(ValueError, match=r"seed must be from 0 to 2\^62 - 1, got -1"):
        fit_tiny(tiny_model(), seed=-1)


def test_noise_is_fresh_each_epoch_and_test_rows_are_not_touched(monkeypatch):
    seen = []
    forward = Preprocessing.forward

    def spy(self, raw, seed=0, row_offset=0):
        x, log_det = forward(self, raw, seed, row_offset)
        seen.append((len(raw), seed, row_offset, x))
        return x, log_det

    monkeypatch.setattr(Preprocessing, "forward", spy)
    data = tiny_data()
    fit_tiny(tiny_model(), data, Recipe(epochs=2, batch_size=64, validation_draws=1))
    train = [(n, offset) for n, seed, offset, _ in seen if seed >= 1 << 62]
    assert train == [(64, 0), (36, 64), (64, 100), (36, 164)]  # no noise is used twice
    held = [(n, seed, offset) for n, seed, offset, _ in seen if seed < 1 << 62]
    assert held == [(20, 0, 0)] * 2  # and validation always has the same


def test_averaging_is_a_moving_average_of_the_weights():
    """After one step its memory is 1/10: (0.1 w0 + 0.9 w1)."""
    stepped, averaged = tiny_model(), tiny_model()
    before = flat(stepped)
    for model, averaging in ((stepped, 0.0), (averaged, 0.995)):
        fit_tiny(model, recipe=Recipe(epochs=1, batch_size=100, averaging=averaging))
    torch.testing.assert_close(flat(averaged), before.lerp(flat(stepped), 0.9))


def test_float64_models_are_trained_in_float64():
    model = tiny_model().double()
    fit_tiny(model, recipe=replace(RECIPE, epochs=1))
    assert flat(model).dtype == torch.float64


def test_the_likelihood_of_cells_is_what_is_trained_and_validated():
    data = tiny_data()
    steps, model = unit(data.train, 4), tiny_model(grid=0.25, hidden=(16,))
    initialise(model, "data", steps.forward(data.train)[0])
    recipe = replace(RECIPE, objective="cells", validation_draws=1)
    history = fit(model, data, steps, recipe)
    assert history.best.validation > history.epochs[0].validation + 0.1
    with torch.no_grad():
        cells = model.cell_log_prob(data.validation.float() / 4).double().mean().item()
    assert history.best.validation == pytest.approx(cells + 4 * math.log(4), abs=1e-4)
    with pytest.raises(ValueError, match="model must have a grid"):
        fit(tiny_model(), data, steps, recipe)
    with pytest.raises(ValueError, match="objective must be one of density, cells, got 'bits'"):
        Recipe(objective="bits")


@pytest.mark.parametrize("optimiser", ["adam", "rmsprop"])
def test_other_optimisers_and_bf16(optimiser):
    model = tiny_model()
    recipe = replace(
        RECIPE,
        optimiser=optimiser,
        weight_decay=0.0,
        schedule="cosine",
        warmup=3,
        clip=10.0,
        precision="bf16",
        momentum_epochs=(1, 2) if optimiser == "rmsprop" else (),
        eps=1e-2,
    )
    initialise(model, "data", tiny_data().train / 4 + 0.1 * torch.rand(100, 4))
    history = fit_tiny(model, recipe=recipe)
    assert history.epochs[-1].validation > history.epochs[0].validation


def test_bf16_products_learn_what_float32_learns():
    """In particular, each step multiplies by the weights of that step."""
    ends = []
    for name in ("float32", "bf16"):
        model = tiny_model(hidden=(32,), dropout=0.1)
        data = tiny_data(None)
        initialise(model, "data", data.train)
        recipe = Recipe(epochs=40, lr=1e-2, batch_size=25, weight_decay=0.0, precision=name)
        ends.append([fit_tiny(model, data, recipe).best.validation])
        ends[-1].append(evaluate(model, data.train, unit(data.train, None)).log_prob)
    assert ends[1] == pytest.approx(ends[0], abs=0.15)


def test_clipping_bounds_the_step_of_plain_descent():
    """Adam's first step is lr long whatever the gradient; RMSProp's shows it, by its stabiliser."""
    moved = []
    for clip in (0.0, 1e-6):
        model = tiny_model()
        before = flat(model)
        recipe = replace(
            RECIPE,
            epochs=1,
            batch_size=100,
            optimiser="rmsprop",
            weight_decay=0.0,
            eps=1.0,
            clip=clip,
            averaging=0.0,
        )
        fit_tiny(model, recipe=recipe)
        moved.append((flat(model) - before).norm().item())
    assert moved[1] == pytest.approx(1e-6 * RECIPE.lr, rel=1e-2)
    assert moved[0] > 100 * moved[1]


def test_a_diverging_fit_names_its_step_and_the_last_good_state(tmp_path):
    with pytest.raises(FloatingPointError, match=r"in step \d+ \(epoch \d+\): try a smaller lr"):
        fit_tiny(tiny_model(), tiny_data(None), replace(RECIPE, lr=1e30))
    model, data = tiny_model(), tiny_data(None)
    data.train[70:] = math.nan  # the third batch of the first epoch at the latest
    with pytest.raises(FloatingPointError, match=r"in step [1-3] \(epoch 1\)"):
        fit_tiny(model, data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("patience", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", "fast"),
        ("weight_decay", -1.0),
        ("averaging", 1.0),
        ("validation_draws", 0),
        ("optimiser", "sgd"),
        ("schedule", "stairs"),
        ("precision", "fp8"),
        ("start", "here"),
        ("lr_decay", 0.0),
        ("clip", -1.0),
        ("momentum_epochs", (6, 5)),
        ("momentum_epochs", None),
        ("momentum_epochs", ("a", "b")),
        ("lr", True),
        ("scale_limit", math.nan),
        ("optimiser", ["adam"]),
    ],
)
def test_a_recipe_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be "):
        Recipe(**{name: value})


def test_weight_decay_needs_adamw():
    with pytest.raises(ValueError, match="weight_decay needs the optimiser adamw, got 'adam'"):
        Recipe(optimiser="adam")


# interruptions ----------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("optimiser", ["adamw", "rmsprop"])
def test_a_resumed_fit_ends_with_the_same_bits(tmp_path, optimiser):
    pytest.importorskip("safetensors", reason="needs safetensors")
    recipe = replace(
        RECIPE,
        optimiser=optimiser,
        weight_decay=1.0 if optimiser == "adamw" else 0.0,
        average_every=3,
        schedule="cosine",
    )
    unbroken = tiny_model(dropout=0.2)
    expected = fit_tiny(unbroken, recipe=recipe, snapshot=tmp_path / "a", snapshot_seconds=0)
    assert not list(tmp_path.glob("*.partial*"))
    for stop in (1, 5, 11):
        snapshot = tmp_path / f"b{stop}"

        def interrupt(epoch, stop=stop):
            if epoch.epoch == stop:
                raise Stop

        with pytest.raises(Stop):
            fit_tiny(
                tiny_model(dropout=0.2),
                recipe=recipe,
                snapshot=snapshot,
                snapshot_seconds=0,
                progress=interrupt,
            )
        model, seen = tiny_model(1, dropout=0.2), []
        history = fit_tiny(
            model, recipe=recipe, snapshot=snapshot, resume=True, progress=seen.append
        )
        assert torch.equal(flat(model), flat(unbroken))
        assert [e[:3] for e in history.epochs] == [e[:3] for e in expected.epochs]
        assert tuple(seen) == history.epochs
        assert history.epochs[-1].seconds > history.epochs[stop - 1].seconds


def test_a_snapshot_of_another_fit_or_a_damaged_one_is_refused(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    snapshot = tmp_path / "snapshot"
    with pytest.raises(ValueError, match="nothing to resume from: no file"):
        fit_tiny(tiny_model(), snapshot=snapshot, resume=True)
    fit_tiny(tiny_model(), recipe=replace(RECIPE, epochs=2), snapshot=snapshot)
    with pytest.raises(ValueError, match="is of another fit: its recipe is"):
        fit_tiny(tiny_model(), snapshot=snapshot, resume=True)
    with pytest.raises(ValueError, match="is of another fit: its seed is 0, expected 1"):
        fit_tiny(
            tiny_model(), recipe=replace(RECIPE, epochs=2), seed=1, snapshot=snapshot, resume=True
        )
    content = snapshot.read_bytes()
    for damaged in (content[:100], content[: len(content) // 2], b"", b"x" * 64):
        snapshot.write_bytes(damaged)
        with pytest.raises(ValueError, match="is truncated or no safetensors file"):
            fit_tiny(tiny_model(), recipe=replace(RECIPE, epochs=2), snapshot=snapshot, resume=True)
    nf.save(tiny_model(), snapshot)
    with pytest.raises(ValueError, match="is no snapshot of a fit"):
        fit_tiny(tiny_model(), recipe=replace(RECIPE, epochs=2), snapshot=snapshot, resume=True)


PROCESS = """
import sys, time
sys.path.insert(0, {tests!r})
from dataclasses import replace
import torch
from tiny import *
torch.set_num_threads(1)
model = tiny_model(dropout=0.2, hidden=(64, 64))
recipe = replace(RECIPE, epochs=40)
def slowly(epoch):
    print(epoch.epoch, flush=True)
    time.sleep({pause})
fit_tiny(model, recipe=recipe, snapshot={snapshot!r}, snapshot_seconds=0, resume={resume},
         progress=slowly)
torch.save(flat(model), {out!r})
"""


def with_other_values(data):
    train = data.train.clone()
    train[3, 1] = (train[3, 1] + 1) % 4
    return replace(data, train=train)


def test_a_fit_of_other_data_of_the_same_shape_is_not_resumed(tmp_path):
    snapshot, recipe = tmp_path / "snapshot", replace(RECIPE, epochs=2)
    fit_tiny(tiny_model(), recipe=recipe, snapshot=snapshot)
    other = with_other_values(tiny_data())
    with pytest.raises(ValueError, match="the data it began with have other values"):
        fit_tiny(tiny_model(), other, recipe=recipe, snapshot=snapshot, resume=True)


def test_a_changed_bit_of_a_snapshot_is_noticed(tmp_path):
    snapshot, recipe = tmp_path / "snapshot", replace(RECIPE, epochs=2)
    whole = tiny_model()
    fit_tiny(whole, recipe=recipe, snapshot=snapshot)
    content = snapshot.read_bytes()
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        snapshot.write_bytes(changed)
        model = tiny_model()
        try:
            fit_tiny(model, recipe=recipe, snapshot=snapshot, resume=True)
        except ValueError as error:
            named = str(snapshot) in str(error)
        else:
            named = torch.equal(flat(model), flat(whole))
        assert named, place


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("fit"),
        lambda a: a.pop("taken"),
        lambda a: a.update(taken=-1),
        lambda a: a.update(taken=1.5),
        lambda a: a.update(taken=10**6),
        lambda a: a.update(records=[[1, 2]]),
        lambda a: a.update(records=[[2, 0.0, 0.0, 0.0, 0.0]]),
        lambda a: a.update(best=[9, 0.0, 0.0, 0.0, 0.0]),
        lambda a: a.update(best=None),
        lambda a: a.update(taken=2 * a["taken"]),
        lambda a: a.update(best=[*a["best"][:2], math.inf, *a["best"][3:]]),
        lambda a: a.update(records=[[*r[:2], math.inf, *r[3:]] for r in a["records"]], best=None),
        lambda a: a.update(records=[[1.0, *r[1:]] for r in a["records"]]),
        lambda a: a.update(records=10**400),
        lambda a: a["fit"].update(recipe=7),
        lambda a: a["fit"].pop("seed"),
        lambda a: a.update(seconds="a"),
        lambda a: a.update(seconds=10**400),
        lambda a: a.update(seconds=math.nan),
    ],
)
def test_every_field_of_a_snapshot_is_looked_at(tmp_path, change):
    from nicefast.training.snapshots import read_snapshot, write_snapshot

    snapshot, recipe = tmp_path / "snapshot", replace(RECIPE, epochs=2)
    fit_tiny(tiny_model(), recipe=recipe, snapshot=snapshot)
    tensors, about = read_snapshot(snapshot, torch.device("cpu"))
    change(about)
    write_snapshot(snapshot, tensors, about)
    is_refused(snapshot, recipe)


def is_refused(snapshot, recipe, says="(damaged|of another fit)"):
    """In one line, and the model is what it was."""
    model = tiny_model()
    before = flat(model).clone()
    with pytest.raises(ValueError, match=rf"snapshot is {says}") as error:
        fit_tiny(model, recipe=recipe, snapshot=snapshot, resume=True)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800
    assert torch.equal(flat(model), before)


def without(tensors, group, name):
    del tensors[group][name]


@pytest.mark.parametrize("optimiser", ["adamw", "rmsprop"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("model"),
        lambda t: t.pop("best"),
        lambda t: t.pop("step"),
        lambda t: without(t, "model", "scaling.log_scale"),
        lambda t: without(t, "step", "total"),
        lambda t: without(t, "step", next(k for k in t["step"] if k.startswith("0."))),
        lambda t: t["step"]["taken"].add_(1),
        lambda t: t["step"]["total"].fill_(math.nan),
        lambda t: t["step"].update({"99.step": torch.zeros(())}),
        lambda t: t["step"].update(surprise=torch.zeros(())),
        lambda t: t["step"].update({"0.surprise": torch.zeros(())}),
        lambda t: t["step"].update({k: v[:1] for k, v in t["step"].items() if v.ndim}),
        lambda t: t["step"].update({k: v.double() for k, v in t["step"].items() if v.ndim}),
        lambda t: t["model"].update({k: v.double() for k, v in t["model"].items()}),
        lambda t: t["average"]["scaling.log_scale"].fill_(math.inf),
        lambda t: t["best"].update({"couplings.0._extra_state": fingerprint("another")}),
    ],
)
def test_every_tensor_of_a_snapshot_is_looked_at(tmp_path, change, optimiser):
    from nicefast.training.snapshots import read_snapshot, write_snapshot

    recipe = replace(RECIPE, epochs=2, optimiser=optimiser, weight_decay=0.0)
    snapshot = tmp_path / "snapshot"
    fit_tiny(tiny_model(), recipe=recipe, snapshot=snapshot)
    tensors, about = read_snapshot(snapshot, torch.device("cpu"))
    tensors = {g: {k: v.clone() for k, v in members.items()} for g, members in tensors.items()}
    change(tensors)
    write_snapshot(snapshot, tensors, about)
    is_refused(snapshot, recipe, "damaged")


@pytest.mark.parametrize("how", [1e-3, 1e-9])
def test_a_preprocessing_of_other_values_is_not_resumed(tmp_path, how):
    data, recipe = tiny_data(), replace(RECIPE, epochs=2)
    steps = Preprocessing.fit(["dequantise", "whiten"], data.train, data.levels)
    snapshot = tmp_path / "snapshot"
    fit(tiny_model(), data, steps, recipe, snapshot=snapshot)
    moved = {k: t * (1 + how) if k.endswith("mean") else t for k, t in steps.tensors.items()}
    other = Preprocessing.from_parts(steps.configuration, moved)
    if how > 1e-6:
        with pytest.raises(ValueError, match="its preprocessing was fitted to other values"):
            fit(tiny_model(), data, other, recipe, snapshot=snapshot, resume=True)
    else:
        fit(tiny_model(), data, other, recipe, snapshot=snapshot, resume=True)


def process(snapshot, out, resume, pause):
    code = PROCESS.format(
        tests=str(Path(__file__).parents[1]),
        snapshot=str(snapshot),
        out=str(out),
        resume=resume,
        pause=pause,
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_fit_that_is_killed_and_resumed_ends_with_the_same_weights(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    assert process(tmp_path / "a", tmp_path / "whole.pt", False, 0).wait() == 0
    killed = process(tmp_path / "b", tmp_path / "none.pt", False, 0.02)
    assert killed.stdout is not None
    while int(killed.stdout.readline()) < 17:
        assert killed.poll() is None
    time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert process(tmp_path / "b", tmp_path / "resumed.pt", True, 0).wait() == 0
    assert not (tmp_path / "none.pt").exists()
    assert torch.equal(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt"))


# several processes ------------------------------------------------------------------------------

RANKS = """
import os, sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
import torch
from tiny import *
from nicefast.runtime.ranks import process_group
torch.set_num_threads(1)
model = tiny_model(hidden=(16,))
seen = []
with process_group(torch.device("cpu")) as ranks:
    fit_tiny(model, recipe=replace(RECIPE, epochs=4, batch_size=33), progress=seen.append)
    if ranks.rank == 0:
        torch.save((flat(model), [e[:3] for e in seen], ranks.world), {out!r})
"""


def test_two_processes_come_to_what_one_does(tmp_path):
    code = tmp_path / "ranks.py"
    found = []
    for world in (1, 2):
        out = tmp_path / f"{world}.pt"
        code.write_text(RANKS.format(tests=str(Path(__file__).parents[1]), out=str(out)))
        command = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
        run = subprocess.run(
            [sys.executable, *command, str(code)], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        found.append(torch.load(out))
    (weights, epochs, one), (weights2, epochs2, two) = found
    assert (one, two) == (1, 2)
    torch.testing.assert_close(weights, weights2, rtol=1e-4, atol=1e-5)
    for mine, others in zip(epochs, epochs2, strict=True):
        assert mine == pytest.approx(others, abs=1e-3)
