"""Shapes, dtypes, and what bad input gets."""

import math

import numpy as np
import pytest
import torch

import nicefast as nf

F, R = nf.functional, nf.reference
P4 = nf.Partition.alternating(4)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 0, 3), (1, 1)])
def test_any_leading_shape(backend, device, batch):
    x = torch.randn(*batch, 4, device=device, requires_grad=True)
    shift = torch.randn(*batch, 2, device=device)
    s = torch.randn(4, device=device)
    y = F.additive_coupling(x, shift, P4)
    assert y.shape == x.shape
    assert torch.allclose(y, R.additive_coupling(x, shift, P4))
    same, x1 = F.split_features(x, P4)
    assert same.shape == x.shape
    assert torch.equal(x1, x[..., ::2])
    z, log_prob = F.scale_log_prob(y, s, return_z=True)
    assert z.shape == x.shape
    assert log_prob.shape == batch
    assert torch.allclose(log_prob, R.scale_log_prob(y, s), atol=1e-5)
    log_prob.sum().backward()
    assert x.grad.shape == x.shape


def test_shift_broadcasts(backend, device):
    x = torch.randn(3, 5, 4, device=device)
    for shape in ((2,), (5, 2), (3, 1, 2)):
        shift = torch.randn(shape, device=device, requires_grad=True)
        y = F.additive_coupling(x, shift, P4)
        assert torch.allclose(y, R.additive_coupling(x, shift.expand(3, 5, 2), P4))
        y.sum().backward()
        assert torch.allclose(shift.grad, torch.full_like(shift, 30 / shift.numel()))


@pytest.mark.parametrize("x_type", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64])
def test_results_are_never_narrower_than_inputs(backend, device, x_type, other):
    x = torch.randn(3, 4, dtype=x_type, device=device, requires_grad=True)
    shift = torch.randn(3, 2, dtype=other, device=device, requires_grad=True)
    bias = torch.randn(2, dtype=other, device=device, requires_grad=True)
    y = F.additive_coupling(x, shift, P4, bias=bias)
    assert y.dtype == torch.promote_types(x_type, other)
    s = torch.randn(4, dtype=other, device=device, requires_grad=True)
    z, log_prob = F.scale_log_prob(x, s, return_z=True)
    assert z.dtype == torch.promote_types(x_type, other)
    assert log_prob.dtype == torch.promote_types(z.dtype, torch.float32)
    assert F.scale_log_prob(x, s).dtype == log_prob.dtype
    (y.float().sum() + z.float().sum() + log_prob.float().sum()).backward()
    for t in (x, shift, bias, s):
        assert t.grad.dtype == t.dtype
        assert t.grad.isfinite().all()


@pytest.mark.parametrize("features", [1, 63, 64, 65, 128, 200, 5000])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e30])
def test_the_logistic_density_of_any_number_of_features(features, size):
    """Also where each is as dense as can be, and where it is denser than numbers go."""
    h = size * torch.randn(5, features)
    got = F.scale_log_prob(h, torch.zeros(features))
    want = R.scale_log_prob(h.double(), torch.zeros(features).double())
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)


def test_inputs_are_left_alone(backend, device):
    x, shift = torch.randn(3, 4, device=device), torch.randn(3, 2, device=device)
    copies = x.clone(), shift.clone()
    F.scale_log_prob(F.additive_coupling(x, shift, P4), torch.zeros(4, device=device))
    assert torch.equal(x, copies[0])
    assert torch.equal(shift, copies[1])


def test_incoming_gradients_are_left_alone(backend, device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    g = torch.randn(3, 4, device=device)
    kept = g.clone()
    y, x1 = F.split_features(x, P4)
    out = F.additive_coupling(y, torch.tanh(x1), P4)
    torch.autograd.grad(out, x, g)
    assert torch.equal(g, kept)


X, S2, LS = torch.zeros(3, 4), torch.zeros(3, 2), torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: F.additive_coupling(X[:, :3], S2, P4),
            ValueError,
            r"x must have 4 features.*\(3, 3\)",
        ),
        (lambda: F.additive_coupling(X.int(), S2, P4), TypeError, "x must be float16.*int32"),
        (
            lambda: F.additive_coupling([1.0], S2, P4),
            TypeError,
            r"x must be a torch.Tensor, got list",
        ),
        (lambda: F.additive_coupling(X, S2.long(), P4), TypeError, "shift must be float16.*int64"),
        (
            lambda: F.additive_coupling(X, X, P4),
            ValueError,
            r"shift must have shape \(3, 2\).*\(3, 4\)",
        ),
        (lambda: F.additive_coupling(X, S2[:2], P4), ValueError, r"shift must have shape \(3, 2\)"),
        (
            lambda: F.additive_coupling(X, S2, "half"),
            TypeError,
            "partition must be a nicefast.Partition",
        ),
        (
            lambda: F.additive_coupling(X, S2, P4, bias=LS),
            ValueError,
            r"bias must have shape \(2,\)",
        ),
        (
            lambda: F.additive_coupling(X, S2.to("meta"), P4),
            ValueError,
            "shift must be on cpu.*meta",
        ),
        (lambda: F.split_features(X[:, :2], P4), ValueError, "x must have 4 features"),
        (
            lambda: F.scale_log_prob(X, LS[:3]),
            ValueError,
            r"log_scale must have shape \(4,\).*\(3,\)",
        ),
        (lambda: F.scale_log_prob(X.long(), LS), TypeError, "h must be float16.*int64"),
        (
            lambda: F.scale_log_prob(X, LS, "cauchy"),
            ValueError,
            "prior must be one of logistic, normal",
        ),
        (lambda: F.scale_log_prob(X, LS.to("meta")), ValueError, "log_scale must be on cpu"),
        (
            lambda: F.scale_log_prob(X, LS + torch.inf),
            ValueError,
            "log_scale must be finite, got inf",
        ),
        (
            lambda: F.scale_log_prob(X, LS * torch.nan),
            ValueError,
            "log_scale must be finite, got nan",
        ),
        (lambda: F.sample_prior(LS * torch.nan, 2), ValueError, "log_scale must be finite"),
        (lambda: F.sample_prior(LS, -1), ValueError, "n must be an integer >= 0, got -1"),
        (lambda: F.sample_prior(LS, 2, row_offset=2**63), ValueError, r"row_offset must be below"),
        (lambda: F.sample_prior(LS, 2, "cauchy"), ValueError, "prior must be one of"),
        (lambda: F.sample_prior(LS, 2, seed=-1), ValueError, "seed must be at least 0"),
        (
            lambda: F.sample_prior(LS, 2, seed=2**63),
            ValueError,
            "seed must be at least 0 and below",
        ),
        *(
            (lambda seed=seed: F.sample_prior(LS, 2, seed=seed), TypeError, "seed must be an int")
            for seed in ("a", 1.5, True, math.nan, [1], torch.ones(3))
        ),
        (
            lambda: F.sample_prior(LS, 2, generator=3),
            TypeError,
            "generator must be a torch.Generator, got int",
        ),
        (lambda: F.draw_seed("a"), TypeError, "generator must be a torch.Generator, got str"),
        (
            lambda: F.sample_prior(LS, 2, dtype=torch.int32),
            TypeError,
            "dtype must be floating point",
        ),
        (
            lambda: F.sample_prior(LS, 2, dtype="a"),
            TypeError,
            "dtype must be a torch.dtype, got str",
        ),
        (lambda: F.sample_prior(X, 2), ValueError, r"log_scale must have shape \(D,\)"),
        (
            lambda: F.additive_coupling_(X.clone().requires_grad_(), S2, P4),
            ValueError,
            "records no gradient",
        ),
        (
            lambda: F.additive_coupling_(X[:1].expand(3, 4), S2, P4),
            ValueError,
            "must not be expanded",
        ),
        (lambda: F.additive_coupling_(X.clone(), S2.double(), P4), TypeError, "must not be wider"),
        (
            lambda: F.additive_coupling_(torch.zeros(3, 2, 4).transpose(0, 1), torch.zeros(2), P4),
            ValueError,
            "viewable as rows",
        ),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_numpy_integers_are_seeds():
    drawn = F.sample_prior(LS, 2, seed=np.int64(3))
    assert torch.equal(drawn, F.sample_prior(LS, 2, seed=3))


@pytest.mark.parametrize("rows", [40, 50_000])
def test_z_lies_in_rows_whatever_h_does(rows):
    h, log_scale = torch.randn(6, rows).t(), torch.randn(6)
    z, _ = torch.ops.nicefast.scale_log_prob(h, log_scale, "logistic", True)
    assert z.is_contiguous()
    torch.library.opcheck(
        torch.ops.nicefast.scale_log_prob.default, (h, log_scale, "logistic", True)
    )
    assert torch.allclose(z, h * log_scale.exp())
