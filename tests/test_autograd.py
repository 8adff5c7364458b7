"""Derivatives of every order, and torch.func."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import nicefast as nf
from helpers import partitions

F = nf.functional


def draw(*shape, device):
    return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)


def test_second_derivatives_of_the_coupling(backend, device):
    for p in partitions(6)[:: 1 if backend == "reference" else 4]:
        x, shift = draw(2, 6, device=device), draw(2, len(p.shifted), device=device)
        bias = draw(len(p.shifted), device=device)

        def function(x, shift, bias, p=p):
            x, x1 = F.split_features(x, p)
            y = F.additive_coupling(x, shift * x1.square().sum(-1, keepdim=True), p, True, bias)
            return y.square()

        assert torch.autograd.gradcheck(function, (x, shift, bias))
        assert torch.autograd.gradgradcheck(function, (x, shift, bias))


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("return_z", [False, True])
def test_second_derivatives_of_the_likelihood(backend, device, prior, return_z):
    h, s = draw(2, 3, device=device), draw(3, device=device)
    assert torch.autograd.gradgradcheck(
        lambda h, s: F.scale_log_prob(h, s, prior, return_z), (h, s)
    )


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_second_derivatives_of_the_sample(backend, device, prior):
    s = draw(3, device=device)
    assert torch.autograd.gradgradcheck(lambda s: F.sample_prior(s, 2, prior, seed=1), (s,))


def model(device):
    flow = nf.NICE(4, hidden=(6,), couplings=2, partition="random", activation="tanh")
    with torch.no_grad():
        flow.scaling.log_scale.normal_()
    return flow.to(device)


def test_hessian_and_jacobian(backend, device):
    flow, x = model(device).double(), torch.randn(4, dtype=torch.float64, device=device)
    log_scale = flow.scaling.log_scale.detach()

    def plain_log_prob(x):
        for coupling in flow.couplings:
            shift = coupling.conditioner(x[coupling.partition.conditioning.to(device)])
            x = nf.reference.additive_coupling(x, shift, coupling.partition)
        return nf.reference.scale_log_prob(x, log_scale)

    plain = torch.autograd.functional.hessian(plain_log_prob, x)
    assert torch.allclose(jacrev(grad(flow.log_prob))(x), plain, atol=1e-10)
    assert jacrev(lambda x: flow(x)[0])(x).shape == (4, 4)


@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
def test_forward_mode_of_any_order(backend, device, partition):
    flow = nf.NICE(5, hidden=(8,), couplings=3, activation="tanh", partition=partition)
    flow = flow.to(device, torch.float64)
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0, 0.5)
    x, v = torch.randn(2, 5, device=device, dtype=torch.float64)
    tangent = jvp(flow.log_prob, (x,), (v,))[1]
    torch.testing.assert_close(tangent, grad(flow.log_prob)(x) @ v)
    for method in (lambda x: flow(x)[0], lambda x: flow.inverse(x)[0]):
        torch.testing.assert_close(jacfwd(method)(x), jacrev(method)(x))
    curvature = jacrev(grad(flow.log_prob))(x)
    for forwards in (hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))):
        torch.testing.assert_close(forwards(flow.log_prob)(x), curvature)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, v)
        torch.testing.assert_close(fwAD.unpack_dual(flow.log_prob(dual)).tangent, tangent)


def test_forward_mode_of_every_operation(backend, device):
    p, options = nf.Partition.alternating(6), {"device": device, "dtype": torch.float64}
    x, shift, bias = (torch.randn(*n, **options) for n in ((4, 6), (4, 3), (3,)))
    log_scale = torch.randn(6, **options)
    for function, arguments in (
        (lambda x, s, b: F.additive_coupling(x, s, p, True, b), (x, shift, bias)),
        (lambda x: F.split_features(x, p), (x,)),
        (lambda h, s: F.scale_log_prob(h, s, "normal"), (x, log_scale)),
        (lambda h, s: F.scale_log_prob(h, s, return_z=True), (x, log_scale)),
        (lambda s: F.sample_prior(s, 4, seed=3), (log_scale,)),
    ):
        every = tuple(range(len(arguments)))
        forwards = jacfwd(function, every)(*arguments)
        torch.testing.assert_close(forwards, jacrev(function, every)(*arguments))


def test_gradient_of_each_sample(backend, device):
    """vmap(grad(log_prob)) over rows, with respect to the data and to the parameters."""
    flow, x = model(device), torch.randn(3, 4, device=device)
    by_row = vmap(grad(flow.log_prob))(x)
    inputs = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(flow.log_prob(inputs).sum(), inputs)
    assert torch.allclose(by_row, want, atol=1e-5)

    class LogProb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return self.flow.log_prob(x)

    wrapped = LogProb()
    parameters = dict(wrapped.named_parameters())
    each = vmap(grad(lambda p, x: functional_call(wrapped, p, (x,))), (None, 0))(parameters, x)
    for i in range(3):
        one = torch.autograd.grad(flow.log_prob(x[i]), list(parameters.values()))
        for got, want in zip(each.values(), one, strict=True):
            assert torch.allclose(got[i], want, atol=1e-5)


@pytest.mark.parametrize("call", ["log_prob", "forward", "inverse"])
@pytest.mark.parametrize(("rows", "hidden"), [(3, 6), (3, 200), (3000, 6), (100_000, 6)], ids=str)
def test_several_gradients_at_once(rows, hidden, call):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` asks for them."""
    flow = nf.NICE(4, hidden=(hidden,), couplings=2, activation="tanh")
    x = torch.randn(rows, 4, requires_grad=True)
    value = getattr(flow, call)(x)
    value = value if call == "log_prob" else value[0].sum(1)
    wanted = [x, *(p for p in flow.couplings.parameters())]
    several = torch.randn(2, rows)
    got = torch.autograd.grad(value, wanted, several, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(several):
        want = torch.autograd.grad(value, wanted, cotangent, retain_graph=True)
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g[i], w, atol=1e-4 * max(1, rows**0.5))
            assert not g.requires_grad


def chained(flow):
    """Values whose rows depend on the flow's own parameters."""
    seeded = torch.Generator().manual_seed
    y, _ = flow.sample_and_log_prob(5, generator=seeded(3))
    yield flow.log_prob(y).sum()
    yield flow.inverse(flow(y.detach())[0].sin())[0].square().sum()
    yield flow.log_prob(flow(y.detach())[0]).sum()


@pytest.mark.parametrize("hidden", [6, 200])
def test_rows_that_depend_on_the_flow_count_once(hidden):
    flow = nf.NICE(4, hidden=(hidden,), couplings=3, activation="tanh")
    for i, value in enumerate(chained(flow)):
        wanted = list(flow.parameters())
        with nf.set_backend("reference"):
            want = torch.autograd.grad(list(chained(flow))[i], wanted)
        for options in ({"retain_graph": True}, {"create_graph": True}):
            got = torch.autograd.grad(value, wanted, **options)
            for g, w in zip(got, want, strict=True):
                assert torch.allclose(g, w, atol=1e-4, rtol=1e-4)
        (several,) = torch.autograd.grad(
            value[None], wanted[:1], torch.ones(2, 1), is_grads_batched=True
        )
        assert torch.allclose(several[1], want[0], atol=1e-4, rtol=1e-4)


def test_hooks_of_parameters_run_once():
    flow, x = nf.NICE(4, hidden=(6,), couplings=2), torch.randn(5, 4)
    p = flow.couplings[0].conditioner.linears[0].weight
    value = flow.log_prob(x).sum()
    (want,) = torch.autograd.grad(value, p, retain_graph=True)
    p.register_hook(lambda g: g * 2)
    for options in ({"retain_graph": True}, {"create_graph": True}):
        assert torch.allclose(torch.autograd.grad(value, p, **options)[0], 2 * want, atol=1e-5)


@pytest.mark.parametrize("hidden", [6, 200])
def test_the_tangent_of_a_cotangent_is_not_dropped(hidden):
    flow, x = nf.NICE(4, hidden=(hidden,), couplings=2), torch.randn(5, 4, requires_grad=True)
    value, tangent = flow.log_prob(x), torch.randn(5)
    (want,) = torch.autograd.grad(value, x, tangent, retain_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(5), tangent)
        (got,) = torch.autograd.grad(value, x, dual)
        got = torch.autograd.forward_ad.unpack_dual(got).tangent
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 2000])
@pytest.mark.parametrize("hidden", [6, 200])
@pytest.mark.parametrize("call", ["log_prob", "forward"])
def test_what_was_kept_goes_with_the_gradient(rows, hidden, call):
    """A loss that is held, as by who collects losses, holds no activations."""
    flow, x = nf.NICE(4, hidden=(hidden,), couplings=2), torch.randn(rows, 4)
    value = getattr(flow, call)(x)
    value = value if call == "log_prob" else value[0]
    node = value.grad_fn
    while not hasattr(node, "residuals"):
        node = node.next_functions[0][0]
    assert node.residuals
    loss = value.sum()
    loss.backward(retain_graph=True)
    assert node.residuals
    loss.backward()
    assert node.residuals is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_vmap_over_models(backend, device):
    """An ensemble: parameters stacked along a first dimension, log_scale among them."""
    flows = [model(device) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(flows)
    x = torch.randn(5, 4, device=device)

    def z_of(parameters):
        return functional_call(flows[0], parameters, (x,))[0]

    got = vmap(z_of)({k: v.detach() for k, v in stacked.items()})
    for z, flow in zip(got, flows, strict=True):
        assert torch.allclose(z, flow(x)[0], atol=1e-5)


def test_no_gradient_where_none_is_needed(backend, device):
    p = nf.Partition.half(4)
    x = torch.randn(3, 4, device=device)
    assert not F.additive_coupling(x, torch.randn(3, 2, device=device), p).requires_grad
    s = torch.zeros(4, device=device, requires_grad=True)
    z, log_prob = F.scale_log_prob(x, s, return_z=True)
    assert z.requires_grad
    assert log_prob.requires_grad


def test_saved_tensors_hold_one_stream(device):
    """A coupling saves nothing of the data; the likelihood saves its input."""
    saved = []
    x = torch.randn(8, 6, device=device, requires_grad=True)
    shift = torch.randn(8, 3, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.additive_coupling(x, shift, nf.Partition.alternating(6))
        assert saved == []
        F.scale_log_prob(y, torch.zeros(6, device=device, requires_grad=True))
    assert sum(t.numel() for t in saved) == 8 * 6 + 6
