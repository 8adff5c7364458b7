"""What was read of a flow is kept, and never taken for a flow that has changed since."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import nicefast as nf
from helpers import Operators, make
from nicefast.fused.chain import Chain
from nicefast.reading import _PLACE, read

CPU = torch.device("cpu")


def test_what_has_not_changed_is_read_once():
    model = make()
    chain = read(model.couplings, CPU, False)
    assert read(model.couplings, CPU, False) is chain
    assert read(model.couplings, CPU, True) is read(model.couplings, CPU, True)
    assert read(model.couplings, CPU, True).bfloat16
    assert not chain.bfloat16
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model.log_prob(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    assert read(model.couplings, CPU, False) is chain  # the tensors are the same
    assert read(copy.deepcopy(model).couplings, CPU, False) is not chain


def _linear(model):
    return model.couplings[1].conditioner.linears[1]


def _new(p):
    return torch.nn.Parameter(torch.randn_like(p))


def _new_weight(model):
    _linear(model).weight = _new(_linear(model).weight)


def _new_bias(model):
    _linear(model).bias = _new(_linear(model).bias)


def _new_dictionary(model):
    own = _linear(model)
    own._parameters = {k: _new(p) for k, p in own._parameters.items()}


def _assigned(model):
    state = {k: 0.3 * torch.randn_like(p) for k, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _new_linear(model):
    model.couplings[1].conditioner.linears[1] = torch.nn.Linear(16, 8)


def _new_linears(model):
    mlp = model.couplings[1].conditioner
    mlp.linears = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in ((3, 5), (5, 3)))


def _new_mlp(model):
    model.couplings[1].conditioner = nf.MLP(3, (20,), 3)


def _new_coupling(model):
    model.couplings[0] = nf.AdditiveCoupling(model.couplings[0].partition, nf.MLP(3, (4,), 3))


def _one_more(model):
    model.couplings.append(nf.AdditiveCoupling(model.couplings[0].partition, nf.MLP(3, (4,), 3)))


def _one_less(model):
    del model.couplings[-1]


def _all_others(model):
    model.couplings = copy.deepcopy(make().couplings)


def _turned_round(model):
    for coupling in model.couplings:
        coupling.partition = ~coupling.partition


def _other_activations(model):
    for coupling in model.couplings:
        coupling.conditioner.activation = "tanh"


def _wider(model):  # the same modules and parameters
    first, second, _ = model.couplings[1].conditioner.linears
    first.weight.data, first.bias.data = torch.randn(20, 3), torch.randn(20)
    second.weight.data = torch.randn(8, 20)


def _other_insides(model):
    own, other = model.couplings[1].conditioner.linears[1], torch.nn.Linear(16, 8)
    own.__dict__ = dict(other.__dict__)


def _other_settings(model):
    for coupling in model.couplings:
        mlp = coupling.conditioner
        mlp.__dict__ = {**mlp.__dict__, "activation": "tanh"}


def _exchanged(model):
    mlp = model.couplings[1].conditioner
    mlp.linears[1].weight, other = _new(mlp.linears[1].weight), mlp.linears[1].weight
    mlp.linears[1].weight.data, other.data = other.data, mlp.linears[1].weight.data


@pytest.mark.parametrize(
    "change",
    [
        _new_weight,
        _new_bias,
        _new_dictionary,
        _assigned,
        _new_linear,
        _new_linears,
        _new_mlp,
        _new_coupling,
        _one_more,
        _one_less,
        _all_others,
        _turned_round,
        _other_activations,
        _wider,
        _other_insides,
        _other_settings,
        _exchanged,
    ],
)
@pytest.mark.parametrize("rows", [3, 3000])
def test_a_change_is_seen_at_once(change, rows):
    model, x = make(), torch.randn(rows, 6)
    with torch.no_grad():
        before = model.log_prob(x)
        change(model)
        assert nf.choose_path(model, x).name == "products"
        after = model.log_prob(x)
        back = model.inverse(model(x)[0])[0]
    with nf.set_backend("reference"):
        assert torch.allclose(after, model.log_prob(x), atol=1e-4, rtol=1e-4)
    assert torch.allclose(back, x, atol=1e-2)
    assert change is _exchanged or not torch.allclose(before, after, atol=1e-2)


def test_a_flow_is_forgotten_with_its_parameters():
    model = make()
    with torch.no_grad():
        model.log_prob(torch.randn(3, 6))
    gone = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in gone)


class Watched(nf.NICE):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for p in self.parameters():
            p.register_hook(self.clip)

    def clip(self, g):
        return g.clamp(-1, 1)


def test_a_flow_that_its_own_insides_refer_to_is_forgotten():
    x, gone = torch.randn(3, 6), []
    for k in range(3):
        model = Watched(6, hidden=(8,)) if k == 0 else make()
        with torch.no_grad():
            model.log_prob(x)
        if k == 1:
            model.couplings[0].register_forward_hook(lambda *_, own=model: None)
        elif k == 2:
            object.__setattr__(model.couplings[0].conditioner, "owner", model)
        model.log_prob(x).sum().backward()
        gone.append(weakref.ref(model))
    del model
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def test_copies_have_nothing_of_it():
    model, x = make(), torch.randn(3, 6)
    want = model.log_prob(x)
    assert vars(model.couplings)[_PLACE] is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(twin.couplings)[_PLACE] is None
        assert torch.equal(twin.log_prob(x), want)
        chain = read(twin.couplings, CPU, False)
        assert chain.parameters[0] is next(twin.couplings.parameters())


def test_couplings_in_a_list_of_another_kind():
    model, x = make(), torch.randn(3, 6)
    want, own = model.log_prob(x), tuple(model.couplings)
    del model.couplings
    model.couplings = own
    assert torch.allclose(model.log_prob(x), want)


def test_a_parameter_of_another_type_is_seen():
    class Mine(torch.nn.Parameter):
        pass

    model = make()
    assert isinstance(read(model.couplings, CPU, False), Chain)
    model.couplings[0].conditioner.linears[0].weight.__class__ = Mine
    assert "no plain nn.Linear" in read(model.couplings, CPU, False)


def test_parameters_put_in_for_one_call_are_forgotten():
    """torch.func.functional_call keeps neither parameters nor the graph they come from alive."""
    model, x = make(), torch.randn(3, 6)
    before = model.log_prob(x).detach()
    for factor in (torch.ones((), requires_grad=True), torch.ones(())):
        twice = {name: 2 * factor * p.detach() for name, p in model.named_parameters()}
        got = torch.func.functional_call(model, twice, (x,))[0]
        if factor.requires_grad:
            assert torch.autograd.grad(got.sum(), factor)[0].isfinite()
        gone = [weakref.ref(p) for p in twice.values()]
        del twice, got
        gc.collect()
        assert not any(ref() is not None for ref in gone)
        assert torch.equal(model.log_prob(x), before)


def test_what_is_read_within_a_mode_is_not_kept():
    model = make(partition="random")
    with Operators():
        chain = read(model.couplings, CPU, False)
    assert read(model.couplings, CPU, False) is not chain


@torch.no_grad()
def test_weights_that_are_not_dense_go_layer_by_layer():
    model, x = make(6).requires_grad_(False), torch.randn(3, 6)
    want = model.log_prob(x)
    linear = model.couplings[0].conditioner.linears[0]
    linear.weight = torch.nn.Parameter(linear.weight.to_sparse_csr(), requires_grad=False)
    assert "dense" in nf.choose_path(model, x).reason
    assert torch.allclose(model.log_prob(x), want, atol=1e-5)
