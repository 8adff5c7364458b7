"""Which path is chosen, and that whatever a path can't honour is done layer by layer."""

import pytest
import torch
from torch.nn.utils import prune

import nicefast as nf

X = torch.zeros(3, 6)


def flow(**options):
    return nf.NICE(6, **{"hidden": (16, 8), "couplings": 3, **options})


def path(model, x=X, context=None):
    return nf.choose_path(model, x, context)


@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
@pytest.mark.parametrize("context", [0, 2])
def test_mlps_on_one_partition_go_through_products(partition, context):
    model = flow(partition=partition, context=context)
    chosen = path(model, context=torch.zeros(3, 2) if context else None)
    assert chosen.name == "products"
    assert chosen.chain.products == 9
    assert not chosen.chain.bfloat16


def test_wide_flows_and_small_batches_keep_their_activations():
    many = torch.zeros(1, 6).expand(100_000, 6)
    assert not path(flow(hidden=(129,)), many).chain.rebuild
    assert path(flow(hidden=(128,)), many).chain.rebuild
    assert not path(flow(hidden=(128,))).chain.rebuild
    says = flow(hidden=(16,)).explain(rows=10)
    assert "10 rows in one piece" in says
    assert "keeps activations" in says
    assert "rebuilds activations" in flow(hidden=(16,)).explain(rows=1_000_000)


def test_a_path_is_printed_without_weights():
    assert len(repr(path(flow(partition="random")))) < 400


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
@pytest.mark.parametrize("known", [False, True])
def test_what_products_do_not_know_is_done_layer_by_layer(change, says, known):
    model = flow()
    if known:  # what was read before is not taken for what there is
        assert path(model).name == "products"
    change(model)
    chosen = path(model)
    assert chosen.name == "layer by layer"
    assert says in chosen.reason
    if change not in (_own_forward, _one_narrower):
        assert model.log_prob(X).isfinite().all()
    assert says in model.explain()


def test_calls_that_go_layer_by_layer():
    model = flow()
    assert path(model, X.double()).reason == "float64 rows"
    assert "no hidden layer" in path(flow(hidden=())).reason
    with nf.set_backend("reference"):
        assert "'reference'" in path(model).reason
    with torch.autocast("cpu", torch.float16):
        assert "autocast to torch.float16" in path(model).reason
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert path(model).reason == "global module hooks"
    finally:
        handle.remove()
    seen = []
    torch.func.vmap(lambda x: seen.append(path(model, x[None]).reason) or x)(X)
    assert "torch.func" in seen[0]


def test_bfloat16_only_by_the_user_s_setting():
    model = flow()
    with torch.autocast("cpu", torch.bfloat16):
        assert path(model).chain.bfloat16
    torch.set_float32_matmul_precision("medium")
    try:
        assert path(model).chain.bfloat16 == torch.cpu._is_avx512_bf16_supported()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not path(model).chain.bfloat16
