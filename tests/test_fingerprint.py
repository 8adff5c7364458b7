"""nicefast.fingerprint: a state_dict of another flow of the same shapes is refused."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import nicefast as nf
from nicefast.fingerprint import KEY

x = torch.randn(5, 6)


def flow(**options):
    return nf.NICE(6, **{"hidden": (7,), "couplings": 3, "partition": "random"} | options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prior": "normal"}, "a NICE with another prior"),
        ({"activation": "elu"}, "a MLP with another activation"),
        ({"partition": "half"}, "an? AdditiveCoupling with another partition"),
        ({"partition": nf.Partition.random(6, seed=3)}, "AdditiveCoupling with another partition"),
        ({"grid": 2.0**-8}, "AdditiveCoupling with another partition or grid"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_another_flow_is_refused(options, says, strict, assign):
    own = flow()
    with pytest.raises(RuntimeError, match=says):
        own.load_state_dict(flow(**options).state_dict(), strict=strict, assign=assign)


@pytest.mark.parametrize("assign", [True, False])
def test_the_same_flow_is_loaded_with_and_without_it(assign):
    other = flow()
    for state in (
        other.state_dict(),
        {k: v for k, v in other.state_dict().items() if not k.endswith(KEY)},
    ):
        own = flow()
        assert own.load_state_dict(state, strict=True, assign=assign) == ([], [])
        assert torch.equal(own.log_prob(x), other.log_prob(x))


def test_a_layer_of_ones_own_is_looked_at_too():
    def layer(seed):
        return torch.nn.Sequential(
            nf.AdditiveCoupling(nf.Partition.random(6, seed), torch.nn.Linear(3, 3))
        )

    with pytest.raises(RuntimeError, match=r"0\.fingerprint: .* another partition"):
        layer(1).load_state_dict(layer(2).state_dict())
    layer(1).load_state_dict(layer(1).state_dict())


def test_a_replaced_partition_counts():
    own, other = flow(), flow()
    for coupling in other.couplings:
        coupling.partition = nf.Partition.half(6)
    with pytest.raises(RuntimeError, match="another partition"):
        own.load_state_dict(other.state_dict())
    own = flow(partition=[nf.Partition.half(6)] * 3)
    own.load_state_dict(other.state_dict())


def test_it_is_no_buffer_and_survives_casts_copies_and_means():
    own = flow()
    assert not list(own.buffers())
    again = copy.deepcopy(own).half().double().to("meta").to_empty(device="cpu")
    again.load_state_dict(own.double().state_dict())
    assert torch.equal(again.log_prob(x), own.log_prob(x))
    mean = {k: 0.9 * v + 0.1 * v for k, v in own.state_dict().items()}
    again.load_state_dict(mean)
    averaged = AveragedModel(own, use_buffers=True)
    averaged.update_parameters(own)
    averaged.update_parameters(own)
    again.load_state_dict(averaged.module.state_dict())
    meta = flow().to("meta")
    meta.load_state_dict(own.state_dict(), assign=True)
    assert torch.equal(meta.log_prob(x), own.log_prob(x))


def test_torch_func_and_compile_do_not_see_it():
    own = flow()
    expected = own.log_prob(x)
    called = torch.func.functional_call(own, dict(own.named_parameters()), (x,))
    assert torch.allclose(called[0], own(x)[0])
    state, _ = torch.func.stack_module_state([own, flow()])
    assert not any(k.endswith(KEY) for k in state)
    compiled = torch.compile(own.log_prob, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)
