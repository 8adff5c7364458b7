"""A GPU's product makes 0 of NaN in its epilogue, where relu is: NaN is not lost all the same."""

from unittest import mock

import pytest
import torch

import nicefast as nf
from helpers import make
from nicefast import devices
from nicefast.fused import epilogue, handful, products, wide
from nicefast.fused.wide import WideFlow

KEPT = products.Products._kept
HALVES = {"hidden": (24, 16, 20), "couplings": 2, "partition": "half"}


@pytest.fixture
def epilogues(monkeypatch):
    """Products as a GPU's are; how many were asked for with relu."""
    real, asked = torch._addmm_activation, []

    def product(bias, a, b, **options):
        asked.append(1)
        return real(bias, a, b, **options).nan_to_num(0.0, torch.inf, -torch.inf)

    monkeypatch.setattr(torch, "_addmm_activation", product)
    monkeypatch.setattr(devices, "is_amd", lambda: True)  # elsewhere, a CPU's biases come after
    for module in (products, wide):
        monkeypatch.setattr(module, "keeps_nan", lambda _: False)
    return asked


def log_prob(model, x, context=None):
    """By the way that a GPU takes."""
    chain = nf.choose_path(model, x, context).chain
    with nf.set_backend("triton"), torch.no_grad():
        flow = WideFlow(chain, model.prior_name)
        return flow.forward(x, context, model.scaling.log_scale, want_log_prob=True)[1]


def expected(model, x, context=None):
    with nf.set_backend("reference"), torch.no_grad():
        return model.log_prob(x, context)


def test_usual_parameters_need_no_launch_of_their_own_for_relu(triton_backend, epilogues):
    model, x = make(6, **HALVES), torch.randn(9, 6)
    with nf.set_backend("auto"):
        found = log_prob(model, x)
    assert len(epilogues) == 2 * 3
    torch.testing.assert_close(found, expected(model, x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38, 1e25])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_no_parameter_is_missed(triton_backend, epilogues, layer, name, value):
    """In particular: not one that has changed."""
    model, x = make(6, **HALVES), torch.randn(9, 6)
    with nf.set_backend("auto"):
        log_prob(model, x)
        with torch.no_grad():
            p = getattr(model.couplings[0].conditioner.linears[layer], name)
            p[1] = value
            if name == "weight":
                p[2] = -value
        found, plain = log_prob(model, x), expected(model, x)
    assert torch.equal(found.isnan(), plain.isnan())
    assert torch.equal(found.isinf(), plain.isinf())


def test_an_overflow_that_later_weights_hide_is_not_missed(triton_backend, epilogues):
    model, x = make(6, **HALVES), 1e6 * torch.randn(9, 6)
    with torch.no_grad(), nf.set_backend("auto"):
        for linear, size in zip(
            model.couplings[0].conditioner.linears, (1e17, 1e17, 1.0, 1e-17), strict=True
        ):
            linear.weight.normal_().mul_(size)
        found, plain = log_prob(model, x), expected(model, x)
        assert plain.isnan().any()
        assert torch.equal(found.isnan(), plain.isnan())


def test_no_context_and_no_row_is_missed(triton_backend, epilogues):
    with nf.set_backend("auto"):
        model, x, c = make(6, context=2, **HALVES), torch.randn(9, 6), torch.randn(9, 2)
        c[4, 1] = torch.nan
        assert log_prob(model, x, c).isnan().nonzero().flatten().tolist() == [4]
        model = make(6, **HALVES)
        x[2, 1], x[7, 5] = torch.nan, torch.nan
        assert log_prob(model, x).isnan().nonzero().flatten().tolist() == [2, 7]
        assert epilogues
        with nf.set_backend("triton"), torch.no_grad():
            flow = WideFlow(nf.choose_path(model, x).chain, model.prior_name)
            z, _ = flow.forward(x, None, model.scaling.log_scale, want_z=True)
        assert z[2, 3:].isnan().all()


@pytest.mark.parametrize("poison", ["weight", "bias"])
def test_a_step_of_training_shows_it(epilogues, monkeypatch, poison):
    model, x = make(6, **HALVES), torch.randn(9, 6)
    with torch.no_grad():
        getattr(model.couplings[0].conditioner.linears[1], poison)[5] = torch.nan
    monkeypatch.setattr(products.OneDNN, "takes", lambda *_: False)
    monkeypatch.setattr(handful.Handful, "serves", lambda *_: False)
    steps = mock.patch.object(products.Products, "_kept", autospec=True, side_effect=KEPT)
    with steps as step:
        value = model.log_prob(x)
    assert step.call_count == 2 * 3
    assert value.isnan().all()
    assert not epilogues


def test_what_cannot_be_known_is_not_taken_for_granted(monkeypatch):
    model, x = make(6, **HALVES), torch.randn(9, 6)
    chain = nf.choose_path(model, x).chain
    assert epilogue.gives_numbers(chain)
    monkeypatch.setattr(epilogue, "is_capturing", lambda _: True)
    assert not epilogue.gives_numbers(chain)
    monkeypatch.undo()
    monkeypatch.setattr(epilogue, "versions", lambda _: [object()])  # of slices of one vector
    assert not epilogue.gives_numbers(nf.choose_path(make(6, **HALVES), x).chain)
    with torch.inference_mode():
        model = make(6, **HALVES)
    assert not epilogue.gives_numbers(nf.choose_path(model, x).chain)
