"""The whole-flow kernels against the definition in float64, row by row and bit by bit."""

import math
from itertools import pairwise
from unittest import mock

import pytest
import torch

import nicefast as nf
from helpers import Operators, assert_three_way, error, partitions, strided

pytest.importorskip("triton", reason="needs Triton")

from nicefast.kernels import INTERPRETED, flow, flow_resident
from nicefast.kernels.flow import flow_fwd, flow_inv, flow_sample
from nicefast.kernels.flow_tile import FlowShape, FlowTile, Side, flow_tile
from nicefast.kernels.packing import lay_out, pack

R = nf.reference
PRIORS = list(R.PRIORS)
#: bf16 is wrong in Triton's interpreter, so it is met on a GPU only
PRECISIONS = ["fp32", "tf32", pytest.param("bf16", marks=pytest.mark.gpu)]
ROWS = 16  # of a tile in the interpreter


def to_tf32(x):
    bits = (x.float().view(torch.int32) + 0x1000) & -0x2000
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


ROUND = {"fp32": lambda x: x, "tf32": to_tf32, "bf16": lambda x: x.bfloat16().float()}


def arch():
    if not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


# relu gives exact zeros and gelu does not; the others take long, and --all has them
FEW = [
    a if a in ("relu", "gelu") else pytest.param(a, marks=pytest.mark.long) for a in R.ACTIVATIONS
]


@pytest.fixture(params=["masked", "resident"], autouse=True)
def kind(request, monkeypatch):
    """Each test is of both kernels: of one whose products are masked, and of one that keeps all
    weights on the chip, which serves small flows without products of three parts."""
    if request.param == "resident":
        asked = getattr(request.node, "callspec", None)
        asked = asked.params if asked else {}
        hidden = asked.get("hidden", ())
        wide = asked.get("d", 0) > 32 or max(hidden, default=0) > 32
        if asked.get("precision") == "fp32" or len(hidden) > 2 or wide:
            pytest.skip("the kernel that keeps all weights on the chip does not serve it")
    monkeypatch.setattr(Flow, "resident", request.param == "resident")


MASKED_ALONE = pytest.mark.parametrize("kind", ["masked"], indirect=True)


def side_of(p, device, conditioning):
    found = p.locate(torch.device(device), conditioning=conditioning)
    return Side(found.size, found.start, found.step)


class Flow:
    """A random flow as plain tensors: the definition, and what the kernels take."""

    resident = False

    def __init__(
        self, sides, hidden=(24, 17), activation="relu", prior="logistic", context=0,
        precision=None, device="cpu",
    ):  # fmt: skip
        precision = precision or ("tf32" if self.resident else "fp32")
        d = sides[0].features
        self.shape = FlowShape(d, context, hidden, len(sides), activation, prior)
        if self.resident:
            self.shape = self.shape._replace(
                sides=(side_of(sides[0], device, True), side_of(sides[0], device, False)),
                reads=tuple(int(p != sides[0]) for p in sides),
            )
        self.sides = [(p.conditioning.to(device), p.shifted.to(device)) for p in sides]
        self.weights, self.biases = [], []
        for p in sides:
            widths = [len(p.conditioning) + context, *hidden, len(p.shifted)]
            self.weights.append(
                [1.5 / math.sqrt(a) * torch.randn(b, a, device=device) for a, b in pairwise(widths)]
            )
            self.biases.append([0.3 * torch.randn(b, device=device) for b in widths[1:]])
        self.log_scale = 0.3 * torch.randn(d, device=device)
        self.precision = precision
        tile = flow_tile(self.shape, precision, arch())
        if isinstance(tile, str):
            pytest.skip(tile)
        if isinstance(tile, FlowTile) == self.resident:
            pytest.skip("this kernel does not serve the flow")
        self.tile = tile._replace(rows=ROWS) if INTERPRETED else tile
        if self.resident and INTERPRETED:  # two programs, which take several tiles each
            self.tile = self.tile._replace(programs=2)

    @property
    def packed(self):
        layout = lay_out(
            self.shape, [c for c, _ in self.sides], [s for _, s in self.sides], self.tile
        )
        layers = zip(self.weights, self.biases, strict=True)
        return pack(layout, [t for own in layers for pair in zip(*own, strict=True) for t in pair])

    def shifts(self, x, c, index):
        """m(x1, c) of one coupling, with operands rounded unless in float64."""
        rounded = ROUND[self.precision] if x.dtype == torch.float32 else lambda t: t
        h = x[:, self.sides[index][0]]
        h = h if c is None else torch.cat((h, c.to(x.dtype)), 1)
        pairs = list(zip(self.weights[index], self.biases[index], strict=True))
        for i, (w, b) in enumerate(pairs):
            h = R.ACTIVATIONS[self.shape.activation](h) if i else h
            h = rounded(h) @ rounded(w).to(x.dtype).T + b.to(x.dtype)
        return h

    def couplings(self, x, c, inverse=False):
        x, order = x.clone(), range(self.shape.couplings)
        for i in reversed(order) if inverse else order:
            shift = self.shifts(x, c, i)
            x[:, self.sides[i][1]] += -shift if inverse else shift
        return x

    def forward(self, x, c=None):
        h = self.couplings(x, c)
        return R.scale_log_prob(h, self.log_scale.to(x.dtype), self.shape.prior, return_z=True)

    def inverse(self, z, c=None):
        return self.couplings(z * torch.exp(-self.log_scale.to(z.dtype)), c, inverse=True)

    def kernel_forward(self, x, c=None, z=True, log_prob=True):
        return flow_fwd(x, c, self.packed, self.log_scale, self.shape, self.tile, z, log_prob)

    def kernel_inverse(self, z, c=None):
        return flow_inv(z, c, self.packed, self.log_scale, self.shape, self.tile)

    def kernel_sample(self, n, c=None, seed=5, offset=0):
        return flow_sample(
            n, offset, seed, c, self.packed, self.log_scale, self.shape, self.tile
        )  # fmt: skip


def chain(p, length=3):
    return [p if i % 2 == 0 else ~p for i in range(length)]


def data(n, d, context, device):
    x = 2 * torch.randn(n, d, device=device)
    return x, torch.randn(n, context, device=device) if context else None


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check(f, x, c):
    """Both directions by the three-way rule; of a few rows through several couplings, the largest
    error of either side is a matter of luck, and differs from one processor to another."""
    z, log_prob = f.kernel_forward(x, c)
    for got, plain, exact in zip(
        (z, log_prob), f.forward(x, c), f.forward(*double(x, c)), strict=True
    ):
        assert got.dtype == torch.float32
        assert_three_way(got, plain, exact, slack=4)
    back = f.kernel_inverse(z, c)
    assert_three_way(back, f.inverse(z, c), f.inverse(*double(z, c)), slack=4)


def test_outputs_on_their_own(guarded, device):
    f = Flow(chain(nf.Partition.half(5)), device=device)
    x, _ = data(17, 5, 0, device)
    z, log_prob = f.kernel_forward(x)
    nothing, same = f.kernel_forward(x, z=False)
    assert torch.equal(same, log_prob)
    assert nothing.shape == (0,)
    same, nothing = f.kernel_forward(x, log_prob=False)
    assert torch.equal(same, z)
    assert nothing.shape == (0,)
    assert error(f.kernel_inverse(z), x) < (1e-2 if f.precision == "tf32" else 1e-5)


SHAPES = [(2, (5,)), (31, (16, 32)), (3, (40, 16)), (13, (24, 17, 9)), (33, (16,))]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("d", "hidden"), SHAPES)
def test_partitions(guarded, device, d, hidden, precision):
    for i, p in enumerate(partitions(d)):
        prior = PRIORS[i % 2]
        sides = [p, p, ~p] if i == 4 else chain(p, 2)
        f = Flow(sides, hidden, "tanh", prior, i % 3, precision, device)
        check(f, *data((1, 17)[i % 2], d, i % 3, device))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", R.ACTIVATIONS)
@pytest.mark.parametrize("prior", PRIORS)
def test_activations(guarded, device, activation, prior, precision):
    hidden = (20, 31 if Flow.resident else 33)
    f = Flow(chain(nf.Partition.random(7, 1)), hidden, activation, prior, 2, precision, device)
    check(f, *data(19, 7, 2, device))


@MASKED_ALONE
@pytest.mark.parametrize("activation", R.ACTIVATIONS)
def test_small_inputs_keep_their_precision(guarded, device, activation):
    """Near 0, exp(x) - 1 and tanh have to be as precise as PyTorch's."""
    f = Flow(chain(nf.Partition.half(4), 1), (16,), activation, device=device)
    f.biases = [[torch.zeros_like(b) for b in bs] for bs in f.biases]
    f.log_scale = torch.zeros_like(f.log_scale)
    x, _ = data(17, 4, 0, device)
    for scale in (1e-2, 1e-4, 1e-6):
        exact = f.couplings(scale * x.double(), None)
        assert error(f.kernel_forward(scale * x)[0], exact) < 1e-6 * exact.abs().max()


@MASKED_ALONE
def test_widest(guarded, device):
    """One tile of the widest shape; a partition of one feature against all others."""
    mask = torch.zeros(100, dtype=torch.bool)
    mask[37] = True
    sides = chain(nf.Partition.from_mask(mask), 2)
    f = Flow(sides, (60, 64), context=28, precision="tf32", device=device)
    check(f, *data(5, 100, 28, device))


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_strides(guarded, device, layout):
    f = Flow(chain(nf.Partition.alternating(5)), context=3, device=device)
    x, c = data(18, 5, 3, device)
    x, c = strided(x, layout), strided(c, layout)
    dense = [t.contiguous() for t in (x, c)]
    assert all(map(torch.equal, f.kernel_forward(x, c), f.kernel_forward(*dense)))
    assert torch.equal(f.kernel_inverse(x, c), f.kernel_inverse(*dense))
    assert torch.equal(f.kernel_sample(18, c), f.kernel_sample(18, dense[1]))


def test_zero_rows(triton_backend, device):
    f = Flow(chain(nf.Partition.half(5)), context=3, device=device)
    x, c = data(0, 5, 3, device)
    z, log_prob = f.kernel_forward(x, c)
    assert (z.shape, log_prob.shape) == ((0, 5), (0,))
    assert f.kernel_inverse(x, c).shape == f.kernel_sample(0, c).shape == (0, 5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", FEW)
@pytest.mark.parametrize("where", ["x", "context"])
def test_nan_stays_in_its_row(guarded, device, activation, where, precision):
    f = Flow(
        chain(nf.Partition.random(6, 2)), activation=activation, context=2, precision=precision,
        device=device,
    )  # fmt: skip
    x, c = data(19, 6, 2, device)
    clean = f.kernel_forward(x, c)
    (x if where == "x" else c)[4, 1] = torch.nan
    z, log_prob = f.kernel_forward(x, c)
    assert log_prob.isnan().nonzero().flatten().tolist() == [4]
    others = torch.arange(19, device=device) != 4
    assert torch.equal(log_prob[others], clean[1][others])
    assert torch.equal(z[others], clean[0][others])
    back = f.kernel_inverse(x, c)
    assert back.isnan().any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_shifted_feature_does_not_reach_the_conditioner(guarded, device, value, precision):
    p = nf.Partition.random(7, 3)
    f = Flow([p], precision=precision, device=device)
    x, _ = data(5, 7, 0, device)
    clean, _ = f.kernel_forward(x)
    feature = int(p.shifted[1])
    x[2, feature] = value
    z, log_prob = f.kernel_forward(x)
    changed = torch.zeros_like(x, dtype=torch.bool)
    changed[2, feature] = True
    assert torch.equal(z[~changed], clean[~changed])
    assert z[2, feature].isnan() if math.isnan(value) else z[2, feature] == value
    assert log_prob[2].isnan() if math.isnan(value) else log_prob[2] == -torch.inf


@pytest.mark.parametrize("inverse", [False, True])
def test_conditioning_features_keep_their_bits(guarded, device, inverse):
    p = nf.Partition.random(9, 4)
    f = Flow([p], context=2, device=device)
    f.log_scale = torch.zeros_like(f.log_scale)
    x, c = data(20, 9, 2, device)
    x[3] = -0.0
    x[5] = torch.nan
    y = f.kernel_inverse(x, c) if inverse else f.kernel_forward(x, c)[0]
    kept = p.conditioning.to(device)
    same = y[:, kept].view(torch.int32) == x[:, kept].view(torch.int32)
    assert (same | x[:, kept].isnan()).all()
    assert y[5, kept].isnan().all()


@pytest.mark.parametrize("prior", PRIORS)
def test_sample_is_noise_through_the_inverse(guarded, device, prior):
    for d, context, offset in ((3, 0, 0), (6, 2, 2**33 + 5), (18, 0, 7)):
        f = Flow(chain(nf.Partition.half(d)), prior=prior, context=context, device=device)
        c = data(19, d, context, device)[1]
        noise = R.sample_prior(f.log_scale, 19, 5, prior, offset)
        exact = f.couplings(*double(noise, c), inverse=True)
        got = f.kernel_sample(19, c, seed=5, offset=offset)
        if f.precision == "fp32":
            assert error(got, exact) < 1e-4
        else:
            assert_three_way(got, f.couplings(noise, c, inverse=True), exact, slack=4)
        part = f.kernel_sample(4, None if c is None else c[11:15], seed=5, offset=offset + 11)
        assert torch.equal(part, got[11:15])
    assert not torch.equal(f.kernel_sample(19, seed=6), f.kernel_sample(19, seed=5))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_has_the_same_bits_in_every_batch(guarded, device, precision):
    f = Flow(chain(nf.Partition.random(7, 1)), context=2, precision=precision, device=device)
    rows = f.tile.rows
    x, c = data(2 * rows + 3, 7, 2, device)
    z, log_prob = f.kernel_forward(x, c)
    back, sample = f.kernel_inverse(x, c), f.kernel_sample(len(x), c)
    for n in (1, 7, rows, rows + 1):
        some = f.kernel_forward(x[:n], c[:n])
        assert torch.equal(some[0], z[:n])
        assert torch.equal(some[1], log_prob[:n])
        last = f.kernel_forward(x[-n:], c[-n:])  # other places in a tile
        assert torch.equal(last[1], log_prob[-n:])
        assert torch.equal(f.kernel_inverse(x[-n:], c[-n:]), back[-n:])
        assert torch.equal(f.kernel_sample(n, c[:n]), sample[:n])


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_padding_is_inert(guarded, device, activation):
    """The same flow in wider buckets: the same numbers, but for the order of sums."""
    f = Flow(chain(nf.Partition.half(5)), (8, 11), activation, device=device)
    x, _ = data(9, 5, 0, device)
    z, log_prob = f.kernel_forward(x)
    f.tile = f.tile._replace(hidden=64, **{"half" if f.resident else "features": 32})
    wide_z, wide_log_prob = f.kernel_forward(x)
    tolerance = 1e-2 if f.precision == "tf32" else 1e-5  # another sum may round to another operand
    assert error(wide_z, z) < tolerance
    assert error(wide_log_prob, log_prob) < 10 * tolerance


def test_one_launch_for_each_call(triton_backend, device):
    f = Flow(chain(nf.Partition.half(5)), context=3, device=device)
    x, c = data(70, 5, 3, device)
    packed = f.packed
    rest = (packed, f.log_scale, f.shape, f.tile)
    calls = {
        "flow_fwd_kernel": [
            lambda z=z, lp=lp: flow_fwd(x, c, *rest, z, lp) for z, lp in ((0, 1), (1, 0), (1, 1))
        ],
        "flow_inv_kernel": [lambda: flow_inv(x, c, *rest)],
        "flow_sample_kernel": [lambda: flow_sample(70, 0, 1, c, *rest)],
    }
    for name, functions in calls.items():
        for function in functions:
            launches = mock.MagicMock()
            module, own = (flow_resident, "resident_kernel") if f.resident else (flow, name)
            others = {k: mock.DEFAULT for k in calls if k != own}
            with (
                mock.patch.object(module, own, launches),
                mock.patch.multiple(flow, **others) as untouched,
                Operators() as operators,
            ):
                function()
            assert launches.__getitem__.return_value.call_count == 1
            assert not any(m.mock_calls for m in untouched.values())
            assert set(operators.seen) <= {"empty", "new_empty"}


def test_packing_leaves_parameters_alone(device):
    f = Flow(chain(nf.Partition.random(6, 0)), context=1, device=device)
    before = [[w.clone() for w in ws] for ws in f.weights]
    assert all(map(torch.equal, f.packed, f.packed))
    for olds, news in zip(before, f.weights, strict=True):
        assert all(map(torch.equal, olds, news))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_parts_add_up_to_the_weights(device, precision):
    if INTERPRETED and precision == "bf16":
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    f = Flow([nf.Partition.half(6)], (16,), precision=precision, device=device)
    if f.resident:
        w, _, features = f.packed
        w_in, w_out = w[0].split(w.shape[2] // 2, 1)
        w_in, w_out = w_in.view(1, -1, 32, 16), w_out.view(1, -1, 16, 32)
        places = slice(0, 3), slice(3, None)
        assert features[:, :3].tolist() == [[0, 1, 2], [3, 4, 5]]
    else:
        w_in, w_mid, w_out, _, sides = f.packed
        places = slice(3, 6), slice(0, 3)
        assert w_mid.numel() == 0
        assert sides[0, :6].tolist() == [1, 1, 1, 2, 2, 2]
    least = {"fp32": 2**-22, "tf32": 2**-11, "bf16": 2**-8}[precision]
    first, last = f.weights[0]
    for packed, w in ((w_in[0, :, :16, :3], first), (w_out[0, :, places[0], :16], last)):
        total = packed.double().sum(0)
        assert ((total - w.double()).abs() <= least * w.abs().double()).all()
    assert w_in[0, :, :, 3:].abs().max() == 0
    assert w_out[0, :, places[1]].abs().max() == 0


def test_infinite_weights_stay_infinite(device):
    f = Flow([nf.Partition.half(4)], (16,), precision="tf32", device=device)
    f.weights[0][0][0, 0], f.weights[0][0][1, 1] = torch.inf, torch.nan
    w_in = f.packed[0].flatten()
    assert w_in[0] == torch.inf
    assert w_in[17].isnan()  # of 16 features


def test_bits_do_not_depend_on_the_number_of_programs(triton_backend, device):
    f = Flow(chain(nf.Partition.alternating(7)), context=2, device=device)
    if not f.resident:
        pytest.skip("one tile, one program")
    x, c = data(4 * f.tile.rows + 3, 7, 2, device)
    results = []
    for programs in (1, 2, 7):
        f.tile = f.tile._replace(programs=programs)
        sample = f.kernel_sample(len(x), c)
        results.append((*f.kernel_forward(x, c), f.kernel_inverse(x, c), sample))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
