"""nf.convert: the density of flows of nflows, normflows, zuko and FrEIA, through nicefast."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nicefast as nf
from nicefast.compat import convert

DTYPES = [torch.float64, torch.float32]
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 3e-5, "atol": 1e-4},
}


def stir(module, seed=0):
    """Parameters away from their initial values, so that nothing is hidden by zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def rows(event, dtype, n=17):
    shape = (event,) if isinstance(event, int) else tuple(event)
    return 2 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def same(converted, x, expected, context=None):
    found = converted.log_prob(x, context)
    assert found.dtype == expected.dtype == x.dtype
    torch.testing.assert_close(found, expected, **TOLERANCE[x.dtype])


def sequential(i, o, activation=nn.ReLU, hidden=(8, 6)):
    widths = (i, *hidden, o)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


# --- nflows


def nflows_layers(d, net):
    from nflows import transforms as t

    torch.manual_seed(0)
    mask = torch.arange(d) % 2 * 2 - 1
    norm = t.ActNorm(d)
    norm.initialized.fill_(True)
    batch = t.BatchNorm(d).eval()
    batch.running_var.fill_(0.7)
    batch.running_mean.fill_(0.2)
    return [
        t.PointwiseAffineTransform(torch.linspace(-1, 1, d), torch.linspace(0.5, 2, d)),
        t.AdditiveCouplingTransform(mask, net),
        norm,
        t.RandomPermutation(d),
        t.CompositeTransform([t.AdditiveCouplingTransform(-mask, net), t.ReversePermutation(d)]),
        t.InverseTransform(t.AdditiveCouplingTransform(mask, net)),
        t.IdentityTransform(),
        batch,
        t.InverseTransform(t.Permutation(torch.randperm(d))),
        t.AdditiveCouplingTransform(-mask, net),
        t.AdditiveCouplingTransform(mask, net),
        t.PointwiseAffineTransform(0.3, 1.7),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", ["StandardNormal", "DiagonalNormal"])
@pytest.mark.parametrize("d", [2, 5, 8])
def test_nflows(d, base, dtype):
    pytest.importorskip("nflows")
    from nflows import distributions, transforms
    from nflows.flows import Flow

    layers = nflows_layers(d, lambda i, o: nf.MLP(i, (7, 9), o, "tanh"))
    flow = Flow(transforms.CompositeTransform(layers), getattr(distributions, base)((d,)))
    flow = stir(flow).to(dtype).eval()
    flow._distribution._log_z = flow._distribution._log_z.to(dtype)
    x = rows(d, dtype)
    same(convert(flow), x, flow.log_prob(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nflows_residual_nets_with_context_are_kept(dtype):
    pytest.importorskip("nflows")
    from nflows import distributions, transforms
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    layers = nflows_layers(6, lambda i, o: ResidualNet(i, o, 8, context_features=3, num_blocks=1))
    flow = Flow(transforms.CompositeTransform(layers), distributions.StandardNormal((6,)))
    flow = stir(flow).to(dtype).eval()
    flow._distribution._log_z = flow._distribution._log_z.to(dtype)
    x, c = rows(6, dtype), rows(3, dtype)
    converted = convert(flow)
    assert converted.context == 3
    same(converted, x, flow.log_prob(x, c), c)
    assert converted.sample(4, c).shape == (17, 4, 6)
    assert converted.log_prob(x[:0], c[:0]).shape == (0,)


def test_nflows_images():
    pytest.importorskip("nflows")
    from nflows import distributions, transforms
    from nflows.flows import Flow
    from nflows.nn.nets import ConvResidualNet

    def net(i, o):
        return ConvResidualNet(i, o, 4, num_blocks=1)

    mask = torch.tensor([1, -1, 1])
    parts = [
        transforms.AdditiveCouplingTransform(mask, net),
        transforms.Permutation(torch.tensor([2, 0, 1])),
        transforms.ActNorm(3),
        transforms.AdditiveCouplingTransform(-mask, net),
        transforms.AdditiveCouplingTransform(mask, net),
    ]
    parts[2].initialized.fill_(True)
    base = distributions.StandardNormal((3, 4, 2))
    flow = stir(Flow(transforms.CompositeTransform(parts), base)).double().eval()
    x = rows((3, 4, 2), torch.float64)
    converted = convert(flow)
    assert converted.event_shape == (3, 4, 2)
    same(converted, x, flow.log_prob(x))


def test_nflows_mlps_are_read():
    """nflows' own MLP takes no context, and so can't stand in a coupling; its layers are known."""
    pytest.importorskip("nflows")
    from nflows.nn.nets import MLP

    from nicefast.compat.conditioners import sequence

    net = MLP((3,), (2,), [4, 5], activation=torch.tanh)
    x = torch.randn(6, 3)
    torch.testing.assert_close(nn.Sequential(*sequence(net))(x), net(x))
    assert sequence(MLP((3,), (2,), [4], activation=torch.sin)) is None


# --- normflows


def normflows_flow(d, trainable=True):
    import normflows as nfl

    torch.manual_seed(0)
    first = (d + 1) // 2
    block, mlp = nfl.flows.AffineCouplingBlock, nfl.nets.MLP
    norm = nfl.flows.ActNorm((d,))
    norm.data_dep_init_done.fill_(1.0)
    mask = torch.arange(d) % 2
    flows = [
        block(mlp([first, 8, d - first]), scale=False),
        nfl.flows.Permute(d, mode="shuffle"),
        norm,
        block(mlp([d - first, 8, 7, first], leaky=0.01), scale=False, split_mode="channel_inv"),
        nfl.flows.Permute(d, mode="swap"),
        nfl.flows.MaskedAffineFlow(mask.float(), mlp([d, 9, d])),
        nfl.flows.AffineConstFlow((d,)),
        nfl.flows.MaskedAffineFlow(1 - mask.float(), mlp([d, 9, d])),
        nfl.flows.MaskedAffineFlow(mask.float()),
        block(mlp([first, 8, d - first]), scale=False),
        nfl.flows.base.Reverse(block(mlp([d - first, 8, first]), False, split_mode="channel_inv")),
    ]
    return nfl.NormalizingFlow(nfl.distributions.DiagGaussian(d, trainable), flows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [2, 5, 8])
def test_normflows(d, dtype):
    pytest.importorskip("normflows")
    flow = stir(normflows_flow(d)).to(dtype)
    x = rows(d, dtype)
    converted = convert(flow)
    same(converted, x, flow.log_prob(x))


@pytest.mark.parametrize("mode", ["checkerboard", "checkerboard_inv", "channel", "channel_inv"])
def test_normflows_images(mode):
    nfl = pytest.importorskip("normflows")
    channels = 1 if "checkerboard" in mode else 2
    event = (channels, 4, 6) if channels == 1 else (4, 4, 6)
    flows = []
    for m in (mode, mode.removesuffix("_inv") if "inv" in mode else mode + "_inv"):
        net = nfl.nets.ConvNet2d([channels, 5, channels], [3, 3], init_zeros=False)
        flows.append(nfl.flows.AffineCouplingBlock(net, scale=False, split_mode=m))
        flows.append(nfl.flows.AffineConstFlow((event[0], 1, 1)))
    flow = nfl.NormalizingFlow(nfl.distributions.DiagGaussian(event), flows)
    flow = stir(flow).double()
    x = rows(event, torch.float64)
    same(convert(flow), x, flow.log_prob(x))


# --- zuko


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("activation", [nn.ELU, nn.SiLU, nn.Sigmoid])
def test_zuko(context, activation, dtype):
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    d = 5
    t, lazy = zuko.transforms, zuko.lazy

    def coupling(parity):
        return zuko.flows.coupling.GeneralCouplingTransform(
            d, context, torch.arange(d) % 2 == parity, t.AdditiveTransform, [()],
            hidden_features=(7, 8), activation=activation,
        )  # fmt: skip

    parts = [
        coupling(0),
        lazy.UnconditionalTransform(t.PermutationTransform, torch.randperm(d), buffer=True),
        lazy.UnconditionalTransform(t.MonotonicAffineTransform, torch.randn(d), torch.randn(d)),
        coupling(1),
        coupling(0).inv,
        lazy.LazyComposedTransform(
            lazy.UnconditionalTransform(t.AdditiveTransform, torch.randn(d)), coupling(1)
        ),
        lazy.UnconditionalTransform(
            torch.distributions.AffineTransform, torch.randn(d), -torch.rand(d) - 1
        ),
    ]
    base = lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.randn(d), torch.rand(d) + 0.5, buffer=True
    )
    flow = zuko.flows.Flow(parts, base).to(dtype)
    x = rows(d, dtype)
    c = rows(context, dtype) if context else None
    converted = convert(flow)
    same(converted, x, flow(c).log_prob(x), c)
    known = activation is not nn.Sigmoid
    assert all((type(m.conditioner) is nf.MLP) == known for m in converted.couplings)


# --- FrEIA


def freia_flow(event, net, condition=None):
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import ActNorm, LearnedElementwiseScaling, NICECouplingBlock, PermuteRandom

    flow = SequenceINN(*event)
    cond = {"cond": 0, "cond_shape": (condition,)} if condition else {}
    for seed in range(2):
        flow.append(NICECouplingBlock, subnet_constructor=net, **cond)
        flow.append(PermuteRandom, seed=seed)
        flow.append(ActNorm)
        flow[-1].init_on_next_batch = False
    flow.append(NICECouplingBlock, subnet_constructor=net, split_len=0.3, **cond)
    flow.append(LearnedElementwiseScaling)
    return flow


def freia_log_prob(flow, x, prior, c=None):
    z, log_det = flow(x, None if c is None else [c])
    return nf.reference.prior_log_prob(z.flatten(1), prior).sum(1) + log_det


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [None, 3])
@pytest.mark.parametrize(("d", "prior"), [(4, "normal"), (7, "logistic")])
def test_freia(d, prior, condition, dtype):
    pytest.importorskip("FrEIA")
    torch.manual_seed(0)
    flow = stir(freia_flow((d,), sequential, condition)).to(dtype)
    x = rows(d, dtype)
    c = rows(condition, dtype) if condition else None
    converted = convert(flow, prior)
    same(converted, x, freia_log_prob(flow, x, prior, c), c)


def test_freia_images():
    pytest.importorskip("FrEIA")
    flow = freia_flow((4, 3, 2), lambda i, o: nn.Conv2d(i, o, 3, padding=1))
    flow = stir(flow).double()
    x = rows((4, 3, 2), torch.float64)
    same(convert(flow, "logistic"), x, freia_log_prob(flow, x, "logistic"))


# --- all of them


def nice(peer, d=6, net=None):
    """A NICE of four couplings on even and odd features."""
    if peer == "nflows":
        from nflows import distributions, transforms
        from nflows.flows import Flow

        mask = torch.arange(d) % 2 * 2 - 1
        parts = [
            transforms.AdditiveCouplingTransform(
                mask * (-1) ** i, net or (lambda i, o: nf.MLP(i, (8, 8), o))
            )
            for i in range(4)
        ]
        flow = Flow(transforms.CompositeTransform(parts), distributions.StandardNormal((d,)))
        flow._distribution._log_z = flow._distribution._log_z.float()
        return flow
    if peer == "normflows":
        import normflows as nfl

        b = (torch.arange(d) % 2).float()
        flows = [
            nfl.flows.MaskedAffineFlow(b if i % 2 else 1 - b, nfl.nets.MLP([d, 8, 8, d]))
            for i in range(4)
        ]
        return nfl.NormalizingFlow(nfl.distributions.DiagGaussian(d), flows)
    if peer == "zuko":
        import zuko

        return zuko.flows.NICE(
            d, transforms=4, univariate=zuko.transforms.AdditiveTransform, shapes=[()],
            hidden_features=(8, 8),
        )  # fmt: skip
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import NICECouplingBlock

    flow = SequenceINN(d)
    for _ in range(2):
        flow.append(NICECouplingBlock, subnet_constructor=sequential)
    return flow


PEERS = ["nflows", "normflows", "zuko", "FrEIA"]


def log_prob(flow, peer, x):
    if peer == "FrEIA":
        return freia_log_prob(flow, x, "normal")
    return flow().log_prob(x) if peer == "zuko" else flow.log_prob(x)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("peer", PEERS)
def test_flows_of_mlps_take_the_fast_path_and_can_be_saved(peer, accelerated, tmp_path):
    pytest.importorskip(peer)
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    flow, x = stir(nice(peer)), rows(6, torch.float32)
    expected = log_prob(flow, peer, x)
    if accelerated:
        try:
            nf.accelerate(flow)
        except ImportError as missing:
            pytest.skip(str(missing))
    state = torch.get_rng_state()
    converted = convert(flow, "normal" if peer == "FrEIA" else None)
    assert torch.equal(state, torch.get_rng_state())
    same(converted, x, expected)
    with nf.set_backend("auto"):
        assert converted.plan(x).name in ("rows", "kernel", "gemm")
    nf.save(converted, tmp_path / "flow.safetensors")
    assert torch.equal(nf.load(tmp_path / "flow.safetensors").log_prob(x), converted.log_prob(x))


@pytest.mark.parametrize("peer", PEERS)
def test_converted_flows_share_nothing(peer):
    pytest.importorskip(peer)
    flow = stir(nice(peer))
    kept = copy.deepcopy(flow.state_dict())
    converted = convert(flow.eval(), "normal" if peer == "FrEIA" else None)
    assert not converted.training
    own = {p.data_ptr() for p in flow.parameters()}
    assert not own & {p.data_ptr() for p in converted.parameters()}
    converted.log_prob(rows(6, torch.float32)).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())
    with torch.no_grad():
        for p in converted.parameters():
            p.zero_()
    assert all(torch.equal(kept[name], value) for name, value in flow.state_dict().items())


@pytest.mark.parametrize("peer", ["nflows", "normflows", "zuko"])
def test_native_classes(peer):
    """A NICE put together of nicefast's own classes for a library."""
    library = pytest.importorskip(peer)
    module = pytest.importorskip(f"nicefast.compat.{peer}", exc_type=ImportError)
    if not hasattr(module, "Logistic"):
        pytest.skip(f"{peer} has no native classes")
    torch.manual_seed(0)
    p = nf.Partition.alternating(5)
    parts = [module.AdditiveCoupling(q, nf.MLP(len(q.conditioning), (8,), len(q.shifted)))
             for q in (p, ~p, p)] + [module.Scaling(5)]  # fmt: skip
    if peer == "nflows":
        from nflows.flows import Flow
        from nflows.transforms import CompositeTransform

        flow = Flow(CompositeTransform(parts), module.Logistic((5,)))
    elif peer == "normflows":
        flow = library.NormalizingFlow(module.Logistic((5,)), parts[::-1])
    else:
        flow = library.flows.Flow(parts, module.Logistic(5))
    flow, x = stir(flow).double(), rows(5, torch.float64)
    converted = convert(flow)
    assert converted.prior_name == "logistic"
    same(converted, x, log_prob(flow, peer, x))


def test_couplings_without_context_beside_ones_with_it():
    pytest.importorskip("nflows")
    from nflows import distributions, transforms
    from nflows.flows import Flow

    nets = [nf.MLP(2, (8,), 2, context=k) for k in (3, 0)]
    mask, kept = torch.tensor([1, -1, 1, -1]), iter(nets)

    class Deaf(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, context=None):
            return self.net(x)

    parts = [
        transforms.AdditiveCouplingTransform(mask, lambda i, o: next(kept)),
        transforms.AdditiveCouplingTransform(-mask, lambda i, o: Deaf(next(kept))),
    ]
    flow = Flow(transforms.CompositeTransform(parts), distributions.StandardNormal((4,)))
    flow = stir(flow).double()
    x, c = rows(4, torch.float64), rows(3, torch.float64)
    same(convert(flow), x, flow.log_prob(x, c), c)


def test_samples_have_the_distribution():
    """Moments of many draws of both, scaled, shifted and permuted on the way."""
    pytest.importorskip("normflows")
    flow = stir(normflows_flow(4))
    n = 40_000
    torch.manual_seed(3)
    with torch.no_grad():
        theirs = flow.sample(n)[0]
    ours = convert(flow).sample(n, generator=torch.Generator().manual_seed(4))
    spread = theirs.std(0)
    assert ((theirs.mean(0) - ours.mean(0)).abs() < 6 * spread * (2 / n) ** 0.5).all()
    torch.testing.assert_close(ours.std(0), spread, rtol=0.05, atol=0)
    torch.testing.assert_close(torch.corrcoef(ours.T), torch.corrcoef(theirs.T), rtol=0, atol=0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10**6))
def test_any_order_of_steps(d, seed):
    """Random chains of couplings, permutations and affine maps, against their definition."""
    from nicefast.compat.convert import assemble
    from nicefast.compat.steps import Affine, Base, Coupling, Permutation, inverted

    g = torch.Generator().manual_seed(seed)
    steps = []
    for kind in [*torch.randint(3, (9,), generator=g).tolist(), 0]:
        if kind == 1:
            steps.append(Permutation(torch.randperm(d, generator=g)))
        elif kind == 2:
            scale = torch.randn(d, generator=g).double()
            steps.append(Affine(scale, torch.randn(d, generator=g).double()))
        else:
            order = torch.randperm(d, generator=g)
            k = int(torch.randint(1, d, (), generator=g))
            for c, s in ((order[:k], order[k:]), (order[k:], order[:k])):
                net = sequential(len(c), len(s), nn.Tanh).double()
                steps.append(Coupling(c, s, net, (len(c),), sign=1 - 2 * (kind == 0)))
    if seed % 2:
        steps = inverted(steps)
    loc, scale = torch.randn(d, generator=g).double(), torch.rand(d, generator=g).double() + 0.5
    x = rows(d, torch.float64)
    h, log_det = x, 0.0
    for step in steps:
        if isinstance(step, Permutation):
            h = h[:, step.index]
        elif isinstance(step, Affine):
            h, log_det = step.scale * h + step.shift, log_det + step.scale.abs().log().sum()
        else:
            h = h.clone()
            h[:, step.shifted] += step.sign * step.conditioner(h[:, step.conditioning])
    expected = torch.distributions.Normal(loc, scale).log_prob(h).sum(1) + log_det
    made = assemble(steps, Base("normal", loc, scale), (d,), x)
    torch.testing.assert_close(made.log_prob(x), expected, rtol=1e-7, atol=1e-7)


class Ignoring(nn.Sequential):
    def forward(self, x, context=None):
        return super().forward(x)


def test_classes_of_the_user_are_seen_as_sequential_where_named():
    pytest.importorskip("nflows")
    flow = stir(nice("nflows", net=lambda i, o: Ignoring(*sequential(i, o)))).eval()
    x = rows(6, torch.float32)
    assert convert(flow).plan(x).name == "layers"
    fast = convert(flow, sequential=Ignoring)
    assert type(fast.couplings[0].conditioner) is nf.MLP
    for converted in (convert(flow), fast):
        same(converted, x, flow.log_prob(x))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU, "relu"), (nn.LeakyReLU, "leaky_relu"), (nn.Tanh, "tanh"), (nn.GELU, "gelu"),
        (nn.SiLU, "silu"), (nn.ELU, "elu"), (lambda: nn.LeakyReLU(0.2), None), (nn.Softplus, None),
        (lambda: nn.GELU("tanh"), None), (lambda: nn.ELU(0.5), None),
        (lambda: nn.Sequential(nn.ReLU(), nn.Identity(), nn.Dropout().eval()), "relu"),
        (lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), None),
    ],
)  # fmt: skip
def test_conditioners(activation, name):
    pytest.importorskip("FrEIA")
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import LearnedElementwiseScaling, NICECouplingBlock

    flow = SequenceINN(5)
    for _ in range(2):
        flow.append(LearnedElementwiseScaling)
        flow.append(
            NICECouplingBlock, subnet_constructor=lambda i, o: sequential(i, o, activation, (8, 8))
        )
    flow, x = stir(flow).double(), rows(5, torch.float64)
    converted = convert(flow, "normal")
    same(converted, x, freia_log_prob(flow, x, "normal"))
    for coupling in converted.couplings:
        net = coupling.conditioner
        assert (type(net) is nf.MLP) == (name is not None)
        assert name is None or net.activation == name


def test_what_cannot_be_converted_says_where_and_why():
    nfl = pytest.importorskip("normflows")
    zuko = pytest.importorskip("zuko")
    pytest.importorskip("nflows")
    pytest.importorskip("FrEIA")
    from nflows.flows import SimpleRealNVP

    with pytest.raises(TypeError, match=r"flow must be a torch.nn.Module"):
        convert(torch.zeros(2))
    with pytest.raises(ValueError, match="flow must be one of nflows's Flow"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"_transforms.0, a AffineCouplingTransform"):
        convert(SimpleRealNVP(4, 8, 2, 1))
    with pytest.raises(ValueError, match="not additive"):
        convert(zuko.flows.NICE(4))
    flow = normflows_flow(4)
    with pytest.raises(ValueError, match=r"flows.1, a Planar"):
        convert(nfl.NormalizingFlow(flow.q0, [flow.flows[0], nfl.flows.Planar((4,))]))
    hooked = normflows_flow(4)
    hooked.flows[3].register_forward_hook(print)
    with pytest.raises(ValueError, match=r"flows.3, .*modules with hooks are not"):
        convert(hooked)
    with pytest.raises(ValueError, match="has not been initialised"):
        convert(nfl.NormalizingFlow(flow.q0, [nfl.flows.ActNorm((4,))]))
    with pytest.raises(ValueError, match="no additive coupling"):
        convert(nfl.NormalizingFlow(flow.q0, [nfl.flows.AffineConstFlow((4,))]))
    with pytest.raises(ValueError, match="q0, a GaussianMixture"):
        convert(nfl.NormalizingFlow(nfl.distributions.GaussianMixture(2, 4), [flow.flows[0]]))
    with pytest.raises(ValueError, match="prior must be given"):
        convert(freia_flow((4,), sequential))
    with pytest.raises(ValueError, match="prior must be None"):
        convert(flow, "normal")
    with pytest.raises(ValueError, match="feature 0 is moved by a constant"):
        convert(stir(nfl.NormalizingFlow(flow.q0, [flow.flows[0]])))


# --- contexts that conditioners do not show


class Optional(nn.Module):
    """Works without a context, and gives another shift with one."""

    def __init__(self, i, o, k=3):
        super().__init__()
        self.first, self.second = nn.Linear(i, o), nn.Linear(k, o)

    def forward(self, x, context=None):
        shift = torch.tanh(self.first(x))
        return shift if context is None else shift + self.second(context)


class Required(Optional):
    def forward(self, x, context):
        return self.first(x) + self.second(context)


class Unmoved(Optional):
    def forward(self, x, context=None):
        return torch.tanh(self.first(x))


def nflows_of(*nets):
    from nflows import distributions, transforms
    from nflows.flows import Flow

    mask, torch_seed = torch.tensor([1, -1, 1, -1]), torch.manual_seed(0)
    assert torch_seed is not None
    parts = [
        transforms.AdditiveCouplingTransform(mask * (-1) ** i, net) for i, net in enumerate(nets)
    ]
    flow = Flow(transforms.CompositeTransform(parts), distributions.StandardNormal((4,)))
    flow = stir(flow).double().eval()
    flow._distribution._log_z = flow._distribution._log_z.double()
    return flow


@pytest.mark.parametrize("own", [Optional, Required, Unmoved])
@pytest.mark.parametrize("accelerated", [False, True])
def test_every_conditioner_gets_the_context_beside_one_that_shows_it(own, accelerated):
    pytest.importorskip("nflows")
    from nflows.nn.nets import ResidualNet

    known = lambda i, o: ResidualNet(i, o, 5, context_features=3, num_blocks=1)  # noqa: E731
    flow = nflows_of(known, own, lambda i, o: nf.MLP(i, (4,), o, context=3), own)
    x, c = rows(4, torch.float64), rows(3, torch.float64)
    expected = flow.log_prob(x, c)
    if accelerated:
        nf.accelerate(flow)
    converted = convert(flow)
    assert converted.context == 3
    same(converted, x, expected, c)
    with pytest.raises(ValueError, match="context=2"):
        convert(flow, context=2)


def test_a_context_that_no_conditioner_shows_has_to_be_given():
    pytest.importorskip("nflows")
    x, c = rows(4, torch.float64), rows(3, torch.float64)
    for own in (Optional, Required):
        flow = nflows_of(own, Unmoved)
        with pytest.raises(ValueError, match=rf"a {own.__name__}, takes a context .* context="):
            convert(flow)
        same(convert(flow, context=3), x, flow.log_prob(x, c), c)
    flow = nflows_of(Optional, Unmoved)
    same(convert(flow, context=0), x, flow.log_prob(x))
    flow = nflows_of(Unmoved, Unmoved)
    same(convert(flow), x, flow.log_prob(x))
    with pytest.raises(ValueError, match="context must be an integer >= 0, got -1"):
        convert(flow, context=-1)
    with pytest.raises(TypeError, match="integer"):
        convert(flow, context="3")


def test_looking_for_a_context_leaves_no_trace():
    pytest.importorskip("nflows")

    class Noisy(Unmoved):
        def __init__(self, i, o):
            super().__init__(i, o)
            self.norm = nn.BatchNorm1d(o)

        def forward(self, x, context=None):
            torch.rand(3)
            return self.norm(super().forward(x))

    flow = nflows_of(Noisy, Noisy).train()
    state, kept = torch.get_rng_state(), copy.deepcopy(flow.state_dict())
    convert(flow)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(kept[name], t) for name, t in flow.state_dict().items())


def test_couplings_that_the_library_could_not_call_with_one_context_are_refused():
    pytest.importorskip("nflows")
    from nflows import distributions, transforms
    from nflows.flows import Flow
    from nflows.nn.nets import ConvResidualNet, ResidualNet

    nets = [lambda i, o, k=k: ResidualNet(i, o, 5, context_features=k) for k in (3, None)]
    with pytest.raises(ValueError, match=r"contexts of \[0, 3\] features"):
        convert(nflows_of(*nets))
    coupling = transforms.AdditiveCouplingTransform(
        [1, 0], lambda i, o: ConvResidualNet(i, o, 4, context_channels=2)
    )
    with pytest.raises(ValueError, match="has a context of images"):
        convert(Flow(coupling, distributions.StandardNormal((2, 3, 3))))


@pytest.mark.parametrize("peer", ["nflows", "zuko", "FrEIA"])
def test_native_couplings_hand_the_context_to_conditioners_of_any_kind(peer):
    pytest.importorskip(peer)
    import importlib

    module = importlib.import_module(f"nicefast.compat.{peer.lower()}")
    torch.manual_seed(0)
    p = nf.Partition.alternating(4)
    nets = [nf.MLP(2, (5,), 2, context=3), Optional(2, 2), Optional(2, 2)]
    x, c = rows(4, torch.float64), rows(3, torch.float64)
    if peer == "FrEIA":
        from FrEIA.framework import SequenceINN

        flow = SequenceINN(4)
        for i, net in enumerate(nets):
            cond = {"cond": 0, "cond_shape": (3,)} if i < 2 else {}  # the last one gets none
            flow.append(module.AdditiveCoupling, partition=p, conditioner=net, **cond)
            p = ~p
        flow = stir(flow).double()
        expected = freia_log_prob(flow, x, "logistic", c)
        same(convert(flow, "logistic"), x, expected, c)
        return
    parts = [module.AdditiveCoupling(q, net) for q, net in zip((p, ~p, p), nets, strict=True)]
    if peer == "nflows":
        from nflows.flows import Flow
        from nflows.transforms import CompositeTransform

        flow = stir(Flow(CompositeTransform(parts), module.Logistic((4,)))).double()
        expected = flow.log_prob(x, c)
    else:
        from zuko.lazy import Flow

        flow = stir(Flow(parts, module.Logistic(4))).double()
        expected = flow(c).log_prob(x)
    same(convert(flow), x, expected, c)


@pytest.mark.parametrize("context", [0, 3])
def test_zuko_hypers_of_any_kind(context):
    zuko = pytest.importorskip("zuko")

    class Squared(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.inner = nn.Linear(i, o)

        def forward(self, x):
            return self.inner(x).square()

    options = {"univariate": zuko.transforms.AdditiveTransform, "shapes": [()]}
    x = rows(6, torch.float64)
    c = rows(context, torch.float64) if context else None
    for nets in ((sequential, sequential), (sequential, Squared), (Squared, Squared)):
        flow = zuko.flows.NICE(6, context, transforms=2, hidden_features=(4,), **options)
        for coupling, net in zip(flow.transform.transforms, nets, strict=True):
            coupling.hyper = net(3 + context, 3)
        flow = stir(flow).double()
        if nets[0] is Squared and context:
            with pytest.raises(ValueError, match="a Squared, takes a context"):
                convert(flow)
            converted = convert(flow, context=context)
        else:
            converted = convert(flow)
        same(converted, x, flow(c).log_prob(x), c)
    flow.transform.transforms[0].hyper = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="has a hyper of 2 inputs, and 3 condition"):
        convert(flow)
    flow.transform.transforms[0].shapes = [(1,)]
    with pytest.raises(ValueError, match="is not additive"):
        convert(flow)


def test_parts_of_a_block_and_methods_of_an_instance_are_looked_at():
    nfl = pytest.importorskip("normflows")

    def block():
        net = nfl.nets.MLP([2, 4, 2])
        return nfl.flows.AffineCouplingBlock(net, scale=False)

    def hooked(part):
        part.flows[1].register_forward_hook(lambda module, given, found: found)

    def overridden(part):
        part.flows[1].inverse = part.flows[1].inverse

    def merged(part):
        part.flows[2].mode = "channel_inv"

    def longer(part):
        part.flows.append(nfl.flows.Permute(4))

    def method(part):
        part.inverse = part.inverse

    for change in (hooked, overridden, merged, longer, method):
        flow = nfl.NormalizingFlow(nfl.distributions.DiagGaussian(4), [block(), block()])
        change(flow.flows[1])
        with pytest.raises(ValueError, match=r"flows.1, a AffineCouplingBlock"):
            convert(flow)
