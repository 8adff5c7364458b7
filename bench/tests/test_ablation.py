"""The ablation: variants change what they say, compute the same, and leave nothing behind."""

import json
import math
import re

import pytest
import torch

import nicefast as nf
from bench import ablation
from bench.ablation import Switch, Variant, measure, patched, variants
from bench.gate import Gate
from bench.providers import FLOAT32, Nicefast, Plain, Shape, make_weights
from nicefast.engine import backward, linear, rows, thresholds
from nicefast.engine.stack import CouplingStack

SHAPE = Shape(8, (16, 12), 300)
WEIGHTS = make_weights(SHAPE)
X = torch.randn(SHAPE.rows, SHAPE.features, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def gate():
    return Gate(SHAPE, WEIGHTS, X)


@pytest.fixture
def small_steps(monkeypatch):
    """Several blocks and oneDNN's products, which only large batches have otherwise."""
    for name, value in {"BLOCK_BYTES": {"cpu": 4096}, "RECOMPUTED_BYTES": {"cpu": 8192}}.items():
        monkeypatch.setattr(rows, name, value)
    for name in ("_forward_flops", "_gradient_flops"):
        if getattr(linear, name) < math.inf:
            monkeypatch.setattr(linear, name, 1)
    if linear._few_rows:
        monkeypatch.setattr(linear, "FEW_ROWS_FLOPS", 0)


@pytest.mark.parametrize(
    ("name", "direction"), [(n, d) for n, v in variants().items() for d in v.directions]
)
def test_every_variant_computes_the_same(gate, name, direction, small_steps):
    variant = variants()[name]
    with Switch() as switch:
        switch.to(variant)
        assert ablation._failure(gate, variant.provider(SHAPE, WEIGHTS), direction) is None


def test_a_wrong_variant_is_not_timed(monkeypatch):
    class Shifted(Plain):
        def log_prob(self, x):
            return super().log_prob(x) + 1e-3

    known = variants() | {"wrong": Variant("it is wrong", Shifted)}
    monkeypatch.setattr(ablation, "variants", lambda: known)
    found = list(measure(SHAPE, ["log_prob"], ["plain", "wrong", "shipped"], 1, 0.0))
    plain, wrong, shipped = found
    assert plain["status"] == shipped["status"] == "timed"
    assert plain["times_plain"] == 1
    assert wrong["status"].startswith("failed: log_prob is off by")
    assert "median" not in wrong


def test_names_are_replaced_where_they_are_used_and_come_back():
    before = {m: vars(m)["product"] for m in (backward, linear)}
    split, sizes = CouplingStack.split, rows.BLOCK_BYTES
    other, pieces = (lambda *_: None), {"cpu": 1}
    names = {"product": other, "BLOCK_BYTES": pieces, "CouplingStack.split": other}
    with patched(names):
        assert all(vars(m)["product"] is other for m in before)
        assert rows.BLOCK_BYTES is thresholds.BLOCK_BYTES is pieces
        assert CouplingStack.split is other
    assert {m: vars(m)["product"] for m in before} == before
    assert CouplingStack.split is split
    assert rows.BLOCK_BYTES is thresholds.BLOCK_BYTES is sizes
    with pytest.raises(LookupError, match="'no_such_name'"), patched({"no_such_name": 1}):
        pass


def test_every_variant_leaves_the_engine_as_it_was():
    def everything():
        modules = [linear, rows, backward, thresholds]
        return [dict(vars(m)) for m in modules] + [dict(vars(CouplingStack)), nf.get_backend()]

    before = everything()
    for variant in variants().values():
        with variant.context():
            pass
    assert everything() == before


def operators(variant, training, small):
    from helpers import Operators

    with Switch() as switch, Operators() as seen, torch.set_grad_enabled(training):
        switch.to(variants()[variant])
        found = Nicefast(SHAPE, WEIGHTS).log_prob(X)
        if training:
            found.mean().backward()
    return seen.seen


PRODUCTS = ("_linear_pointwise", "addmm", "mm")  # whichever library computes them


@pytest.mark.parametrize(
    ("name", "training", "operator", "more"),
    [
        ("no oneDNN", False, "_linear_pointwise", False),
        ("oneDNN forward only", True, "_linear_pointwise", False),
        ("oneDNN from 16 MFLOP", False, "_linear_pointwise", False),
        ("relu in oneDNN", False, "relu_", False),
        ("weights as stored", False, "clone", False),
        ("one block", False, "a product", False),
        ("recomputed", True, "a product", True),
        ("feature-major", False, "add_", True),
    ],
)
def test_variants_change_what_they_say(name, training, operator, more, small_steps):
    if name not in variants():
        pytest.skip("MKL computes everything here")
    shipped, other = (operators(v, training, small_steps) for v in ("shipped", name))
    names = PRODUCTS if operator == "a product" else (operator,)
    a, b = (sum(found.count(name) for name in names) for found in (shipped, other))
    assert b > a if more else b < a


def test_layers_go_by_other_ways():
    flow = Nicefast(SHAPE, WEIGHTS).flow
    assert flow.plan(X).name == "rows"
    for name in ("layers", "reference"):
        with variants()[name].context():
            assert flow.plan(X).name == "layers"
    with variants()["plan kept"].context():
        assert flow.plan(X) is flow.plan(X)


def test_a_gradient_in_the_forward_pass_is_a_mean_s_alone():
    model = variants()["gradient in forward"].provider(SHAPE, WEIGHTS)
    with pytest.raises(RuntimeError, match="the same for every row"):
        (model.log_prob(X) * torch.arange(SHAPE.rows)).sum().backward()


def test_samples_of_plain_pytorch_have_the_same_noise():
    flow = Nicefast(SHAPE, WEIGHTS)
    plain = variants()["plain"].provider(SHAPE, WEIGHTS)
    found = []
    for model in (flow, plain):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(model.ready(FLOAT32).sample(20))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_the_command(tmp_path, capfd):
    assert ablation.main(["--quick", "--out", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    stored = [json.loads(line) for line in (tmp_path / "quick.ndjson").read_text().splitlines()]
    assert {r["status"] for r in stored} == {"timed"}
    assert {r["variant"] for r in stored} == set(variants())
    assert {r["direction"] for r in stored} == set(ablation.DIRECTIONS)
    assert said == (tmp_path / "quick.md").read_text()
    assert stored[0]["run"]["cpu"] in said
    one = next(r for r in stored if r["variant"] == "layers" and r["rows"] == 3)
    row = next(line for line in said.splitlines() if re.search(r"4 couplings \| 3 \|", line))
    assert f"| {one['times_plain']:.2f} |" in row
    again = tmp_path / "quick.md"
    again.unlink()
    assert ablation.main(["--quick", "--report", "--out", str(tmp_path)]) == 0
    assert again.read_text() == said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quick.md", "quick.ndjson"]


def test_nothing_stored_is_said_in_one_line(tmp_path, capsys):
    assert ablation.main(["--report", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
