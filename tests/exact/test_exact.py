"""The exact mode: bits of the inverse, of gradients, of every batch; its range; its cells."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nicefast as nf
from nicefast.evaluation import CellDensity, evaluate
from nicefast.exact import arithmetic as exact
from nicefast.exact.grid import round_to_grid
from nicefast.preprocessing import Preprocessing
from nicefast.reference import ACTIVATIONS

GRID = 2.0**-16
POLICIES = ("highest", "high", "medium", "bf16")


def make(features=7, weights="random", device="cpu", **options):
    torch.manual_seed(options.get("couplings", 3))
    model = nf.NICE(features, **{"hidden": (16, 9), "couplings": 3, "grid": GRID, **options})
    with torch.no_grad():
        model.scaling.log_scale.normal_(0, 0.5)
        if weights == "random" and len(model.couplings) <= 10:
            for coupling in model.couplings:
                coupling.conditioner.linears[-1].reset_parameters()
        if weights == "doubled":
            for p in model.couplings.parameters():
                p.mul_(2)
    return model.to(device)


def rounded(x, grid=GRID):
    return torch.round(x / grid) * grid


def same_bits(a, b):
    """Equal in every bit: -0 is not 0."""
    assert a.dtype == b.dtype
    integer = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(integer), (b + 0.0).contiguous().view(integer)
    )


class policy:
    """A precision policy, for everything in the block."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = torch.get_float32_matmul_precision()
        self.cast = torch.autocast("cpu", torch.bfloat16, enabled=self.name == "bf16")
        torch.set_float32_matmul_precision("highest" if self.name == "bf16" else self.name)
        self.cast.__enter__()

    def __exit__(self, *error):
        self.cast.__exit__(*error)
        torch.set_float32_matmul_precision(self.before)


# the inverse ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["initial", "random", "doubled"])
@pytest.mark.parametrize("couplings", [4, 100, pytest.param(1000, marks=pytest.mark.long)])
def test_the_inverse_is_the_inverse(couplings, weights):
    model = make(6, weights, couplings=couplings)
    x = torch.randn(33, 6)
    z, log_det = model(x)  # records, or not, as it comes
    assert not torch.equal(z, rounded(x))
    assert torch.equal(log_det, torch.zeros(33))
    back, log_det = model.inverse(z.detach())
    assert same_bits(back, rounded(x))
    assert torch.equal(log_det, torch.zeros(33))
    with torch.no_grad():
        assert torch.equal(model(x)[0], z)


def test_the_inverse_of_a_trained_flow():
    model = make(2, couplings=6, hidden=(32,))
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    x = torch.randn(256, 2) * torch.tensor([1.0, 0.1]) + 0.5
    losses = []
    for _ in range(60):
        loss = -model.log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert same_bits(model.inverse(model(x)[0])[0].detach(), rounded(x))


@settings(max_examples=40, deadline=None)
@given(
    features=st.integers(2, 9),
    hidden=st.lists(st.integers(1, 20), max_size=3),
    couplings=st.integers(1, 5),
    partition=st.sampled_from(["half", "alternating", "random"]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    context=st.integers(0, 3),
    exponent=st.integers(-18, 2),
    policies=st.tuples(st.sampled_from(POLICIES), st.sampled_from(POLICIES)),
    wide=st.booleans(),
    cut=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_every_split_policy_and_architecture(
    features, hidden, couplings, partition, activation, context, exponent, policies, wide, cut, seed
):
    torch.manual_seed(seed)
    model = nf.NICE(
        features,
        hidden=hidden,
        couplings=couplings,
        partition=partition,
        activation=activation,
        context=context,
        grid=2.0**exponent,
    )
    with torch.no_grad():
        for p in model.couplings.parameters():  # within the finest grid's range, +-64
            p.uniform_(-1, 1).div_(p.shape[-1] ** 0.5)
    x = torch.randn(11, features, dtype=torch.float64 if wide else torch.float32)
    c = torch.randn(11, context) if context else None
    with policy(policies[0]), torch.no_grad():
        z, _ = model(x, c)
    assert z.dtype == x.dtype
    with policy(policies[1]), torch.no_grad():
        for start in range(0, 11, cut):
            rows = slice(start, start + cut)
            own = None if c is None else c[rows]
            assert same_bits(model.inverse(z[rows], own)[0], rounded(x[rows], model.grid))
            assert torch.equal(model(x[rows], own)[0], z[rows])


def test_threads_strides_and_empty_batches():
    model = make(20, hidden=(300,))
    x = torch.randn(3000, 20)
    with torch.no_grad():
        z, _ = model(x)
        before = torch.get_num_threads()
        torch.set_num_threads(3 - min(before, 2))
        try:
            assert torch.equal(model(x)[0], z)
        finally:
            torch.set_num_threads(before)
        for given_ in (x.t().contiguous().t(), torch.cat((x, x), 1)[:, :20], x.flip(0).flip(0)):
            assert torch.equal(model(given_)[0], z)
        assert torch.equal(model(x.view(30, 100, 20))[0], z.view(30, 100, 20))
        assert model(x[:0])[0].shape == (0, 20)
        assert model.inverse(x[:0])[0].shape == (0, 20)
        assert model.log_prob(x[:0]).shape == (0,)
    with pytest.raises(AssertionError):
        assert same_bits(torch.tensor([-0.0]), torch.tensor([0.0]))
    back = model.inverse(model(torch.full((1, 20), -1e-9))[0])[0]
    assert same_bits(back.detach(), torch.zeros(1, 20))


def test_the_kernels_backend_changes_no_bit(device):
    pytest.importorskip("triton", reason="needs Triton")
    model, x = make(6, couplings=50), torch.randn(9, 6)
    with torch.no_grad():
        z, _ = model(x)
        moved = copy.deepcopy(model).to(device)
        with nf.set_backend("triton"):
            there, _ = moved(x.to(device))
            back, _ = moved.inverse(there)
            near = moved.log_prob(x.to(device))
        assert torch.equal(there.cpu(), z)
        assert same_bits(back.cpu(), rounded(x))
        assert torch.allclose(near.cpu(), model.log_prob(x), atol=1e-4)


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("context", [0, 2])
def test_log_prob_is_what_it_was(prior, context):
    plain = make(8, prior=prior, context=context, couplings=8, grid=None)
    model = plain.with_grid(GRID)
    assert plain.grid is None
    x = torch.randn(200, 8)
    c = torch.randn(200, context) if context else None
    with torch.no_grad():
        gap = (model.log_prob(x, c) - plain.log_prob(x, c)).abs().max() / 8
        assert 0 < gap < 1e-4
        z, _ = model(x, c)
        assert torch.allclose(model.prior.log_prob(z).sum(-1), model.log_prob(x, c), 1e-5, 1e-4)
        back = model.with_grid(None)
        assert torch.equal(back.log_prob(x, c), plain.log_prob(x, c))


def test_features_of_very_different_scales():
    plain = make(6, grid=None)
    scales = torch.tensor([1e4, 1e-3, 1.0, 1e3, 1e-2, 1.0])
    with torch.no_grad():
        for coupling in plain.couplings:
            sizes = scales[coupling.partition.conditioning]
            coupling.conditioner.linears[0].weight.div_(sizes)
            coupling.conditioner.linears[-1].weight.mul_(
                scales[coupling.partition.shifted][:, None]
            )
            coupling.conditioner.linears[-1].bias.zero_()
        x = torch.randn(50, 6).double() * scales
        want, _ = copy.deepcopy(plain).double()(x)
        got, _ = plain.with_grid(2.0**-30)(x)
        relative = (got / (want / plain.scaling.log_scale.exp()) - 1).abs()
        assert relative.max() < 1e-4


def test_samples_lie_on_the_grid():
    model = make((2, 4), prior="normal")
    x, log_prob = model.sample_and_log_prob(50)
    assert torch.equal(x, rounded(x))
    assert torch.allclose(log_prob, model.log_prob(x), atol=1e-5)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    samples = [
        model.sample(20, batch_size=b, generator=g)
        for b, g in zip((None, 3), generators, strict=True)
    ]
    assert torch.equal(*samples)
    assert torch.equal(samples[0], rounded(samples[0]))
    plain = model.with_grid(None).sample(20, generator=torch.Generator().manual_seed(1))
    assert (plain - samples[0]).abs().max() < 1e-3
    assert model.prior.batch_shape == (2, 4)
    assert torch.equal(model.distribution().rsample((3,)).detach() % GRID, torch.zeros(3, 2, 4))


def test_files_and_copies(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    model = make(5)
    nf.save(model, tmp_path / "flow.safetensors")
    loaded = nf.load(tmp_path / "flow.safetensors")
    assert loaded.grid == GRID
    x = torch.randn(9, 5)
    assert torch.equal(loaded(x)[0], model(x)[0])
    assert "grid=1.52588e-05" in repr(model)
    assert "exact: a grid of 1.52588e-05; products of integers" in model.explain(10)
    with torch.no_grad():
        model.couplings[0].conditioner.linears[0].weight.add_(1)
    assert not torch.equal(loaded(x)[0], model(x)[0])
    with pytest.raises(AttributeError):
        model.grid = 1.0


# bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "error"),
    [
        *((value, ValueError) for value in (0.3, 3, 0, -0.5, math.inf, math.nan, 2.0**-101)),
        *((value, TypeError) for value in ("1", True, torch.tensor(1.0))),
    ],
)
def test_a_grid_is_a_power_of_two(grid, error):
    with pytest.raises(error, match="grid must be a"):
        make(grid=grid)
    with pytest.raises(error, match="grid must be a"):
        make(grid=None).with_grid(grid)
    with pytest.raises(error, match="grid must be a"):
        nf.AdditiveCoupling(nf.Partition.half(2), nf.MLP(1, (2,), 1), grid=grid)


def test_the_range_is_kept():
    model = make(5)
    x = torch.randn(6, 5)
    x[4, 2] = 200.0
    assert same_bits(model.inverse(model(x)[0])[0].detach(), rounded(x))
    x[4, 2] = 2.0**24 * GRID + 1
    for call in (model, model.log_prob, model.cell_log_prob):
        with pytest.raises(ValueError, match=r"^x: row 4 has the value 257 in feature 2, outside"):
            call(x)
    with pytest.raises(ValueError, match=r"^z: row 4 has the value 257"):
        model.inverse(x)
    assert model(x.double())[0].isfinite().all()  # float64 has 2^53 steps
    x[4, 2] = math.inf
    with pytest.raises(ValueError, match=r"^x: row 4 has the value inf"):
        model(x)
    with torch.no_grad():
        model.couplings[1].conditioner.linears[-1].bias[1] = 300.0
    with pytest.raises(
        ValueError, match=r"^coupling 1: row 0 has the value (299|30\d).* in feature 2"
    ):
        model(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"^coupling 1: row 0 has the value -\d+.* in feature 2"):
        model.inverse(torch.zeros(2, 5))
    with torch.no_grad():
        model.couplings[1].conditioner.linears[-1].bias[1] = math.nan
    with pytest.raises(ValueError, match=r"^coupling 1: row 0 has the value nan in feature 2"):
        model(torch.zeros(2, 5))


def test_nan_stays_in_its_row():
    model, x = make(5), torch.randn(4, 5)
    with torch.no_grad():
        want, _ = model(x)
        x[1, 0] = math.nan
        z, _ = model(x)
        assert z[1].isnan().any()
        assert torch.equal(z[[0, 2, 3]], want[[0, 2, 3]])
        log_prob = model.log_prob(x)
        assert log_prob.isnan().tolist() == [False, True, False, False]


# gradients --------------------------------------------------------------------------------------


def gradients(model, x, context, stored, inverse=False):
    """Of everything, with activations rebuilt or stored, at random cotangents."""
    leaves = [t.clone().requires_grad_() for t in (x, context) if t is not None]
    if stored:
        h = round_to_grid(leaves[0], model.grid)
        for coupling in reversed(model.couplings) if inverse else model.couplings:
            h, _ = (coupling.inverse if inverse else coupling)(h, *leaves[1:])
    else:
        h, _ = (model.inverse if inverse else model)(leaves[0], *leaves[1:])
    torch.manual_seed(0)
    cotangent = torch.randn_like(h)
    return torch.autograd.grad(h, [*leaves, *model.couplings.parameters()], cotangent)


@pytest.mark.parametrize("cast", ["highest", "bf16"])
@pytest.mark.parametrize(
    ("couplings", "partition", "context", "inverse"),
    [(256, "alternating", 0, False), (5, "random", 3, True), (4, "half", 2, False)],
)
def test_rebuilt_gradients_have_the_bits_of_stored_ones(
    couplings, partition, context, inverse, cast
):
    model = make(9, couplings=couplings, partition=partition, context=context, hidden=(24,))
    x, c = torch.randn(70, 9), torch.randn(70, context) if context else None
    with policy(cast):
        rebuilt = gradients(model, x, c, False, inverse)
        stored = gradients(model, x, c, True, inverse)
    assert all(torch.equal(a, b) for a, b in zip(rebuilt, stored, strict=True))
    plain = copy.deepcopy(model.with_grid(None)).double()
    with torch.no_grad():
        plain.scaling.log_scale.zero_()
    wanted = gradients_of_plain(plain, x, c, inverse)
    limit = 0.1  # relu flips, of 256 couplings
    for a, b in zip(rebuilt, wanted, strict=True):
        assert (a - b).norm() <= limit * b.norm() + 1e-4


def gradients_of_plain(model, x, context, inverse):
    leaves = [t.double().requires_grad_() for t in (x, context) if t is not None]
    h, _ = (model.inverse if inverse else model)(*leaves)
    torch.manual_seed(0)
    cotangent = torch.randn_like(h.float()).double()
    return torch.autograd.grad(h, [*leaves, *model.couplings.parameters()], cotangent)


def test_memory_is_constant_in_depth():
    saved = []
    for couplings in (4, 256):
        model, seen = make(8, couplings=couplings), []
        own = {p.data_ptr() for p in model.parameters()}

        def keep(t, seen=seen, own=own):
            if t.data_ptr() not in own:
                seen.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model.log_prob(torch.randn(100, 8)).sum()
        loss.backward()
        saved.append(sum(seen))
    assert 0 < saved[0] == saved[1]


def test_one_conditioner_for_all_couplings():
    model = make(8, couplings=6)
    for coupling in model.couplings:
        coupling.conditioner = model.couplings[0].conditioner
    x = torch.randn(20, 8)
    rebuilt, stored = (gradients(model, x, None, s) for s in (False, True))
    for a, b in zip(rebuilt, stored, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
    frozen = model.couplings[0].conditioner.linears[0].weight.requires_grad_(False)
    model.log_prob(x).sum().backward()
    assert frozen.grad is None
    assert model.couplings[0].conditioner.linears[1].weight.grad.abs().sum() > 0


def test_parameters_written_over_before_the_gradient():
    model = make(4)
    loss = model.log_prob(torch.randn(5, 4)).sum()
    with torch.no_grad():
        model.couplings[0].conditioner.linears[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation):
    x = torch.cat((torch.linspace(-30, 30, 1001), torch.tensor([-1e3, 1e3, 1e-6])))
    one, nought = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = []
    for call in (
        lambda x: exact.mlp([(one, nought), (one, nought)], activation, x),
        ACTIVATIONS[activation],
    ):
        leaf = x.double()[:, None].requires_grad_()
        y = call(leaf)
        found.append((y, *torch.autograd.grad(y.sum(), leaf)))
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


# conditioners of other kinds ----------------------------------------------------------------------


class Odd(torch.nn.Module):
    """A conditioner whose inside is not known."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.product, self.calls = torch.nn.Linear(inputs, outputs), []

    def forward(self, x, context=None):
        self.calls.append(len(x))
        return torch.sin(self.product(x if context is None else x + context))


def test_other_conditioners_see_one_row_at_a_time():
    model = make(8, couplings=5)
    for coupling in model.couplings:
        coupling.conditioner = Odd(4, 4)
    x = torch.randn(23, 8)
    z, _ = model(x)
    assert set(model.couplings[0].conditioner.calls) == {1}
    assert "one row at a time, since coupling 0 has a Odd" in model.explain()
    pieces = torch.cat([model.inverse(part)[0] for part in z.detach().split(5)])
    assert same_bits(pieces.detach(), rounded(x))
    loss = model.log_prob(x).sum()
    loss.backward()
    assert model.couplings[0].conditioner.product.weight.grad.abs().sum() > 0
    assert model(x[:0])[0].shape == (0, 8)


def test_a_coupling_that_was_put_in_needs_the_grid():
    model, x = make(8), torch.randn(4, 8)
    model.couplings[1] = nf.AdditiveCoupling(model.couplings[1].partition, Odd(4, 4))
    with pytest.raises(ValueError, match=r"^coupling 1 must have the grid 1\.52588e-05, got None"):
        model(x)
    model.couplings[1].grid = GRID
    assert same_bits(model.inverse(model(x)[0])[0].detach(), rounded(x))


def test_hooks_are_called_and_dropout_drops():
    model, x, seen = make(8), torch.randn(4, 8), []
    model.couplings[1].register_forward_hook(lambda *a: seen.append(1))
    model.couplings[2].conditioner.register_forward_hook(lambda *a: seen.append(2))
    z, _ = model(x)
    assert seen == [1, 2, 2, 2, 2]
    assert same_bits(model.inverse(z)[0].detach(), rounded(x))
    model = make(8, dropout=0.5, hidden=(64,))
    x = torch.randn(50, 8)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert same_bits(model.inverse(model(x)[0])[0].detach(), rounded(x))


def test_a_compiled_flow_has_the_same_bits():
    model, x, seen = make(6, activation="gelu"), torch.randn(5, 6), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        want, _ = model(x)
        assert torch.equal(torch.compile(model, backend=backend)(x)[0], want)
    # a compiler may fuse a product with a sum: it sees none
    assert "round_" in seen
    assert not {"matmul", "frexp", "exp", "<built-in function matmul>"} & {*seen}


def test_a_coupling_of_its_own():
    coupling = nf.AdditiveCoupling(nf.Partition.half(4), nf.MLP(2, (8,), 2), grid=0.25)
    x = torch.randn(2, 3, 4)
    y, log_det = coupling(x)
    assert log_det.shape == (2, 3)
    assert torch.equal(y, rounded(y, 0.25))
    assert torch.equal(coupling.inverse(y)[0], rounded(x, 0.25))
    with torch.no_grad():
        assert torch.equal(coupling.inverse_(y.detach().clone()), rounded(x, 0.25))
    with pytest.raises(ValueError, match=r"^coupling: row 0 has the value"):
        coupling(x * 1e9)


# arithmetic ---------------------------------------------------------------------------------------


def test_products_are_sums_of_integers():
    torch.manual_seed(0)
    h, w = torch.randn(4, 300) * 10.0 ** torch.randint(-6, 6, (300,)), torch.randn(5, 300)
    operand = exact.Operand.of(w)
    got = operand.times(h)
    for i, j in ((0, 0), (3, 4)):
        pairs = zip(h[i].tolist(), operand.columns.tolist(), strict=True)
        wide = [Fraction(a) * Fraction(b) for a, b in pairs]
        step = Fraction(2) ** (math.frexp(float(max(map(abs, wide))))[1] - operand.bits)
        weights = map(Fraction, operand.weight[:, j].tolist())
        total = sum(round(a / step) * step * b for a, b in zip(wide, weights, strict=True))
        assert Fraction(got[i, j].item()) == total
    order = torch.randperm(300)
    shuffled = exact.Operand.of(w[:, order]).times(h[:, order])
    assert torch.equal(shuffled, got)
    want = h.double() @ w.double().t()
    assert ((got - want).abs() / (h.double().abs() @ w.double().abs().t())).max() < 1e-5


def test_weights_of_nought_do_not_count():
    w = torch.randn(3, 4)
    w[:, 2] = 0
    h = torch.randn(5, 4)
    h[:, 2] = 1e30
    got = exact.Operand.of(w).times(h)
    want = (h * (w != 0).any(0)).double() @ w.double().t()
    assert torch.allclose(got, want, atol=1e-5)
    assert exact.Operand.of(torch.zeros(2, 3)).times(torch.ones(1, 3)).abs().sum() == 0
    huge = exact.Operand.of(torch.full((1, 1), 1e300, dtype=torch.float64))
    assert huge.times(torch.ones(1, 1)).isnan().all()


# cells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("grid", [2.0**-20, 0.25, 8.0])
def test_cells_are_differences_of_the_distribution_function(prior, grid):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60

    def cdf(z):
        return 1 / (1 + mpmath.exp(-z)) if prior == "logistic" else mpmath.ncdf(z)

    log_scale = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    for h in (-20.0, -1.5, 0.0, 0.75, 6.0, 300.0):
        values = torch.full((3,), h, dtype=torch.float64)
        for d in range(3):
            s, at, half = (mpmath.mpf(v) for v in (log_scale[d].exp().item(), h, grid / 2))
            if abs(s * at) > 1e3 and prior == "normal":
                continue
            lower, upper = cdf(-abs(s * at) - s * half), cdf(-abs(s * at) + s * half)
            want = float(mpmath.log(upper - lower))
            got = nf.functional.cell_log_prob(values[d : d + 1], log_scale[d : d + 1], grid, prior)
            assert got.item() == pytest.approx(want, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_cells_add_up_to_one(prior):
    model = make(2, prior=prior, grid=0.25, couplings=4)
    with torch.no_grad():
        model.scaling.log_scale.fill_(0.5)
        line = torch.arange(-30, 30, 0.25)
        total = model.cell_log_prob(torch.cartesian_prod(line, line)).double().exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-4)
        x = torch.tensor([[0.3, -0.4]])
        assert torch.equal(
            model.cell_log_prob(x), model.cell_log_prob(torch.tensor([[0.25, -0.5]]))
        )
        far = model.cell_log_prob(torch.tensor([[4e5, -4e5]]))
        assert far.isfinite().all()
    with pytest.raises(ValueError, match="cell_log_prob needs a grid"):
        model.with_grid(None).cell_log_prob(x)
    with pytest.raises(ValueError, match="grid must be positive"):
        nf.functional.cell_log_prob(x, torch.zeros(2), 0.0)
    with pytest.raises(TypeError, match="grid must be a number, got 'a'"):
        nf.functional.cell_log_prob(x, torch.zeros(2), "a")
    with pytest.raises(ValueError, match="log_scale"):
        nf.functional.cell_log_prob(x, torch.zeros(3), 1.0)


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_gradients_of_cells(prior):
    h = (torch.randn(6, 3, dtype=torch.float64) * 3).requires_grad_()
    log_scale = torch.tensor([-12.0, 0.0, 1.0], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, s: nf.functional.cell_log_prob(h, s, 0.5, prior), (h, log_scale)
    )


def test_the_density_of_cells():
    model = make(2, grid=0.25, couplings=2)
    density = CellDensity(model)
    line = torch.arange(-20, 20, 0.125) + 0.01
    points = torch.cartesian_prod(line, line)
    with torch.no_grad():
        mass = density.log_prob(points).double().exp().sum() * 0.125**2
    assert mass.item() == pytest.approx(1, abs=1e-3)
    levels = torch.randint(0, 4, (40, 2), dtype=torch.uint8)
    steps = Preprocessing.fit(["dequantise"], levels, 4)
    scores = [evaluate(density, levels, steps, draws=3, seed=seed) for seed in (1, 2)]
    assert scores[0].log_prob == scores[1].log_prob
    assert scores[0].draw_spread < 1e-12
    bits = -model.cell_log_prob(levels.float() / 4).double().mean().item() / (2 * math.log(2))
    assert scores[0].bits_per_dim == pytest.approx(bits, rel=1e-6)
    with pytest.raises(ValueError, match="model must have a grid"):
        CellDensity(model.with_grid(None))


def test_what_is_rebuilt_is_said():
    model = make(4)
    x = torch.randn(3, 4)
    node = model.plan(x).engine.couple(rounded(x)).grad_fn
    assert type(node).__name__ == "_RebuiltBackward"
    log_prob = model.log_prob(x.requires_grad_()).sum()
    (g,) = torch.autograd.grad(log_prob, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_the_benchmark_of_exactness(tmp_path, monkeypatch, capsys):
    from bench import exactness
    from bench.providers import Shape

    monkeypatch.setattr(exactness, "DEPTHS", (2, 40))
    monkeypatch.setattr(exactness, "SHAPES", (Shape(6, (8,), 30),))
    out = tmp_path / "exact.md"
    assert exactness.main(["--rounds", "1", "--seconds", "0", "--out", str(out)]) == 0
    rows = [line for line in out.read_text().splitlines() if line.startswith("|")]
    assert rows[3] == "| PyTorch's initial weights | exact | 0 | 0 |"
    assert rows[-1].count("->") == 3
    assert out.read_text() == capsys.readouterr().out
    assert exactness.main(["--rounds", "0"]) == 2
