"""A whole flow in one launch: chosen, right, never stale, and the same bits in every batch."""

import copy
import gc
import weakref
from unittest import mock

import pytest
import torch

import nicefast as nf
from helpers import (
    Operators,
    assert_gradients,
    assert_three_way,
    error,
    make,
    partitions,
    plain_log_prob,
)

pytest.importorskip("triton", reason="needs Triton")

from nicefast.fused import versions, whole
from nicefast.kernels import INTERPRETED, flow

pytestmark = pytest.mark.usefixtures("triton_backend")
ATOL = 1e-5
KERNELS = ("flow_fwd_kernel", "flow_inv_kernel", "flow_sample_kernel")


def path(model, x):
    return nf.choose_path(model, x)


def plain(model, x, context=None):
    """By plain PyTorch, in the dtype of the model."""
    with torch.no_grad():
        return plain_log_prob(model, x, context)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "gelu", "silu", "elu"])
@pytest.mark.parametrize("context", [0, 2])
def test_every_call_agrees_with_float64(device, activation, context):
    options = {"activation": activation, "context": context, "partition": "random"}
    model = make(7, device=device, **options)
    wide = copy.deepcopy(model).double()
    x = 2 * torch.randn(2, 20, 7, device=device)
    c = torch.randn(20, context, device=device) if context else None
    deep = [None if t is None else t.double() for t in (x, c)]
    with torch.no_grad():
        with nf.set_backend("reference"):
            ways = model.log_prob(x, c), *model(x, c), *model.inverse(x, c)
        exact = wide.log_prob(*deep), *wide(*deep), *wide.inverse(*deep)
        got = model.log_prob(x, c), *model(x, c), *model.inverse(x, c)
    for value, other, true in zip(got, ways, exact, strict=True):
        assert_three_way(value, other, true)


@pytest.mark.parametrize("index", range(10))
def test_every_partition_and_its_gradients(device, index):
    model = make(6, device=device, partition=partitions(6)[index])
    wide = copy.deepcopy(model).double()
    x = torch.randn(40, 6, device=device, requires_grad=True)
    cotangent, pull = torch.randn(40, device=device), torch.randn(40, 6, device=device)

    def value(flow, x):
        back, log_det = flow.inverse(x)
        return (flow.log_prob(x) * cotangent + log_det).sum() + (back * pull).sum()

    def gradients(flow, x):
        return torch.autograd.grad(value(flow, x), [x, *flow.parameters()])

    assert path(model, x).name == "whole flow"
    got = gradients(model, x)
    with nf.set_backend("reference"):
        ways = gradients(model, x)
    deep = x.detach().double().requires_grad_()
    cotangent, pull = cotangent.double(), pull.double()
    assert_gradients(got, ways, gradients(wide, deep))


def test_second_derivatives(device):
    model = make(4, device=device, activation="tanh")
    x = torch.randn(3, 4, device=device, requires_grad=True)

    def twice():
        (grad,) = torch.autograd.grad(model.log_prob(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *model.parameters()], allow_unused=True)

    got = twice()
    with nf.set_backend("reference"):
        for a, b in zip(got, twice(), strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def _step(optimizer):
    def change(model):
        model.log_prob(torch.ones(4, 6, device=model.scaling.log_scale.device)).sum().backward()
        optimizer(model.parameters()).step()

    return change


def _load(model):
    model.load_state_dict(make(6).state_dict())


def _there_and_back(model):
    model.double()
    with torch.no_grad():
        model.couplings[0].conditioner.linears[0].weight.mul_(1.5)
    model.float()


def _one_number(model):
    with torch.no_grad():
        model.couplings[2].conditioner.linears[1].bias[3] += 1


def _new_parameter(model):
    linear = model.couplings[1].conditioner.linears[0]
    linear.weight = torch.nn.Parameter(2 * linear.weight.detach())


def _new_layer(model):
    old = model.couplings[1].conditioner.linears[0]
    model.couplings[1].conditioner.linears[0] = torch.nn.Linear(
        old.in_features, old.out_features, device=old.weight.device
    )


def _inference(model):
    with torch.inference_mode():
        model.couplings[0].conditioner.linears[0].weight.mul_(1.5)


def _other_partition(model):
    for i, coupling in enumerate(model.couplings):
        coupling.partition = nf.Partition.half(6) if i % 2 else ~nf.Partition.half(6)


def _scale(model):
    with torch.no_grad():
        model.scaling.log_scale.add_(0.5)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_step(lambda p: torch.optim.SGD(p, 0.1)), id="sgd"),
        pytest.param(_step(lambda p: torch.optim.Adam(p, 0.1)), id="adam"),
        pytest.param(_step(lambda p: torch.optim.Adam(p, 0.1, foreach=True)), id="foreach"),
        pytest.param(_step(lambda p: torch.optim.Adam(p, 0.1, fused=True)), id="fused"),
        _load,
        _there_and_back,
        _one_number,
        _new_parameter,
        _new_layer,
        _inference,
        _other_partition,
        _scale,
    ],
)
def test_never_stale(device, change):
    model = make(6, device=device)
    x = torch.randn(5, 6, device=device)
    with torch.no_grad():
        before = model.log_prob(x)
        model.inverse(x)
        sampled = model.sample(3, generator=torch.Generator().manual_seed(0))
    change(model)
    assert path(model, x).name == "whole flow"
    with torch.no_grad():
        after, (z, _) = model.log_prob(x), model(x)
        again = model.sample(3, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(after, plain(model, x), atol=ATOL, rtol=1e-5)
    assert not torch.allclose(sampled, again, atol=1e-3)
    assert torch.allclose(model.inverse(z)[0], x, atol=1e-4)


def test_slices_of_one_vector_are_never_stale(device):
    """Whose writes they do not count."""
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    with torch.no_grad():
        before = model.log_prob(x)
        vector.mul_(0.8)
        after = model.log_prob(x)
    assert path(model, x).name == "whole flow"
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(after, plain(model, x), atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_an_infinite_row_is_never_a_number_and_reaches_no_other(device, value):
    model, x = make(6, activation="tanh", device=device), torch.randn(5, 6, device=device)
    with torch.no_grad():
        clean = model.log_prob(x)
        for feature in range(6):
            row = x.clone()
            row[2, feature] = value
            found = model.log_prob(row)
            assert not found[2].isfinite()
            assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_two_flows_with_one_first_parameter(device):
    one, other = make(6, device=device), make(6, device=device, activation="tanh")
    first = one.couplings[0].conditioner.linears[0].weight
    other.couplings[0].conditioner.linears[0].weight = first
    x = torch.randn(5, 6, device=device)
    with torch.no_grad():
        for model in (one, other, one, other):
            expected = plain(model, x) if model is one else None
            got = model.log_prob(x)
            with nf.set_backend("reference"):
                expected = model.log_prob(x) if expected is None else expected
            assert torch.allclose(got, expected, atol=ATOL, rtol=1e-5)


def test_what_is_packed_keeps_its_place(device):
    """A captured graph reads it there."""
    model = make(6, device=device)
    x = torch.randn(5, 6, device=device)
    places = [t.data_ptr() for t in path(model, x).whole.packed()]
    _one_number(model)
    assert [t.data_ptr() for t in path(model, x).whole.packed()] == places
    with torch.inference_mode():
        model.log_prob(x)
    _one_number(model)
    assert torch.allclose(model.log_prob(x), plain(model, x), atol=ATOL, rtol=1e-5)


def test_a_weight_that_lies_otherwise_is_seen(device):
    model = make(6, device=device, hidden=(16, 16))
    x = torch.randn(5, 6, device=device)
    with torch.no_grad():
        model.log_prob(x)
        weight = model.couplings[0].conditioner.linears[1].weight
        weight.data = weight.data.t()  # at its address
        assert torch.allclose(model.log_prob(x), plain(model, x), atol=ATOL, rtol=1e-5)


def test_flows_that_share_a_parameter_are_packed_apart(device):
    one, other = make(6, device=device), make(6, device=device)
    own = [m.couplings[0].conditioner.linears[0] for m in (one, other)]
    own[1].weight = own[0].weight
    x = torch.randn(5, 6, device=device)
    packed = path(one, x).whole.packed()
    before = [t.clone() for t in packed]
    path(other, x).whole.packed()
    assert all(torch.equal(a, b) for a, b in zip(packed, before, strict=True))


def test_what_is_packed_goes_with_the_flow_and_hinders_no_swap(device):
    gc.collect()
    count, x = len(whole._packed), torch.randn(5, 6, device=device)
    model = make(6, device=device)
    with torch.no_grad():
        expected = model.log_prob(x)
    assert len(whole._packed) == count + 1
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        assert torch.equal(model.log_prob(x), expected)
    weight = weakref.ref(model.couplings[0].conditioner.linears[0].weight)
    del model
    gc.collect()
    assert weight() is None
    assert len(whole._packed) == count


def test_a_graph_of_somebody_else_packs_in_every_replay(device, monkeypatch):
    """What a capture would see; nicefast's own graphs pack beforehand."""
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    known = path(model, x).whole.packed()
    monkeypatch.setattr(whole, "is_capturing", lambda _: True)
    again = path(model, x).whole.packed()
    assert all(torch.equal(a, b) for a, b in zip(known, again, strict=True))
    *written, sides = (a.data_ptr() == b.data_ptr() for a, b in zip(known, again, strict=True))
    assert not any(written)
    assert sides  # says where features are, as long as the flow is
    with whole.packed_beforehand():
        assert path(model, x).whole.packed() is known
    assert path(model, x).whole.packed() is not known


@pytest.mark.parametrize(("precision", "most"), [("highest", 20), ("high", 12)])
def test_packing_takes_few_launches(device, precision, most):
    """However many couplings there are."""
    model, x = make(6, couplings=9, device=device), torch.randn(5, 6, device=device)
    torch.set_float32_matmul_precision(precision)
    try:
        path(model, x).whole.packed()
        with torch.no_grad():
            model.couplings[0].conditioner.linears[0].weight.add_(1)
        with Operators() as operators:
            path(model, x).whole.packed()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(operators.computing()) <= most, operators.computing()


def test_streams_do_not_share_what_is_packed(device, monkeypatch):
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    known = path(model, x).whole.packed()
    assert path(model, x).whole.packed() is known
    monkeypatch.setattr(whole, "stream_of", lambda _: 7)
    other = path(model, x).whole.packed()
    assert other is not known
    assert path(model, x).whole.packed() is other


def test_parameters_that_a_replayed_step_writes_are_packed_each_time(device, monkeypatch):
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(versions, "_replayed", set())
    path(model, x).whole.packed()
    model.log_prob(x).sum().backward()
    with monkeypatch.context() as captured:
        for cuda in ("is_initialized", "is_current_stream_capturing"):
            captured.setattr(torch.cuda, cuda, lambda: True)
        optimizer.step()
    with torch.no_grad():
        model.log_prob(x)
        for p in model.parameters():
            p.data.mul_(0.5)  # as a replay does: nothing counts it
        assert torch.allclose(model.log_prob(x), plain(model, x), atol=ATOL, rtol=1e-5)


def test_replays_that_are_counted_are_packed_once_each(device, monkeypatch):
    model, x = make(6, device=device), torch.randn(5, 6, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.log_prob(x).sum().backward()
    with monkeypatch.context() as captured, versions.counting_replays():
        for cuda in ("is_initialized", "is_current_stream_capturing"):
            captured.setattr(torch.cuda, cuda, lambda: True)
        optimizer.step()
    own = mock.patch.object(
        whole.WholeFlow, "_pack", autospec=True, side_effect=whole.WholeFlow._pack
    )
    with own as pack, torch.no_grad():
        for step in (1, 2):
            for p in model.parameters():
                p.data.mul_(0.5)  # as a replay does
            versions.count_step()
            for _ in range(3):
                assert torch.allclose(model.log_prob(x), plain(model, x), atol=ATOL, rtol=1e-5)
            assert pack.call_count == step


def test_parameters_of_inference_mode_count_no_versions(device):
    with torch.inference_mode():
        model = make(6, device=device)
        x = torch.randn(5, 6, device=device)
        model.log_prob(x)
        model.couplings[0].conditioner.linears[0].weight.mul_(2)
        assert torch.allclose(model.log_prob(x), plain(model, x), atol=ATOL, rtol=1e-5)


def test_a_row_has_the_same_bits_in_every_batch(device):
    model = make(8, device=device, hidden=(32, 32), couplings=2)
    x = torch.randn(4096, 8, device=device)
    with torch.no_grad():
        assert path(model, x).name == "whole flow"
        whole = model.log_prob(x), model(x)[0], model.inverse(x)[0]
        for n in (1, 7, 128, 129):
            for first in (0, 1000):
                rows = slice(first, first + n)
                part = model.log_prob(x[rows]), model(x[rows])[0], model.inverse(x[rows])[0]
                for a, b in zip(whole, part, strict=True):
                    assert torch.equal(a[rows], b)


def test_a_sample_does_not_depend_on_its_batches(device):
    model = make(6, device=device)

    def sample(batch_size=None):
        return model.sample(150, batch_size=batch_size, generator=torch.Generator().manual_seed(3))

    everything = sample()
    assert torch.equal(sample(7), everything)
    with nf.set_backend("reference"):
        assert torch.allclose(sample(), everything, atol=1e-4)


def test_one_launch_for_each_call(device):
    model = make(6, device=device)
    x = torch.randn(5, 6, device=device)
    calls = {
        "flow_fwd_kernel": [lambda: model.log_prob(x), lambda: model(x)],
        "flow_inv_kernel": [lambda: model.inverse(x)],
        "flow_sample_kernel": [lambda: model.sample(5)],
    }
    with torch.no_grad():
        model.log_prob(x)  # packs
        for name, functions in calls.items():
            for function in functions:
                others = {k: mock.DEFAULT for k in KERNELS if k != name}
                with (
                    mock.patch.object(flow, name) as launches,
                    mock.patch.multiple(flow, **others) as untouched,
                    Operators() as operators,
                ):
                    function()
                assert launches.__getitem__.return_value.call_count == 1
                assert not any(m.mock_calls for m in untouched.values())
                others = {"mm", "addmm", "cat", "index_select", "add", "exp"}  # but isfinite
                assert not others & set(operators.seen)


def test_training_saves_nothing_for_each_coupling(device):
    def saved(couplings):
        model = make(6, device=device, couplings=couplings)
        x, seen = torch.randn(50, 6, device=device), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            model.log_prob(x).sum().backward()
        return sum(t.numel() for t in seen)

    assert saved(2) == saved(9)


def test_round_trip_and_values_with_trained_weights(device):
    model = make(6, device=device, hidden=(32, 32), couplings=6)
    x = torch.randn(300, 6, device=device) @ torch.randn(6, 6, device=device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        loss = -model.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        got, back = model.log_prob(x), model.inverse(model(x)[0])[0]
        with nf.set_backend("reference"):
            other, plain_back = model.log_prob(x), model.inverse(model(x)[0])[0]
        assert_three_way(got, other, wide.log_prob(x.double()))
    assert error(back, x) <= 2 * error(plain_back, x) + 1e-6


def test_explain_names_the_tile(device):
    said = make(6, device=device).explain(1000)
    assert said.startswith("whole flow: ")
    assert "1000 rows in one launch, tiles of" in said
    assert "hidden layers to 32" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden": (300,)}, "hidden layers of up to 300 units"),
        ({"features": 130}, "130 features"),
        ({"features": 120, "context": 9}, "120 features and 9 of context"),
        ({"hidden": ()}, "no hidden layer"),
    ],
)
def test_what_the_kernel_does_not_serve_goes_another_way(device, options, says):
    model = make(**{"features": 6, "device": device, **options})
    x = torch.randn(3, model.features, device=device)
    c = torch.randn(3, model.context, device=device) if model.context else None
    chosen = nf.choose_path(model, x, c)
    assert chosen.whole is None
    assert says in chosen.reason
    assert says in model.explain()
    with torch.no_grad():
        expected = plain(model, x, c)
        assert torch.allclose(model.log_prob(x, c), expected, atol=1e-4, rtol=1e-5)


def test_flows_changed_by_hand(device):
    x = torch.randn(3, 6, device=device)

    def why(model):
        chosen = path(model, x)
        assert chosen.whole is None
        with torch.no_grad():
            assert model.log_prob(x).isfinite().all()
        return chosen.reason

    model = make(6, device=device)
    model.couplings[1].conditioner = nf.MLP(3, (16, 9), 3).to(device)
    assert "coupling 1 has other hidden layers" in why(model)
    model = make(6, device=device)
    model.scaling.register_forward_hook(lambda *_: None)
    assert "scaling" in why(model)
    model = make(6, device=device)
    model.scaling.double()
    assert "log_scale is torch.float64" in why(model)


def test_backends(device):
    model, x = make(6, device=device), torch.zeros(2, 6, device=device)
    with nf.set_backend("auto"):
        assert (path(model, x).whole is not None) == (device.type == "cuda")
    with nf.set_backend("reference"):
        assert path(model, x).name == "layer by layer"


@pytest.mark.parametrize(
    ("precision", "products"), [("highest", "tf32x3"), ("high", "tf32"), ("medium", "bf16")]
)
def test_precision_is_the_user_s(device, precision, products):
    model, x = make(6, device=device), torch.randn(2, 6, device=device)
    torch.set_float32_matmul_precision(precision)
    try:
        chosen = path(model, x)
    finally:
        torch.set_float32_matmul_precision("highest")
    if INTERPRETED and products == "bf16":
        assert "interpreter" in chosen.reason
    else:
        assert chosen.whole.tile.products == products


def test_non_finite_scale_is_an_error():
    """On the CPU: a GPU would have to be waited for."""
    model = make(6)
    with torch.no_grad(), nf.set_backend("triton" if INTERPRETED else "auto"):
        model.scaling.log_scale[2] = torch.inf
        for call in (model.log_prob, model, model.inverse):
            with pytest.raises(ValueError, match="log_scale must be finite, got inf at feature 2"):
                call(torch.zeros(1, 6))
        with pytest.raises(ValueError, match="log_scale must be finite"):
            model.sample(1)
