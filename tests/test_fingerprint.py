"""nicefast.fingerprint: a state_dict of another flow of the same shapes is refused."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import nicefast as nf
from nicefast.fingerprint import KEY, fingerprint

x = torch.randn(5, 6)
DIGESTS = {
    "_extra_state": [101, 10, 112, 112, 199, 81, 47, 217],
    "couplings.0._extra_state": [238, 171, 80, 175, 54, 232, 78, 156],
    "couplings.0.conditioner._extra_state": [140, 201, 125, 12, 161, 249, 150, 161],
}


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

    with pytest.raises(RuntimeError, match=r"0: these tensors are of a.* another partition"):
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
    assert torch.allclose(torch.func.functional_call(own, own.state_dict(), (x,))[0], called[0])
    state, _ = torch.func.stack_module_state([own, flow()])
    assert not any(k.endswith(KEY) for k in state)
    own = flow(partition="half")
    expected = own.log_prob(x)
    compiled = torch.compile(own.log_prob, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_fake_tensors_have_no_values_to_compare():
    from torch._subclasses.fake_tensor import FakeTensorMode

    state = flow(partition="half").state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True):
        own = flow(partition="half")
        own.load_state_dict(own.state_dict())
        own.load_state_dict(state, assign=True)


def test_a_default_device_and_dtype_change_nothing():
    own = flow()
    before = own.state_dict()
    with torch.device("meta"):
        assert all(v.device.type == "cpu" for v in own.state_dict().values())
        own.load_state_dict(before)
    torch.set_default_dtype(torch.float64)
    try:
        own.load_state_dict(before)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_know_it(tmp_path):
    """torch.distributed.checkpoint looks up every key of a state_dict in the module."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    own, again = flow(), flow()
    set_model_state_dict(again, get_model_state_dict(own))
    assert torch.equal(again.log_prob(x), own.log_prob(x))
    dcp.save({"model": own.state_dict()}, checkpoint_id=tmp_path)
    found = {"model": flow().state_dict()}
    dcp.load(found, checkpoint_id=tmp_path)
    again = flow()
    again.load_state_dict(found["model"])
    assert torch.equal(again.log_prob(x), own.log_prob(x))
    with pytest.raises(RuntimeError, match="another prior"):
        set_model_state_dict(flow(prior="normal"), get_model_state_dict(own))


def test_what_is_described_keeps_its_digest():
    """Or state_dicts of this version were refused by the next."""
    own = nf.NICE(4, hidden=(3,), couplings=1, partition="half")
    found = {k: v.tolist() for k, v in own.state_dict().items() if k.endswith(KEY)}
    assert found == DIGESTS


def test_one_that_is_wrong_is_noticed_wherever_it_is():
    for key in DIGESTS:
        own = nf.NICE(4, hidden=(3,), couplings=1, partition="half")
        state = own.state_dict()
        state[key] = fingerprint("another")
        with pytest.raises(RuntimeError, match="these tensors are of a"):
            own.load_state_dict(state)


def test_zuko_couplings_have_one():
    zuko = pytest.importorskip("zuko", reason="needs zuko")
    from nicefast.compat.zuko import AdditiveCoupling, Logistic, Scaling

    def lazy(seed):
        partition = nf.Partition.random(6, seed)
        layer = AdditiveCoupling(partition, nf.MLP(3, (4,), 3))
        return zuko.lazy.Flow([layer, Scaling(6)], Logistic(6))

    own = lazy(1)
    with pytest.raises(RuntimeError, match="AdditiveCoupling with another partition"):
        own.load_state_dict(lazy(2).state_dict())
    own.load_state_dict(lazy(1).state_dict())
    old = {k: v for k, v in lazy(2).state_dict().items() if not k.endswith(KEY)}
    own.load_state_dict(old, strict=True)


def test_what_was_changed_with_every_tensor_says_nothing():
    """As by code that maps over a state_dict: then it is no fingerprint any more."""
    own, other = flow(), flow()
    for change in (
        lambda v: v[:1].expand(v.shape).clone(),
        lambda v: v + 1,
        lambda v: v.flip(0),
        torch.zeros_like,
    ):
        state = {k: change(v) for k, v in other.state_dict().items()}
        own.load_state_dict(state)
