"""Which engine is planned, and that what no engine can honour goes layer by layer."""

import itertools

import pytest
import torch
from torch.nn.utils import prune

import nicefast as nf
from helpers import make
from nicefast.engine import rows

X = torch.zeros(3, 6)


def flow(**options):
    return nf.NICE(6, **{"hidden": (16, 8), "couplings": 3, **options})


def planned(model, x=X, context=None):
    return model.plan(x, context)


@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
@pytest.mark.parametrize("context", [0, 2])
def test_mlps_on_one_partition_go_through_products(partition, context):
    model = flow(partition=partition, context=context)
    chosen = planned(model, context=torch.zeros(3, 2) if context else None)
    stack = chosen.engine.stack
    assert chosen.name == "rows"
    assert (stack.products, stack.context, stack.dtype) == (9, context, torch.float32)
    assert len(repr(stack)) < 400, "weights are printed"


def test_the_least_threshold_of_each_kind(monkeypatch):
    engine = planned(flow()).engine
    assert engine.saves(1)
    assert not engine.saves(1 << 40)
    each = engine.stack.residual_bytes
    assert each == 4 * sum(w.shape[1] for layers in engine.stack.couplings for w, _ in layers)
    for rows_, training in ((0, True), (1, False), (100_001, False), (100_001, True)):
        blocks = engine.blocks(rows_, training)
        assert blocks[0].start == 0
        assert blocks[-1].stop == rows_
        assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))
    assert "saves" in flow().explain(rows=10)
    model = flow()
    model.recompute = True
    assert "recomputes" in model.explain(rows=10)
    assert "10 rows in 1 blocks of at most 10" in model.explain(rows=10)
    monkeypatch.setattr(rows, "RESIDUAL_BYTES", 0)
    assert "recomputes" in flow().explain(rows=10)


def _hooked(model):
    model.couplings[1].conditioner.linears[0].register_forward_hook(lambda *_: None)


def _replaced(model):
    model.couplings[1].conditioner = torch.nn.Linear(3, 3)


def _own_partition(model):
    model.couplings[1].partition = nf.Partition.random(6, seed=5)


def _subclassed(model):
    class Mine(nf.MLP):
        def forward(self, x, context=None):
            return 2 * super().forward(x)

    model.couplings[0].conditioner = Mine(3, (16,), 3)


def _own_forward(model):
    model.couplings[0].conditioner.forward = lambda x: x


def _pruned(model):
    prune.l1_unstructured(model.couplings[0].conditioner.linears[0], "weight", 0.5)


def _parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.couplings[0].conditioner.linears[0])


def _no_bias(model):
    model.couplings[0].conditioner.linears[0] = torch.nn.Linear(3, 16, bias=False)


def _one_narrower(model):
    model.couplings[2].conditioner.linears[0].bfloat16()


def _another_activation(model):
    model.couplings[0].conditioner.activation = "tanh"


def _grid(model):
    model.couplings[1].grid = 2.0**-4


def _dropping(model):
    model.couplings[0].conditioner.dropout = 0.5


def _other_hooks(model):
    model.couplings[1].conditioner._forward_hooks = {0: lambda *_: None}


def _another_type(model):
    model.couplings[0].__class__ = type("Other", (nf.AdditiveCoupling,), {})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_hooked, "coupling 1: hooks"),
        (_replaced, "coupling 1: a Linear"),
        (_own_partition, "coupling 1: a partition of its own"),
        (_subclassed, "coupling 0: a Mine"),
        (_own_forward, "coupling 0: hooks, or a forward"),
        (_pruned, "coupling 0: hooks"),
        (_parametrized, "coupling 0: a layer that is no plain nn.Linear"),
        (_no_bias, "coupling 0: a layer that is no plain nn.Linear"),
        (_one_narrower, "coupling 2: parameters that are no float32"),
        (_another_activation, "coupling 1: another activation"),
        (_grid, "coupling 1: a grid of its own"),
        (_dropping, "coupling 0: dropout"),
        (_another_type, "coupling 0: a Other"),
        (_other_hooks, "coupling 1: hooks"),
    ],
)
def test_what_no_engine_knows_is_done_layer_by_layer(change, says):
    model = flow()
    change(model)
    chosen = planned(model)
    assert chosen.name == "layers"
    assert says in chosen.reason
    if change not in (_own_forward, _one_narrower):
        assert model.log_prob(X).isfinite().all()
    assert says in model.explain()


def test_calls_that_go_layer_by_layer():
    model = flow()
    assert planned(model, X.double()).reason == "float64 rows"
    assert planned(flow(context=2)).reason == "the context is missing or unexpected"
    with nf.set_backend("reference"):
        assert "'reference'" in planned(model).reason
    with torch.autocast("cpu", torch.float16):
        assert "autocast to torch.float16" in planned(model).reason
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert planned(model).reason == "coupling 0: global module hooks"
    finally:
        handle.remove()
    seen = []
    torch.func.vmap(lambda x: seen.append(planned(model, x[None]).reason) or x)(X)
    assert "torch.func" in seen[0]


def test_bfloat16_only_by_the_user_s_setting():
    model = flow()

    def dtype():
        return planned(model).engine.stack.dtype

    with torch.autocast("cpu", torch.bfloat16):
        assert dtype() == torch.bfloat16
    torch.set_float32_matmul_precision("medium")
    try:
        assert (dtype() == torch.bfloat16) == torch.cpu._is_avx512_bf16_supported()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert dtype() == torch.float32


@torch.no_grad()
def test_weights_that_are_not_dense_go_layer_by_layer():
    model, x = flow().requires_grad_(False), torch.randn(3, 6)
    want = model.log_prob(x)
    linear = model.couplings[0].conditioner.linears[0]
    linear.weight = torch.nn.Parameter(linear.weight.to_sparse_csr(), requires_grad=False)
    assert "dense" in planned(model).reason
    assert torch.allclose(model.log_prob(x), want, atol=1e-5)
    linear.weight = torch.nn.Parameter(torch.empty(16, 3, device="meta"), requires_grad=False)
    assert planned(model).name == "layers"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden": (300,)}, "hidden layers of up to 300 units"),
        ({"features": 130}, "130 features"),
        ({"features": 120, "context": 9}, "120 features and 9 of context"),
        ({"hidden": ()}, "with a hidden layer"),
    ],
)
def test_what_no_kernel_serves(triton_backend, device, options, says):
    model = make(**{"features": 6, "device": device, **options})
    x = torch.randn(3, model.features, device=device)
    c = torch.randn(3, model.context, device=device) if model.context else None
    assert planned(model, x, c).name == ("layers" if device.type == "cpu" else "gemm")
    assert says in planned(model, x, c).reason
    assert says in model.explain()


def test_flows_changed_by_hand_have_no_kernel(triton_backend, device):
    def why(model):
        chosen = planned(model, torch.zeros(3, 6, device=device))
        assert chosen.name != "kernel"
        return chosen.reason

    model = make(6, device=device)
    assert planned(model, torch.zeros(3, 6, device=device)).name == "kernel"
    model.couplings[1].conditioner = nf.MLP(3, (16, 9), 3).to(device)
    assert "coupling 1 has other hidden layers" in why(model)
    model = make(6, device=device)
    model.scaling.register_forward_hook(lambda *_: None)
    assert "scaling" in why(model)
    model = make(6, device=device)
    model.scaling.double()
    assert "log_scale is torch.float64" in why(model)
