"""A change of a flow, in whatever way it is made, is in the next call's result, and never reaches a
flow that was frozen before."""

import copy
import inspect
import math

import pytest
import torch
from torch.nn.utils import parametrizations, prune

import nicefast as nf
from helpers import make
from ways import results, ways

CHANGES = {}


def change(function):
    CHANGES[function.__name__] = function
    return function


def weights(model):
    return model.couplings[1].conditioner.linears[1]


def steps():
    """A change for each optimiser of PyTorch and each of its implementations."""
    for name, kind in vars(torch.optim).items():
        if not inspect.isclass(kind) or name in ("Optimizer", "SparseAdam"):
            continue
        known = inspect.signature(kind).parameters
        for options in ({}, {"foreach": True}, {"fused": True}):
            if set(options) <= set(known):
                yield pytest.param(step(kind, options), id="-".join((name, *options)))


def step(kind, options):
    def change(model):
        ends = [p for p in model.parameters() if p.ndim == 2 or kind.__name__ != "Muon"]
        rate = {} if kind.__name__ == "Adafactor" else {"lr": 0.1}
        optimizer = kind(ends, **rate, **options)

        def loss():
            optimizer.zero_grad()
            found = -model.log_prob(torch.ones(4, 6, device=ends[0].device)).sum()
            found.backward()
            return found

        for _ in range(3):
            loss() if kind.__name__ != "LBFGS" else None
            optimizer.step(loss)

    return change


# numbers that change where they lie -------------------------------------------------------------


@change
def one_number(model):
    with torch.no_grad():
        weights(model).bias[3] += 1


@change
def through_data(model):
    weights(model).weight.data.mul_(-2)


@change
def copied_to_data(model):
    weights(model).weight.data.copy_(torch.randn(8, 16))


@change
def a_view_of_numpy(model):
    if not weights(model).weight.is_cpu:
        pytest.skip("no NumPy on a GPU")
    weights(model).weight.detach().numpy()[:] *= -2


@change
def the_storage(model):
    own = weights(model).weight
    own.untyped_storage().copy_((-2 * own.detach()).clone().untyped_storage())


@change
def in_inference_mode(model):
    with torch.inference_mode():
        weights(model).weight.mul_(-2)


@change
def a_vector_of_all(model):
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    results(model, torch.ones(3, 6, device=vector.device))
    vector.mul_(0.7)


@change
def loaded(model):
    model.load_state_dict(make(6).state_dict())


@change
def the_scale(model):
    with torch.no_grad():
        model.scaling.log_scale.add_(0.5)


@change
def initialised(model):
    torch.nn.init.orthogonal_(weights(model).weight)


# other tensors ----------------------------------------------------------------------------------


@change
def other_data(model):
    own = weights(model).weight
    own.data = torch.randn_like(own)


@change
def transposed_in_its_place(model):
    own = model.couplings[1].conditioner.linears[0]
    own.weight.data = own.weight.data.flatten().view(3, 16).t()


@change
def exchanged_data(model):
    first, second = (c.conditioner.linears[1].weight for c in list(model.couplings)[:2])
    first.data, second.data = second.data, first.data


@change
def swapped(model):
    own = weights(model).weight
    torch.utils.swap_tensors(own, torch.nn.Parameter(torch.randn_like(own)))


@change
def converted_by_swapping(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        through_data(model)
        model.float()
        model.load_state_dict({k: 0.9 * v for k, v in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@change
def there_and_back(model):
    model.double()
    through_data(model)
    model.float()


@change
def a_new_parameter(model):
    own = weights(model)
    own.bias = torch.nn.Parameter(own.bias.detach() + 1)


@change
def a_new_dictionary(model):
    own = weights(model)
    own._parameters = {k: torch.nn.Parameter(-2 * p.detach()) for k, p in own._parameters.items()}


@change
def assigned(model):
    state = {k: 0.5 * p for k, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@change
def wider_with_the_same_modules(model):
    first, second, _ = model.couplings[1].conditioner.linears
    device = first.weight.device
    first.weight.data, first.bias.data = torch.randn(20, 3).to(device), torch.randn(20).to(device)
    second.weight.data = torch.randn(8, 20).to(device)


# other modules ----------------------------------------------------------------------------------


def like(module, model):
    return module.to(model.scaling.log_scale.device)


@change
def a_new_layer(model):
    model.couplings[1].conditioner.linears[1] = like(torch.nn.Linear(16, 8), model)


@change
def new_layers(model):
    pairs = ((3, 5), (5, 3))
    linears = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairs)
    model.couplings[1].conditioner.linears = like(linears, model)


@change
def a_new_conditioner(model):
    model.couplings[1].conditioner = like(nf.MLP(3, (20,), 3), model)


@change
def a_conditioner_of_another_kind(model):
    model.couplings[1].conditioner = like(torch.nn.Linear(3, 3), model)


@change
def a_new_coupling(model):
    partition = model.couplings[0].partition
    model.couplings[0] = like(nf.AdditiveCoupling(partition, nf.MLP(3, (4,), 3)), model)


@change
def one_more(model):
    partition = model.couplings[0].partition
    model.couplings.append(like(nf.AdditiveCoupling(partition, nf.MLP(3, (4,), 3)), model))


@change
def one_less(model):
    del model.couplings[-1]


@change
def all_others(model):
    model.couplings = like(copy.deepcopy(make().couplings), model)


@change
def a_tuple_of_them(model):
    own = tuple(model.couplings)
    del model.couplings
    model.couplings = own
    through_data(model)


@change
def other_partitions(model):
    for i, coupling in enumerate(model.couplings):
        coupling.partition = nf.Partition.half(6) if i % 2 else ~nf.Partition.half(6)


@change
def a_partition_of_its_own(model):
    model.couplings[1].partition = nf.Partition.random(6, seed=5)


@change
def turned_round(model):
    for coupling in model.couplings:
        coupling.partition = ~coupling.partition


@change
def other_activations(model):
    for coupling in model.couplings:
        coupling.conditioner.activation = "tanh"


@change
def other_insides(model):
    weights(model).__dict__ = dict(like(torch.nn.Linear(16, 8), model).__dict__)


@change
def tied(model):
    model.couplings[1].conditioner = model.couplings[0].conditioner


@change
def one_bias_for_all_outputs(model):
    weights(model).bias = torch.nn.Parameter(torch.ones((), device=weights(model).bias.device))


# what a layer does besides ----------------------------------------------------------------------


@change
def pruned(model):
    prune.l1_unstructured(weights(model), "weight", 0.9)


@change
def pruned_for_good(model):
    prune.l1_unstructured(weights(model), "weight", 0.9)
    prune.remove(weights(model), "weight")


@change
def parametrised(model):
    parametrizations.weight_norm(weights(model))
    with torch.no_grad():
        weights(model).parametrizations.weight.original0.mul_(2)


@change
def hooked(model):
    weights(model).register_forward_hook(lambda module, given, out: out + 1)


@change
def hooked_before(model):
    model.couplings[0].register_forward_pre_hook(lambda module, given: (given[0] + 1, *given[1:]))
    model.couplings[0].inverse = lambda y, c=None: model.couplings[1].inverse(y, c)


@change
def a_forward_of_its_own(model):
    own = weights(model)
    own.forward = lambda h: torch.nn.functional.linear(h, -own.weight, own.bias)


@change
def a_subclass(model):
    class Mine(nf.MLP):
        def forward(self, x, context=None):
            return 2 * super().forward(x, context)

    model.couplings[0].conditioner = like(Mine(3, (16,), 3), model)


@change
def a_class_put_in(model):
    class Mine(torch.nn.Linear):
        def forward(self, h):
            return super().forward(h) + 1

    weights(model).__class__ = Mine


@change
def a_scaling_of_its_own(model):
    model.scaling.register_forward_hook(lambda module, given, out: (2 * out[0], out[1]))


@change
def double_scales(model):
    model.scaling.double()
    model.scaling.log_scale.data.add_(0.5)


@pytest.mark.parametrize("change", [*CHANGES.values(), *steps()])
def test_a_change_is_seen_at_once_and_reaches_no_frozen_flow(device, change):
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    frozen = model.frozen()
    with torch.no_grad():
        results(model, x)
        before = [f.clone() for f in results(frozen, x)]
    change(model)
    with torch.no_grad():
        after = results(model, x)
        with nf.set_backend("reference"):
            expected = results(model, x)
        for f, e in zip(after, expected, strict=True):
            torch.testing.assert_close(f, e, atol=2e-3, rtol=2e-3)
        for f, e in zip(results(frozen, x), before, strict=True):
            assert torch.equal(f, e)
        assert not torch.allclose(after[0], before[0].to(after[0]), atol=1e-2)
        again = model.frozen()
        for f, e in zip(results(again, x), expected, strict=True):
            torch.testing.assert_close(f, e, atol=2e-3, rtol=2e-3)
        drawn = [f.sample(4, generator=torch.Generator().manual_seed(0)) for f in (model, again)]
        torch.testing.assert_close(*drawn, atol=2e-3, rtol=2e-3)


@ways("kernel", "gemm")
@pytest.mark.parametrize("change", [one_number, the_scale, other_partitions, a_new_coupling])
def test_other_engines_read_it_at_each_call_too(way, device, change):
    model, x = way.of(make(6, device=device)), torch.randn(5, 6, device=device)
    frozen = model.frozen()
    with torch.no_grad():
        model.log_prob(x)
        before = frozen.log_prob(x)
        change(model)
        with nf.set_backend("reference"):
            expected = model.log_prob(x)
        torch.testing.assert_close(model.log_prob(x), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(frozen.log_prob(x), before)
        assert not torch.allclose(before, expected, atol=1e-2)


@ways("rows", "kernel")
def test_global_hooks_and_dropout_are_honoured(way, device):
    model, x = make(6, device=device, dropout=0.5), torch.randn(40, 6, device=device)
    frozen, seen = way.of(model.eval()).frozen(), []
    with torch.no_grad():
        expected = model.log_prob(x)
        model.train()
        assert "dropout" in model.plan(x).reason
        assert not torch.allclose(model.log_prob(x), expected, atol=1e-2)
        dropping = model.frozen()
        model.eval()
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        try:
            torch.testing.assert_close(model.log_prob(x), expected, atol=1e-4, rtol=1e-4)
            assert len(seen) > len(model.couplings)
        finally:
            handle.remove()
        for own in (frozen, dropping):
            torch.testing.assert_close(own.log_prob(x), expected, atol=1e-4, rtol=1e-4)


@ways("rows", "kernel", "layers")
def test_parameters_put_in_for_one_call(way, device):
    model, x = way.of(make(6, device=device)), torch.randn(3, 6, device=device)
    before, factor = model(x)[0].detach(), torch.ones((), device=device, requires_grad=True)
    twice = {name: 2 * factor * p.detach() for name, p in model.named_parameters()}
    got = torch.func.functional_call(model, twice, (x,))[0]
    assert torch.autograd.grad(got.sum(), factor)[0].abs() > 1e-3
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
        with nf.set_backend("reference"):
            torch.testing.assert_close(got, other(x)[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(x)[0], before)


def test_parameters_put_in_for_one_call_of_a_flow_with_a_grid():
    """The gradient is that of the parameters that were put in, though the modules have others."""
    model, x = make(6).with_grid(2**-16), torch.randn(5, 6)
    put = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    got = torch.func.functional_call(model, put, (x,))[0].square().sum()
    wanted = {name: p for name, p in put.items() if "scale" not in name}
    found = torch.autograd.grad(got, list(wanted.values()))
    parameters = dict(other.named_parameters())
    expected = torch.autograd.grad(other(x)[0].square().sum(), [parameters[n] for n in wanted])
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("grid", [None, 2**-16])
def test_global_hooks_are_seen(grid):
    model, x = make(6).with_grid(grid), torch.randn(5, 6)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, out: 2 * out if isinstance(module, torch.nn.Linear) else None
    )
    try:
        hooked = model(x)[0].detach()
    finally:
        hook.remove()
    assert not torch.allclose(hooked, model(x)[0], atol=1e-3)


class Doubled(nf.AdditiveCoupling):
    """A coupling of the user's own."""

    def forward(self, x, context=None):
        y, log_det = super().forward(x, context)
        return 2 * y, log_det + self.partition.features * math.log(2)

    def inverse(self, y, context=None):
        x, log_det = super().inverse(y / 2, context)
        return x, log_det - self.partition.features * math.log(2)


class Halved(torch.nn.Module):
    """A module that is no coupling, in a coupling's place."""

    def forward(self, x, context=None):
        return x / 2, x.new_zeros(x.shape[:-1])

    def inverse(self, y, context=None):
        return 2 * y, y.new_zeros(y.shape[:-1])


def own_inverse(model):
    plain = model.couplings[0].inverse
    model.couplings[0].inverse = lambda y, context=None: plain(y + 1, context)


@pytest.mark.parametrize("change", ["subclass", "module", "instance"])
def test_samples_come_through_a_couplings_own_inverse(change):
    model = make(6)
    before = model.sample(5, generator=torch.Generator().manual_seed(1))
    if change == "subclass":
        model.couplings[0] = Doubled(model.couplings[0].partition, model.couplings[0].conditioner)
    elif change == "module":
        model.couplings[0] = Halved()
    else:
        own_inverse(model)
    x = model.sample(5, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(x, before)
    seed = nf.functional.draw_seed(torch.Generator().manual_seed(1))
    h = nf.reference.sample_prior(model.scaling.log_scale.detach(), 5, seed)
    torch.testing.assert_close(model.inverse(h * model.scaling.log_scale.exp())[0], x)


def test_a_pruned_flow_gets_a_grid_after_a_gradient():
    model, x = make(6), torch.randn(5, 6)
    prune.l1_unstructured(model.couplings[0].conditioner.linears[0], "weight", 0.5)
    model.log_prob(x).sum().backward()
    exact = model.with_grid(2**-16)
    torch.testing.assert_close(exact.log_prob(x), model.log_prob(x), atol=1e-2, rtol=1e-3)
