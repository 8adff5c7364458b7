"""from_state_dict: weights by the names and conventions of the common NICE repositories.

Each forward pass is written here from its repository's conventions, in plain PyTorch.
"""

import itertools

import pytest
import torch
from torch import nn

import nicefast as nf
from nicefast.compat import from_state_dict

DTYPES = [torch.float64, torch.float32]
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 3e-5, "atol": 1e-4},
}
D, H = 6, 8


def draw(*shape, dtype, scale=0.5):
    return scale * torch.randn(*shape, dtype=dtype)


def put(state, name, i, o, dtype):
    state[f"{name}.weight"], state[f"{name}.bias"] = draw(o, i, dtype=dtype), draw(o, dtype=dtype)


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def prior(z, kind):
    return nf.reference.prior_log_prob(z, kind).sum(1)


def fmu2(dtype, couplings=3, middle=2):
    state = {}
    for i in range(couplings):
        put(state, f"coupling.{i}.in_block.0", D // 2, H, dtype)
        for j in range(middle):
            put(state, f"coupling.{i}.mid_block.{j}.0", H, H, dtype)
        put(state, f"coupling.{i}.out_block", H, D // 2, dtype)
    state["scaling.scale"] = draw(1, D, dtype=dtype)
    return state


def fmu2_log_prob(state, x, kind, mask_config=1, couplings=3, middle=2):
    pairs = x.reshape(len(x), -1, 2)
    for i in range(couplings):
        on = 0 if (mask_config + i) % 2 else 1  # which of each pair is moved
        h = torch.relu(linear(state, f"coupling.{i}.in_block.0", pairs[..., 1 - on]))
        for j in range(middle):
            h = torch.relu(linear(state, f"coupling.{i}.mid_block.{j}.0", h))
        moved = pairs[..., on] + linear(state, f"coupling.{i}.out_block", h)
        kept = pairs[..., 1 - on]
        pairs = torch.stack((moved, kept) if on == 0 else (kept, moved), 2)
    z = pairs.reshape(len(x), -1) * state["scaling.scale"].exp()
    return prior(z, kind) + state["scaling.scale"].sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mask_config", "middle"), [(None, 2), (1, 0), (0, 1)])
@pytest.mark.parametrize("kind", ["logistic", "normal"])
def test_fmu2(dtype, kind, mask_config, middle):
    torch.manual_seed(0)
    state, x = fmu2(dtype, middle=middle), draw(9, D, dtype=dtype, scale=2)
    given = state
    if mask_config is not None:
        given = {"model_state_dict": state, "mask_config": float(mask_config), "iteration": 3}
    flow = from_state_dict(given, "fmu2/NICE", prior=kind)
    expected = fmu2_log_prob(state, x, kind, 1 if mask_config is None else mask_config, 3, middle)
    torch.testing.assert_close(flow.log_prob(x), expected, **TOLERANCE[dtype])
    assert not {p.data_ptr() for p in flow.parameters()} & {t.data_ptr() for t in state.values()}
    if dtype == torch.float32:
        assert flow.plan(x).name in ("rows", "kernel", "gemm")
    opposite = from_state_dict(
        state, "fmu2/NICE", prior=kind, partition=nf.Partition.alternating(D)
    )
    expected = fmu2_log_prob(state, x, kind, 0, 3, middle)
    torch.testing.assert_close(opposite.log_prob(x), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dakshidnani(dtype):
    torch.manual_seed(0)
    state, x = {}, draw(9, D, dtype=dtype, scale=2)
    for i in range(4):
        for j, (a, b) in enumerate(itertools.pairwise((D, H, H, D))):
            put(state, f"coupling_layers.{i}.m.{2 * j}", a, b, dtype)
    state["scaling_layer.log_scale_vector"] = draw(1, D, dtype=dtype)
    z = x
    for i in range(4):
        mask = (torch.arange(D) % 2 == (i + 1) % 2).to(dtype)  # ones are kept: odd first
        h = mask * z
        for j in range(3):
            h = linear(state, f"coupling_layers.{i}.m.{2 * j}", h)
            h = nn.functional.leaky_relu(h, 0.2) if j < 2 else h
        z = z + (1 - mask) * h
    s = state["scaling_layer.log_scale_vector"]
    expected = prior(z * s.exp(), "logistic") + s.sum()
    flow = from_state_dict(state, "DakshIdnani/pytorch-nice")
    torch.testing.assert_close(flow.log_prob(x), expected, **TOLERANCE[dtype])
    assert flow.couplings[0].conditioner[0].in_features == D // 2  # masked columns are gone
    relu = from_state_dict(state, "DakshIdnani/pytorch-nice", activation=nn.ReLU())
    assert type(relu.couplings[0].conditioner) is nf.MLP


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [3, 5])
def test_paultsw(dtype, layers):
    torch.manual_seed(0)
    half, x = D // 2, draw(9, D, dtype=dtype, scale=2)
    nets = []
    for _ in range(4):
        net = [nn.Linear(half, H)]
        for _ in range(layers):
            net += [nn.Linear(H, H), nn.ReLU(), nn.BatchNorm1d(H)]
        nets.append(nn.Sequential(*net, nn.Linear(H, half)).to(dtype))
        for _ in range(20):
            nets[-1](draw(50, half, dtype=dtype))  # running statistics
        for m in nets[-1]:
            if isinstance(m, nn.BatchNorm1d):
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
        nets[-1].eval()
    state = {f"layer{i + 1}.nonlinearity.{k}": v for i in range(4)
             for k, v in nets[i].state_dict().items()}  # fmt: skip
    state["scaling_diag"] = draw(D, dtype=dtype)
    z = x.clone()
    with torch.no_grad():
        for i, net in enumerate(nets):
            first = 1 - i % 2  # 'odd' first: those go into the net
            z[:, 1 - first :: 2] += net(z[:, first::2])
    s = state["scaling_diag"]
    flow = from_state_dict(state, "paultsw/nice_pytorch", prior="normal")
    expected = prior(z * s.exp(), "normal") + s.sum()
    torch.testing.assert_close(flow.log_prob(x), expected, **TOLERANCE[dtype])
    assert [m.out_features for m in flow.couplings[0].conditioner.linears] == [H] * layers + [half]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [5, 6])
def test_veriflow(dtype, d):
    torch.manual_seed(0)
    state, x = {}, draw(9, d, dtype=dtype, scale=2)
    for i in range(3):
        for j, (a, b) in enumerate(itertools.pairwise((d, H, H, d))):
            put(state, f"trainable_layers.{i}.conditioner.layers.{j}", a, b, dtype)
    state["trainable_layers.3.scale"] = draw(d, dtype=dtype) - 1
    mask = (torch.arange(d) < 2).to(dtype)
    z = x / state["trainable_layers.3.scale"]  # layers go from latent to data
    for i in (2, 1, 0):
        m = 1 - mask if i % 2 else mask
        h = m * z
        for j in range(3):
            h = linear(state, f"trainable_layers.{i}.conditioner.layers.{j}", h)
            h = torch.relu(h) if j < 2 else h
        z = z - (1 - m) * h
    expected = prior(z, "normal") - state["trainable_layers.3.scale"].abs().log().sum()
    half = nf.Partition.from_mask(mask.bool())
    for source in ("aai-institute/VeriFlow", "aai-institute/USFlows"):
        flow = from_state_dict(state, source, prior="normal", partition=half)
        torch.testing.assert_close(flow.log_prob(x), expected, **TOLERANCE[dtype])
    with pytest.raises(ValueError, match="partition must be given"):
        from_state_dict(state, "aai-institute/VeriFlow")
    state["trainable_layers.0.L_raw"] = torch.zeros(d, d)
    with pytest.raises(ValueError, match="LU layers"):
        from_state_dict(state, "aai-institute/VeriFlow", partition=half)


def test_mistakes_are_one_sentence():
    state = fmu2(torch.float32)
    with pytest.raises(ValueError, match="source must be one of fmu2/NICE"):
        from_state_dict(state, "fmu3/NICE")
    with pytest.raises(ValueError, match="prior must be one of"):
        from_state_dict(state, "fmu2/NICE", prior="laplace")
    with pytest.raises(TypeError, match=r"activation must be a torch.nn.Module"):
        from_state_dict(state, "fmu2/NICE", activation=torch.relu)
    for source in ("paultsw/nice_pytorch", "DakshIdnani/pytorch-nice", "aai-institute/VeriFlow"):
        with pytest.raises(ValueError, match=f"state_dict must be that of a NICE of {source}"):
            from_state_dict(state, source)
    with pytest.raises(ValueError, match="coupling 0 maps 3 to 3 features, expected 2 to 4"):
        from_state_dict(state, "fmu2/NICE", partition=nf.Partition.from_mask(torch.arange(D) < 2))
    del state["coupling.1.out_block.bias"]
    with pytest.raises(ValueError, match=r"it has no 'coupling.1.out_block.bias'"):
        from_state_dict(state, "fmu2/NICE")
    with pytest.raises(ValueError, match="it has no"):
        from_state_dict({}, "fmu2/NICE")
