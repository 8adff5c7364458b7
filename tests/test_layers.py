import math

import numpy as np
import pytest
import torch
from torch import nn

import nicefast as nf
from helpers import partitions

ACTIVATIONS = ["relu", "leaky_relu", "tanh", "gelu", "silu", "elu"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_the_sequential_one(activation):
    modules = {
        "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh,
        "gelu": nn.GELU, "silu": nn.SiLU, "elu": nn.ELU,
    }  # fmt: skip
    mlp = nf.MLP(3, (8, 5), 2, activation=activation)
    act = modules[activation]()
    plain = nn.Sequential(mlp.linears[0], act, mlp.linears[1], act, mlp.linears[2])
    x = torch.randn(7, 3)
    assert torch.allclose(mlp(x), plain(x), atol=1e-6)
    assert len(mlp.linears) == 3
    assert all(isinstance(linear, nn.Linear) for linear in mlp.linears)


def test_mlp_context_is_a_concatenation():
    mlp = nf.MLP(3, (8,), 2, context=4)
    x, c = torch.randn(7, 3), torch.randn(7, 4)
    first, last = mlp.linears
    assert torch.allclose(mlp(x, c), last(torch.relu(first(torch.cat((x, c), 1)))), atol=1e-6)


def test_mlp_without_hidden_layers_is_linear():
    mlp = nf.MLP(3, (), 2)
    x = torch.randn(7, 3)
    assert torch.equal(mlp(x), mlp.linears[0](x))


def test_dropout_drops_hidden_units_in_training_alone():
    mlp = nf.MLP(3, (64, 64), 2, dropout=0.5)
    x = torch.randn(7, 3)
    seen: list[torch.Tensor] = []
    for linear in list(mlp.linears)[1:]:
        linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    dropped = mlp(x)
    h = torch.relu(mlp.linears[0](x))
    first = (seen[0] != 0) | (h == 0)
    assert 0.3 < first.float().mean() < 0.95
    assert torch.equal(seen[0], h * first * 2)
    torch.manual_seed(0)
    assert torch.equal(dropped, mlp(x))
    mlp.eval()
    plain = nf.MLP(3, (64, 64), 2)
    plain.load_state_dict(mlp.state_dict())
    assert torch.equal(mlp(x), plain(x))
    assert "dropout=0.5" in repr(mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_keeps_the_mean_and_gives_the_gradient_to_what_it_kept(p, dtype):
    mlp = nf.MLP(1, (100_003,), 1, dropout=p).to(dtype)  # no multiple of four
    nn.init.ones_(mlp.linears[0].bias)
    nn.init.zeros_(mlp.linears[0].weight)
    seen: list[torch.Tensor] = []
    mlp.linears[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mlp(torch.zeros(2, 1, dtype=dtype))
    (h,) = seen
    kept = h != 0
    spread = (p * (1 - p) / h.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 5 * spread + 2**-16
    exact = 2**16 / max(1, round((1 - p) * 2**16))
    assert torch.equal(h[kept].unique(), torch.tensor([exact], dtype=dtype))
    (gradient,) = torch.autograd.grad(h.sum(), mlp.linears[0].bias)
    assert torch.allclose(gradient, kept.sum(0).to(dtype) * torch.tensor(exact, dtype=dtype))


def test_dropout_under_transformations():
    mlp = nf.MLP(3, (64,), 2, dropout=0.5)
    each = torch.func.vmap(mlp, randomness="different")(torch.ones(5, 3))
    assert len(each.unique(dim=0)) == 5
    torch.compile(mlp, fullgraph=True, backend="aot_eager")(torch.ones(5, 3))


@pytest.mark.parametrize("dropout", [1.0, -0.1, True, "a", None, [0.1], math.nan, np.ones(3)])
def test_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout must be a number in"):
        nf.MLP(3, (8,), 2, dropout=dropout)


def test_coupling_takes_any_module(backend, device):
    for p in partitions(6):
        c, s = len(p.conditioning), len(p.shifted)
        net = nn.Sequential(nn.Linear(c, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, s)).to(
            device
        )
        layer = nf.AdditiveCoupling(p, net).eval()
        x = torch.randn(5, 6, device=device)
        y, log_det = layer(x)
        x1 = x[:, p.conditioning.to(device)]
        want = nf.reference.additive_coupling(x, net(x1), p)
        assert torch.allclose(y, want, atol=1e-6)
        assert torch.equal(log_det, torch.zeros(5, device=device))
        assert log_det.stride() == (0,)  # an expanded zero, not a summed tensor
        assert torch.allclose(layer.inverse(y)[0], x, atol=1e-6)
        assert torch.allclose(layer.inverse_(y.clone()), x, atol=1e-6)


def test_mlp_with_context_calls_whatever_its_first_layer_is():
    """Hooks, another class, anything in its place: as without a context."""
    mlp = nf.MLP(3, (8,), 2, context=4)
    x, c = torch.randn(6, 3), torch.randn(6, 4)
    plain, first = mlp(x, c), mlp.linears[0]
    hook = first.register_forward_hook(lambda m, given, out: 2 * out)
    doubled = mlp.linears[1](torch.relu(2 * first.forward(torch.cat((x, c), 1))))
    torch.testing.assert_close(mlp(x, c), doubled)
    hook.remove()
    torch.testing.assert_close(mlp(x, c), plain)

    class Around(torch.nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            return 2 * self.inside(x)

    mlp.linears[0] = Around(first)
    torch.testing.assert_close(mlp(x, c), doubled)
    torch.testing.assert_close(mlp(x[:, None], c[:1]), mlp(x[:, None], c[:1].expand(6, 1, 4)))
    mlp.linears[0] = torch.nn.utils.spectral_norm(first)
    mlp(x, c).sum().backward()
    assert mlp.linears[0].weight_orig.grad is not None


def test_coupling_passes_the_context_on(backend, device):
    class Shift(nn.Module):
        def forward(self, x1, context):
            return context[..., :2] * x1[..., :1]

    layer = nf.AdditiveCoupling(nf.Partition.half(4), Shift())
    x, c = torch.randn(3, 4, device=device), torch.randn(3, 5, device=device)
    y, _ = layer(x, c)
    assert torch.allclose(y[:, 2:], x[:, 2:] + c[:, :2] * x[:, :1])
    assert torch.allclose(layer.inverse(y, c)[0], x, atol=1e-6)


def test_coupling_hands_leading_dimensions_to_its_conditioner(backend, device):
    seen = []

    class Shift(nn.Module):
        def forward(self, x1):
            seen.append(x1.shape)
            return x1

    nf.AdditiveCoupling(nf.Partition.half(4), Shift())(torch.zeros(2, 3, 4, device=device))
    assert seen == [(2, 3, 2)]


def test_gradients_reach_everything(backend, device):
    """The coupling against the same thing in plain PyTorch, gradients of data and weights."""
    for p in partitions(6)[::3]:
        mlp = nf.MLP(len(p.conditioning), (8,), len(p.shifted), activation="tanh").double()
        layer = nf.AdditiveCoupling(p, mlp.to(device))
        x = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
        w = torch.randn(5, 6, dtype=torch.float64, device=device)
        plain = nf.reference.additive_coupling(x, mlp(x[:, p.conditioning.to(device)]), p)
        inputs = [x, *mlp.parameters()]
        want = torch.autograd.grad((plain * w).sum(), inputs)
        got = torch.autograd.grad((layer(x)[0] * w).sum(), inputs)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, atol=1e-12)


def test_scaling():
    layer = nf.Scaling(3)
    assert torch.equal(layer.log_scale, torch.zeros(3))
    with torch.no_grad():
        layer.log_scale.normal_()
    h = torch.randn(2, 5, 3)
    z, log_det = layer(h)
    assert torch.allclose(z, h * layer.log_scale.exp())
    assert log_det.shape == (2, 5)
    assert torch.allclose(log_det, layer.log_scale.sum())
    back, log_det_back = layer.inverse(z)
    assert torch.allclose(back, h, atol=1e-6)
    assert torch.equal(log_det_back, -log_det)


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: nf.MLP(3, (8,), 2, activation="swish"),
            ValueError,
            "activation must be one of relu",
        ),
        (lambda: nf.MLP(3, (0,), 2), ValueError, "hidden.* >= 1"),
        (lambda: nf.MLP(3, (8.0,), 2), ValueError, "hidden"),
        (lambda: nf.MLP(3, (8,), 2, context=-1), ValueError, "context must be an integer >= 0"),
        (
            lambda: nf.MLP(3, (8,), 2, context=True),
            ValueError,
            "context must be an integer >= 0, got True",
        ),
        (lambda: nf.MLP(3, None, 2), TypeError, "hidden must be widths, got NoneType"),
        (lambda: nf.MLP(3, (8,), 2, activation=None), ValueError, "activation must be one of"),
        (lambda: nf.MLP(4, (8,), 2)(X, "a"), TypeError, "context must be a torch.Tensor, got str"),
        (lambda: nf.Scaling(True), ValueError, "features must be an integer >= 1, got True"),
        (lambda: nf.Scaling(4)(None), TypeError, "h must be a torch.Tensor, got NoneType"),
        (lambda: nf.Scaling(4).inverse([0.0]), TypeError, "z must be a torch.Tensor, got list"),
        (
            lambda: nf.AdditiveCoupling(nf.Partition.half(4), nn.Linear(2, 2), grid=0.5)("a"),
            TypeError,
            "x must be a torch.Tensor, got str",
        ),
        (
            lambda: nf.MLP(4, (8,), 2, context=2)(X),
            ValueError,
            "context must have 2 features, got none",
        ),
        (lambda: nf.MLP(4, (8,), 2)(X, X), ValueError, "context was given"),
        (lambda: nf.AdditiveCoupling("half", nn.Identity()), TypeError, "partition must be"),
        (lambda: nf.AdditiveCoupling(nf.Partition.half(4), len), TypeError, "conditioner must be"),
        (
            lambda: nf.AdditiveCoupling(nf.Partition.half(4), nn.Linear(2, 3))(X),
            ValueError,
            r"shift must have shape \(3, 2\).*\(3, 3\)",
        ),
        (
            lambda: nf.AdditiveCoupling(nf.Partition.half(5), nn.Linear(3, 2))(X),
            ValueError,
            "x must have 5 features",
        ),
        (lambda: nf.Scaling(0), ValueError, "features must be an integer >= 1"),
        (lambda: nf.Scaling(3)(X), ValueError, "h must have 3 features"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_scaling_refuses_a_non_finite_log_scale():
    layer = nf.Scaling(3)
    with torch.no_grad():
        layer.log_scale[1] = -torch.inf
    for call in (layer, layer.inverse):
        with pytest.raises(ValueError, match="log_scale must be finite, got -inf at feature 1"):
            call(torch.zeros(2, 3))
