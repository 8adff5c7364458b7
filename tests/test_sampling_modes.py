"""Samples within torch.func.vmap, torch.compile and FakeTensorMode."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nicefast as nf


def flow(**options):
    torch.manual_seed(0)
    return nf.NICE(4, **{"hidden": (8,), "couplings": 3} | options)


CALLS = {
    "sample": lambda own, c: own.sample(5, c),
    "in batches": lambda own, c: own.sample(5, c, batch_size=2),
    "sample_and_log_prob": lambda own, c: own.sample_and_log_prob(5, c)[0],
    "rsample": lambda own, c: own.distribution(c).rsample((5,)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("context", [0, 2])
def test_vmap(name, context):
    own = flow(context=context)
    c = torch.randn(3, context) if context else None
    lanes = torch.zeros(3)

    def call(_, c=None):
        return CALLS[name](own, c)

    given = (lanes,) if c is None else (lanes, c)
    different = torch.func.vmap(call, randomness="different")(*given)
    assert different.shape[0] == 3
    assert not torch.allclose(different[0], different[1])
    if name != "rsample":
        assert different.shape[1:] == (5, 4)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call, randomness="error")(*given)
    same = torch.func.vmap(call, randomness="same")(*given)
    if c is None:
        # one draw for all lanes; without a tensor of its own a lane's result is the same tensor
        assert torch.equal(same[0], same[1])
    else:
        plain = [own.inverse(own.forward(x, k)[0], k)[0] for x, k in zip(same, c, strict=True)]
        assert torch.allclose(torch.stack(plain), same, atol=1e-4)
        z = [own.forward(x, k)[0] for x, k in zip(same, c, strict=True)]
        assert torch.allclose(z[0], z[1], atol=1e-4)


def test_vmap_over_log_scale_and_gradients():
    log_scale = torch.randn(3, 4) * 0.1

    def drawn(s):
        return nf.functional.sample_prior(s, 5)

    values = torch.func.vmap(drawn, randomness="different")(log_scale)
    assert values.shape == (3, 5, 4)
    grads = torch.func.vmap(torch.func.grad(lambda s: drawn(s).sum()), randomness="different")
    assert grads(log_scale).shape == (3, 4)


@pytest.mark.parametrize("name", CALLS)
def test_compile_without_a_break(name):
    own = flow()
    compiled = torch.compile(lambda: CALLS[name](own, None), backend="eager", fullgraph=True)
    with torch.no_grad():
        first, second = compiled(), compiled()
    assert first.shape == (5, 4)
    assert not torch.equal(first, second), "a seed is drawn in each call"
    z = own.forward(first)[0]
    assert z.isfinite().all()


def test_a_compiled_sample_is_that_of_its_seed():
    own = flow()
    compiled = torch.compile(lambda: own.sample(5), backend="eager", fullgraph=True)
    torch.manual_seed(3)
    got = compiled()
    torch.manual_seed(3)
    assert torch.allclose(got, own.sample(5), atol=1e-5)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("prior", ["logistic", "normal"])
def test_fake_tensors(inside, prior):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real = flow(prior=prior)
    with mode:
        own = flow(prior=prior) if inside else real
        x = torch.randn(6, 4)
        assert own.log_prob(x).shape == (6,)
        assert own.sample(5).shape == (5, 4)
        assert own.sample_and_log_prob(5)[1].shape == (5,)
        assert own(x)[0].shape == (6, 4)
    assert real.sample(2).isfinite().all()
