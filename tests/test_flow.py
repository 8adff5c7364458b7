import copy
import math

import pytest
import torch

import nicefast as nf
from helpers import Operators, assert_gradients, assert_three_way, make, plain_log_prob

R = nf.reference


def test_a_fresh_flow_is_close_to_the_identity():
    model = nf.NICE(64, hidden=(256, 256))
    assert torch.equal(model.scaling.log_scale, torch.zeros(64))
    x = torch.randn(30, 64)
    z, log_det = model(x)
    assert torch.equal(log_det, torch.zeros(30))
    assert 0 < (z - x).abs().max() < 0.5
    assert (z - x).abs().mean() < 0.1


def test_defaults_are_the_paper_s_network():
    with torch.device("meta"):
        model = nf.NICE(784)
    assert sum(p.numel() for p in model.parameters()) == 19_158_352  # Dinh et al., for MNIST
    assert [c.partition for c in model.couplings] == [
        nf.Partition.alternating(784, parity=i % 2) for i in range(4)
    ]


@pytest.mark.parametrize("prior", ["logistic", "normal"])
@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
def test_log_prob_and_gradients(backend, device, partition, prior):
    model = make(partition=partition, prior=prior, device=device)
    wide = copy.deepcopy(model).double()
    x = torch.randn(33, 6, device=device)
    weights = torch.randn(33, device=device)
    got, plain = model.log_prob(x), plain_log_prob(model, x)
    exact = plain_log_prob(wide, x.double())
    assert_three_way(got, plain, exact)
    grads = torch.autograd.grad((got * weights).sum(), list(model.parameters()))
    plains = torch.autograd.grad((plain * weights).sum(), list(model.parameters()))
    exacts = torch.autograd.grad((exact * weights.double()).sum(), list(wide.parameters()))
    assert_gradients(grads, plains, exacts)


def test_forward_inverse_and_log_prob_agree(backend, device):
    model = make(device=device, context=2)
    x, c = torch.randn(2, 5, 6, device=device), torch.randn(5, 2, device=device)
    z, log_det = model(x, c)
    back, log_det_back = model.inverse(z, c)
    assert torch.allclose(back, x, atol=1e-5)
    assert torch.allclose(log_det_back, -log_det)
    assert log_det.shape == (2, 5)
    want = model.prior.log_prob(z).sum(-1) + log_det
    assert torch.allclose(model.log_prob(x, c), want, atol=1e-4)
    full = c.expand(2, 5, 2)
    assert torch.allclose(model.log_prob(x, c), plain_log_prob(model, x, full), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4), (2, 2, 3), (5,)])
def test_event_shapes(shape):
    model = make(shape)
    x = torch.randn(3, 2, *shape)
    z, log_det = model(x)
    assert z.shape == x.shape
    assert log_det.shape == model.log_prob(x).shape == (3, 2)
    assert torch.allclose(model.inverse(z)[0], x, atol=1e-5)
    assert model.sample(7).shape == (7, *shape)
    flat = make(math.prod(shape))
    flat.load_state_dict(model.state_dict())
    assert torch.allclose(flat.log_prob(x.reshape(3, 2, -1)), model.log_prob(x))
    assert model.log_prob(x[0, 0]).shape == ()


def test_checkerboard_follows_the_image():
    model = make((3, 4, 4), partition="checkerboard")
    assert model.couplings[0].partition == nf.Partition.checkerboard(4, 4, channels=3)
    assert model.couplings[1].partition == nf.Partition.checkerboard(4, 4, channels=3, parity=1)
    assert make((4, 6), partition="checkerboard").couplings[0].partition.features == 24


def test_partitions_given_one_by_one():
    p, q = nf.Partition.half(6), nf.Partition.random(6, 1)
    assert [c.partition for c in make(partition=q).couplings] == [q, ~q, q]
    assert [c.partition for c in make(partition=[p, q, ~q]).couplings] == [p, q, ~q]


def test_nan_stays_in_its_row(backend, device):
    model = make(device=device)
    x = torch.randn(8, 6, device=device)
    clean = model.log_prob(x)
    for feature in range(6):
        bad = x.clone()
        bad[3, feature] = torch.nan
        log_prob = model.log_prob(bad)
        assert log_prob.isnan().nonzero().flatten().tolist() == [3]
        rest = torch.arange(8, device=device) != 3
        assert torch.allclose(log_prob[rest], clean[rest])


@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_sample_is_noise_through_the_inverse(backend, device, prior):
    model = make(device=device, prior=prior)

    def generator():
        return torch.Generator().manual_seed(5)

    x = model.sample(50, generator=generator())
    assert x.shape == (50, 6)
    assert not x.requires_grad
    seed = nf.functional.draw_seed(generator())
    h = R.sample_prior(model.scaling.log_scale, 50, seed, prior)
    z = h * model.scaling.log_scale.exp()
    assert torch.allclose(model(x)[0], z, atol=1e-3)
    for size in (7, 50, 99):
        again = model.sample(50, batch_size=size, generator=generator())
        assert torch.allclose(again, x, atol=1e-5)


def test_sample_and_log_prob(backend, device):
    model = make(device=device, context=2)
    c = torch.randn(3, 2, device=device)
    x, log_prob = model.sample_and_log_prob(4, c, generator=torch.Generator().manual_seed(1))
    assert x.shape == (3, 4, 6)
    assert torch.allclose(log_prob, model.log_prob(x, c[:, None]), atol=1e-4)
    same = model.sample(4, c, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(x, same, atol=1e-5)
    (x.square().sum() + log_prob.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_samples_have_the_density_s_moments():
    """Importance weights of samples under their own density: E[1] over a box, by both routes."""
    torch.manual_seed(1)
    model = make(2, partition="half", activation="tanh")
    x = model.sample(100_000)
    inside = (x.abs() < 2).all(-1).double().mean()
    axis = torch.linspace(-2, 2, 401)
    middle = (axis[1:] + axis[:-1]) / 2
    with torch.no_grad():
        mass = model.log_prob(torch.cartesian_prod(middle, middle)).double().exp().sum() * 1e-4
    assert abs(inside - mass) < 4 * math.sqrt(0.25 / 100_000)


@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
def test_the_data_are_never_gathered_or_concatenated(triton_backend, device, partition):
    """Layer by layer, the partition is index arithmetic inside kernels, in both directions."""
    model = make(device=device, partition=partition, hidden=())  # that no faster path serves
    x = torch.randn(5, 6, device=device, requires_grad=True)
    model.log_prob(x)  # makes the maps of an arbitrary partition, once
    with Operators() as operations:
        model.log_prob(x).sum().backward()
        model.inverse(model(x)[0])
        model.sample(3)
    assert "additive_coupling" in operations.seen
    forbidden = ("gather", "scatter", "cat", "stack", "index", "slice_backward", "masked", "take")
    found = {o for o in operations.seen if any(word in o for word in forbidden)}
    assert not found


def test_zero_rows(backend, device):
    model = make(device=device)
    x = torch.empty(0, 6, device=device)
    assert model.log_prob(x).shape == (0,)
    assert model(x)[0].shape == (0, 6)
    assert model.sample(0).shape == (0, 6)
    model.log_prob(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_run_as_float32(dtype):
    model = make()
    x = torch.randn(4, 6).to(dtype)
    z, log_det = model(x)
    assert z.dtype == log_det.dtype == model.log_prob(x).dtype == torch.float32
    assert torch.equal(model.log_prob(x), model.log_prob(x.float()))


def test_float64_stays_float64(backend, device):
    model = make(device=device).double()
    x = torch.randn(4, 6, dtype=torch.float64, device=device)
    for t in (*model(x), *model.inverse(x), model.log_prob(x), model.sample(2)):
        assert t.dtype == torch.float64
    assert make(device=device).log_prob(x).dtype == torch.float64


def test_bf16_parameters_keep_a_float32_stream():
    model = make().bfloat16()
    x = torch.randn(64, 6)
    z, _ = model(x)
    assert z.dtype == torch.float32
    assert model.sample(3).dtype == torch.float32
    assert torch.allclose(model.inverse(z)[0], x, atol=0.1)


def test_autocast_keeps_a_float32_stream():
    model = make(hidden=(64, 64))
    x = torch.randn(64, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = model.log_prob(x)
        z, _ = model(x)
    assert log_prob.dtype == z.dtype == torch.float32
    error = (log_prob - model.log_prob(x)).abs()
    assert 0 < error.max() < 0.5  # bf16 products were used, and only there
    log_prob.sum().backward()


def test_hooks_and_replaced_conditioners():
    model = make()
    model.couplings[1].conditioner = torch.nn.Linear(3, 3)
    seen = []
    model.couplings[1].register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    x = torch.randn(4, 6)
    with torch.no_grad():
        log_prob = model.log_prob(x)
    assert len(seen) == 1
    h = model.couplings[2](seen[0])[0]
    assert torch.allclose(R.scale_log_prob(h, model.scaling.log_scale), log_prob)


def test_parameters_are_never_stale():
    """An in-place step, load_state_dict and .to() each change the result at once."""
    model, x = make(), torch.randn(4, 6)
    before = model.log_prob(x)
    other = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert not torch.allclose(model.log_prob(x), before)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.log_prob(x), other.log_prob(x))
    assert model.double().log_prob(x.double()).dtype == torch.float64


def test_dropout_goes_layer_by_layer_in_training_and_by_products_otherwise():
    model = make(dropout=0.25)
    x = torch.randn(5, 6)
    plan = model.plan(x)
    assert (plan.name, plan.reason.split(": ")[1]) == ("layers", "dropout, in training mode")
    assert not torch.equal(model.log_prob(x), model.log_prob(x))
    model.eval()
    assert model.plan(x).name == "rows"
    plain = make()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.log_prob(x), plain.log_prob(x))


def test_each_coupling_may_have_hidden_layers_of_its_own():
    model = make(hidden=((8,), (4, 4), ()), couplings=3)
    assert [len(c.conditioner.linears) for c in model.couplings] == [2, 3, 1]
    assert model.configuration["hidden"] == [[8], [4, 4], []]
    with pytest.raises(ValueError, match="one sequence of widths for each of 3 couplings"):
        make(hidden=((8,), (4, 4)), couplings=3)


def test_explain(device):
    text = make().explain(rows=1000)
    assert text.startswith("rows: every coupling")
    assert "1000 rows in 1 blocks of at most 1000" in text
    assert "9 products, float32 operands" in text
    # 3 couplings of 3 -> 16 -> 8 -> 3: 600 weights, 81 biases; 6 of log_scale
    assert "log_prob: 1,200,000 flop of products, 30,748 bytes" in text
    assert "H100 SXM" in text
    assert "plain PyTorch on cpu" in text
    assert "with gradients: the engine saves" in text
    assert make().double().explain().startswith("layers: float64 rows")
    with nf.set_backend("reference"):
        assert "'reference' was asked for" in make().explain()
    pytest.importorskip("triton", reason="needs Triton")
    with nf.set_backend("triton"):
        assert f"Triton kernels on {device.type}" in make(device=device).explain()


X = torch.zeros(3, 6)
BAD_MODELS = [
    (lambda: nf.NICE(1), "features must be at least 2"),
    (lambda: nf.NICE((2, 0)), "features must be an integer or an event shape"),
    (lambda: nf.NICE(6, couplings=0), "couplings must be an integer >= 1, got 0"),
    (lambda: nf.NICE(6, prior="cauchy"), "prior must be one of logistic, normal, got 'cauchy'"),
    (lambda: nf.NICE(6, partition="thirds"), "partition must be one of half, alternating"),
    (lambda: nf.NICE(6, partition="checkerboard"), r"needs an event shape \(H, W\)"),
    (lambda: nf.NICE(6, partition=nf.Partition.half(5)), "must split 6 features.*got 5"),
    (lambda: nf.NICE(6, partition=[nf.Partition.half(6)]), "one Partition for each of 4"),
    (lambda: nf.NICE(6, activation="swish"), "activation must be one of"),
    (lambda: nf.NICE(6, hidden=(-1,)), "hidden"),
    (lambda: nf.NICE(6, couplings=True), "couplings must be an integer >= 1, got True"),
    (lambda: nf.NICE(6, context=True), "context must be an integer >= 0, got True"),
    (lambda: nf.NICE(6, dropout="a"), r"dropout must be a number in \[0, 1\), got 'a'"),
    (lambda: nf.NICE(6, activation=["relu"]), r"activation must be one of.*got \['relu'\]"),
]
WRONG_KINDS = [
    ({"features": 4.5}, "features must be an integer or an event shape, got float"),
    ({"features": None}, "features must be an integer or an event shape, got NoneType"),
    ({"hidden": None}, "hidden must be widths, got NoneType"),
    ({"hidden": math.nan}, "hidden must be widths, got float"),
    ({"partition": 3}, "partition must be a name, a Partition or one.*, got int"),
    ({"partition": None}, "partition must be a name, a Partition or one.*, got NoneType"),
    ({"partition": torch.ones(6)}, "partition must be a name, a Partition or one"),
    ({"grid": "a"}, "grid must be a number, got str"),
]
BAD_CALLS = [
    (lambda m: m.log_prob(X[:, :5]), ValueError, r"x must have shape \(..., 6\), got \(3, 5\)"),
    (
        lambda m: m.log_prob(X.int()),
        TypeError,
        "x must be floating point, got torch.int32.*dequant",
    ),
    (lambda m: m.log_prob([0.0] * 6), TypeError, "x must be a torch.Tensor, got list"),
    (
        lambda m: m.log_prob(X.to_sparse()),
        TypeError,
        "x must be dense, got layout torch.sparse_coo",
    ),
    (
        lambda m: nf.NICE(6, hidden=(4,), context=2).log_prob(X, X[:, :2].to_sparse()),
        TypeError,
        "context must be dense, got layout torch.sparse_coo",
    ),
    (
        lambda m: nf.NICE(6, hidden=(4,), context=2).log_prob(X, X[:, :2].to(torch.float8_e4m3fn)),
        TypeError,
        "context must be float16, bfloat16, float32 or float64, got torch.float8",
    ),
    (
        lambda m: m.inverse(X.to(torch.float8_e4m3fn)),
        TypeError,
        "z must be float16, bfloat16, float32 or float64, got torch.float8",
    ),
    (lambda m: m.log_prob(X.to("meta")), ValueError, "x must be on cpu.*got meta"),
    (lambda m: m.log_prob(torch.zeros(())), ValueError, r"x must have shape"),
    (lambda m: m.inverse(X[:, :5]), ValueError, "z must have shape"),
    (lambda m: m.log_prob(X, X), ValueError, "context was given"),
    (lambda m: m.sample(-1), ValueError, "n must be an integer >= 0, got -1"),
    (lambda m: m.sample(2, batch_size=0), ValueError, "batch_size must be an integer >= 1"),
    (lambda m: m.sample(2.0), ValueError, "n must be an integer"),
    (lambda m: m.sample(2, generator=3), TypeError, "generator must be a torch.Generator, got int"),
    (
        lambda m: m.sample_and_log_prob(2, generator="a"),
        TypeError,
        "generator must be a torch.Generator, got str",
    ),
    (lambda m: m.graphed(2, ["a"]), ValueError, "method must be one of"),
    (lambda m: m.log_det(None), TypeError, "x must be a torch.Tensor, got NoneType"),
    (lambda m: m.log_det(X[:, :5]), ValueError, r"x must have shape \(..., 6\)"),
]
BAD_CONTEXTS = [
    (lambda m: m.log_prob(X), ValueError, "context must be given: the flow takes 2"),
    (lambda m: m.sample(3), ValueError, "context must be given"),
    (lambda m: m.distribution(), ValueError, "context must be given"),
    (lambda m: m.log_prob(X, X), ValueError, r"context must have 2 features.*\(3, 6\)"),
    (lambda m: m.log_prob(X, X[:2, :2]), ValueError, r"broadcast to those of x, \(3,\)"),
    (lambda m: m.log_prob(X, X[:, :2].int()), TypeError, "context must be a floating-point"),
    (lambda m: m.log_prob(X, X[:, :2].to("meta")), ValueError, "context must be on cpu"),
]


@pytest.mark.parametrize(("call", "says"), BAD_MODELS)
def test_bad_models(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(("wrong", "says"), WRONG_KINDS)
def test_what_is_of_a_wrong_kind_is_named(wrong, says):
    with pytest.raises(TypeError, match=says):
        nf.NICE(**{"features": 6, **wrong})


@pytest.mark.parametrize(("call", "error", "says"), BAD_CALLS)
def test_bad_calls(call, error, says):
    with pytest.raises(error, match=says):
        call(make())


@pytest.mark.parametrize(("call", "error", "says"), BAD_CONTEXTS)
def test_bad_contexts(call, error, says):
    with pytest.raises(error, match=says):
        call(make(context=2))


def test_non_finite_log_scale():
    model = make()
    with torch.no_grad():
        model.scaling.log_scale[2] = torch.nan
    for call in (model, model.inverse, model.log_prob):
        with pytest.raises(ValueError, match="log_scale must be finite, got nan at feature 2"):
            call(X)
    with pytest.raises(ValueError, match="log_scale must be finite"):
        model.sample(2)


@pytest.mark.parametrize("rows", [1, 3000])
@torch.no_grad()
def test_a_square_that_overflows_is_no_density_of_zero(rows):
    """Half of it does not."""
    model = nf.NICE(2, hidden=(8,), prior="normal", partition="half")
    for p in model.parameters():
        p.zero_()
    x = torch.tensor([[1.9e19, 0.0]]).expand(rows, 2)
    want = torch.full((rows,), -0.5 * 1.9e19**2)
    assert torch.allclose(model.log_prob(x), want)
    assert torch.allclose(nf.functional.scale_log_prob(x, torch.zeros(2), "normal"), want)


class Clamped(nf.Scaling):
    """A scaling of the user's own."""

    def forward(self, h, context=None):
        s = self.log_scale.clamp(-1, 1)
        return h * s.exp(), s.sum().expand(h.shape[:-1])

    def inverse(self, z, context=None):
        s = self.log_scale.clamp(-1, 1)
        return z * (-s).exp(), -s.sum().expand(z.shape[:-1])


@pytest.mark.parametrize("hidden", [(8,), (300,)])
@pytest.mark.parametrize("rows", [(3,), (2, 2000)])
@pytest.mark.parametrize("grad", [False, True])
def test_a_scaling_of_its_own_is_what_the_flow_computes(hidden, rows, grad):
    flow, same = make(6, hidden=hidden), make(6, hidden=hidden)
    same.load_state_dict(flow.state_dict())
    flow.scaling = Clamped(6)
    with torch.no_grad():
        flow.scaling.log_scale.copy_(torch.tensor([2.0, -2, 0.5, 3, 1, 0]))
        same.scaling.log_scale.copy_(flow.scaling.log_scale.clamp(-1, 1))
    x = torch.randn(*rows, 6)

    def results(flow):
        noise = [torch.Generator().manual_seed(1) for _ in range(2)]
        with torch.set_grad_enabled(grad):
            return (
                flow.log_prob(x),
                flow.log_det(x),
                *flow(x),
                *flow.inverse(x),
                flow.sample(5, generator=noise[0]),
                *flow.sample_and_log_prob(5, generator=noise[1]),
            )

    for a, b in zip(results(flow), results(same), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    if grad:
        flow.log_prob(x).sum().backward()
        assert flow.scaling.log_scale.grad[[0, 1, 3]].tolist() == [0, 0, 0]


def test_hooks_of_the_scaling_run_in_log_prob():
    flow, seen = make(6), []
    expected = flow.log_prob(torch.ones(2, 6))
    flow.scaling.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(flow.log_prob(torch.ones(2, 6)), expected)
    assert seen
