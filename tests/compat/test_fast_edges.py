"""Couplings made fast where little is as usual: masks of a checkpoint, shifts of one value,
narrow inputs, autocast, torch.func, forward mode, conditioners with weights elsewhere."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.utils._pytree import tree_leaves

import nicefast as nf

normflows = pytest.importorskip("normflows", reason="needs normflows")
modules = pytest.importorskip("FrEIA.modules", reason="needs FrEIA")

from nicefast.compat.distributions import ScalingTransform  # noqa: E402
from nicefast.compat.normflows import MaskedAffineFlow  # noqa: E402

MASK = torch.tensor([1.0, 0, 1, 1, 0, 0])
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Shift(nn.Module):
    """A learned shift that does not depend on its input, of any shape that broadcasts."""

    def __init__(self, shape):
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.value


class Wide(nn.Linear):
    """A conditioner with a wider result than its input's dtype."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).float()


class Elsewhere(nn.Module):
    """Weights that are no parameters of the conditioner, as those of a hypernetwork."""

    weight = torch.randn(6, 6, requires_grad=True)

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return x @ self.weight[: self.a, : self.b]


def masked(net=nn.Linear):
    return normflows.flows.MaskedAffineFlow(MASK.clone(), net(6, 6))


def block(net=nn.Linear):
    return normflows.flows.AffineCouplingBlock(net(3, 3), scale=False)


def freia(net=nn.Linear):
    return modules.NICECouplingBlock([(6,)], subnet_constructor=net, split_len=3)


def calls(kind):
    if kind is freia:
        return [lambda m, x: m((x,)), lambda m, x: m((x,), rev=True)]
    return [lambda m, x: m(x), lambda m, x: m.inverse(x)]


def both(module):
    after = copy.deepcopy(module)
    assert len(nf.accelerate(after).replaced) == 1
    return module, after


def assert_equal(before, after, tolerance=1e-5):
    """The same values, shapes and dtypes."""
    for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask", [[1.0] * 6, [0.0] * 6, [0.5, 0, 1, 1, 0, 0], [0.0, 0, 1, 1, 0, 1]])
def test_any_mask_that_a_checkpoint_brings_is_followed(mask):
    before, after = both(masked())
    after(X)  # the partition is made
    state = {**before.state_dict(), "b": torch.tensor([mask])}
    for m in (before, after):
        m.load_state_dict(state)
    for call in calls(masked):
        assert_equal(call(before, X), call(after, X))
    constructed = MaskedAffineFlow(torch.tensor(mask), before.t)
    assert_equal(before(X), constructed(X))


@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (4, 1)])
def test_a_full_width_shift_may_broadcast(shape):
    before, after = both(masked(lambda *_: Shift(shape)))
    for call in calls(masked):
        assert_equal(call(before, X), call(after, X))
    gradients = [torch.autograd.grad(m(X)[0].sin().sum(), m.t.value)[0] for m in (before, after)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (4, 1)])
@pytest.mark.parametrize("kind", [block, freia])
def test_a_shift_may_broadcast(kind, shape):
    before, after = both(kind(lambda *_: Shift(shape)))
    with torch.no_grad():
        for call in calls(kind):
            assert_equal(call(before, X), call(after, X))


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("net", [nn.Linear, Wide])
@pytest.mark.parametrize("kind", [masked, block, freia])
def test_narrow_inputs_under_autocast_keep_their_dtypes(kind, net, recording):
    before, after = both(kind(net))
    for dtype in (torch.bfloat16, torch.float32):
        for call in calls(kind):
            with torch.set_grad_enabled(recording), torch.autocast("cpu", torch.bfloat16):
                # theirs rounds some sums to bfloat16 on the way to a float32 result
                assert_equal(call(before, X.to(dtype)), call(after, X.to(dtype)), 0.02)


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("kind", [masked, block, freia])
def test_function_transforms_and_forward_mode(kind, recording):
    before, after = both(kind())
    for call in calls(kind):
        results = []
        for m in (before, after):
            one = lambda x, m=m, call=call: tree_leaves(call(m, x[None]))[0][0]  # noqa: E731
            with torch.set_grad_enabled(recording):
                results.append([vmap(one)(X), jacrev(one)(X[0]), jacfwd(one)(X[0])])
        assert_equal(*results)


@pytest.mark.parametrize("kind", [masked, block, freia])
def test_parameters_swapped_by_functional_call(kind):
    given = ((X,),) if kind is freia else (X,)
    results = []
    for m in both(kind()):
        loss = lambda p, m=m: tree_leaves(functional_call(m, p, given))[0].square().sum()  # noqa: E731
        results.append(grad(loss)(dict(m.named_parameters())))
    assert_equal(*results)


@pytest.mark.parametrize("kind", [masked, block, freia])
def test_weights_that_are_no_parameters_get_their_gradients(kind):
    gradients = []
    for m in both(kind(Elsewhere)):
        y = tree_leaves(calls(kind)[0](m, X))[0]
        gradients.append(torch.autograd.grad(y.sin().sum(), Elsewhere.weight)[0])
    torch.testing.assert_close(*gradients)


def test_a_scaling_does_not_broadcast():
    t = ScalingTransform(torch.tensor([1.0]))
    for call in (t, t.inv, lambda x: t.log_abs_det_jacobian(x, x)):
        with pytest.raises(ValueError, match=r"must have shape \(\.\.\., 1\), one value"):
            call(torch.zeros(5, 4))
