"""What is deprecated says so and still works: choose_path; graphed, whatever happens to the
parameters, the precision or the batch."""

import pytest
import torch

import nicefast as nf
from helpers import Recorder, make

pytestmark = pytest.mark.filterwarnings("ignore:.*graphed is deprecated:DeprecationWarning")


@pytest.fixture
def recorder(monkeypatch):
    return Recorder.install(monkeypatch)


def test_choose_path():
    model, x = make(6), torch.zeros(3, 6)
    with pytest.warns(DeprecationWarning, match="use NICE.plan"):
        assert nf.choose_path(model, x).name == "products"
    with pytest.warns(DeprecationWarning, match="use NICE.plan"):
        found = nf.choose_path(model, x.double())
    assert (found.name, found.reason) == ("layer by layer", "float64 rows")


def test_graphed_says_what_to_use():
    with pytest.warns(DeprecationWarning, match="use NICE.frozen"):
        make(6).graphed(4)


@pytest.fixture(params=["auto", "triton"])
def paths(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    with nf.set_backend(request.param):
        yield


def same(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("rows", [0, 1, 4, 9])
def test_any_number_of_rows(recorder, paths, device, context, rows):
    model = make((2, 3), device=device, context=context)
    x = torch.randn(rows, 2, 3, device=device)
    c = torch.randn(rows, context, device=device) if context else None
    with torch.no_grad():
        got, expected = model.graphed(4)(x, c), model.log_prob(x, c)
        assert got.shape == expected.shape
        assert same(got, expected)
        for method in ("forward", "inverse"):
            for g, e in zip(
                model.graphed(4, method)(x, c), getattr(model, method)(x, c), strict=True
            ):
                assert g.shape == e.shape
                assert same(g, e)
    assert recorder.captures == (3 if rows else 0)


def test_leading_dimensions_and_shared_context(recorder, device):
    model = make(6, device=device, context=2)
    x, c = torch.randn(3, 5, 6, device=device), torch.randn(5, 2, device=device)
    assert same(model.graphed(7)(x, c), model.log_prob(x, c))
    assert not model.graphed(7)(x, c).requires_grad


def test_parameters_change(recorder, paths, device):
    model = make(6, device=device)
    score, x = model.graphed(8), torch.randn(8, 6, device=device)
    before = score(x)
    kept = before.clone()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    model.log_prob(x).sum().backward()
    optimizer.step()
    assert same(score(x), model.log_prob(x))
    assert not same(score(x), before)
    assert torch.equal(before, kept), "an earlier result was overwritten"
    model.load_state_dict(make(6).state_dict())
    assert same(score(x), model.log_prob(x))
    assert recorder.captures == 1
    linear = model.couplings[1].conditioner.linears[0]
    linear.weight = torch.nn.Parameter(2 * linear.weight.detach())
    assert same(score(x), model.log_prob(x))
    assert recorder.captures == 2
    model.couplings[1].partition = model.couplings[0].partition
    assert same(score(x), model.log_prob(x))
    assert recorder.captures == 3


def test_modes_change(recorder, device):
    model = make(6, device=device)
    score, x = model.graphed(8), torch.randn(8, 6, device=device)
    with torch.inference_mode():
        score(x)
    assert same(score(x), model.log_prob(x))
    with torch.autocast(device.type, torch.bfloat16):
        assert same(score(x), model.log_prob(x))
    with nf.set_backend("reference"):
        assert same(score(x), model.log_prob(x))
    assert same(score(x.double()).float(), model.log_prob(x))


@pytest.mark.parametrize("part", ["couplings.0", "scaling"])
def test_a_flow_whose_inside_is_not_known_is_not_captured(recorder, device, part):
    model = make(6, device=device)
    seen = []
    model.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    score, x = model.graphed(8, "forward"), torch.randn(8, 6, device=device)
    score(x), score(x)
    assert len(seen) == 2
    assert recorder.captures == 0


def test_nan_does_not_outlive_its_batch(recorder, device):
    model = make(6, device=device)
    score, x = model.graphed(8), torch.randn(8, 6, device=device)
    score(torch.full_like(x, torch.nan))
    assert same(score(x[:3]), model.log_prob(x[:3]))


def test_bad_arguments(device):
    model = make(6, device=device)
    with pytest.raises(ValueError, match="batch must be an integer >= 1, got 0"):
        model.graphed(0)
    with pytest.raises(ValueError, match="method must be one of log_prob, forward, inverse"):
        model.graphed(3, "sample")
    with pytest.raises(ValueError, match="x must have shape"):
        model.graphed(3)(torch.zeros(2, 5, device=device))
    with pytest.raises(ValueError, match="z must have shape"):
        model.graphed(3, "inverse")(torch.zeros(2, 5, device=device))
