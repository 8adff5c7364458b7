"""Whatever is changed after accelerate is seen: a fast flow and its copy that is not fast are
changed alike, in random ways one after the other, and stay alike."""

import copy
import io
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_leaves

import nicefast as nf

nflows = pytest.importorskip("nflows", reason="needs nflows")
normflows = pytest.importorskip("normflows", reason="needs normflows")
zuko = pytest.importorskip("zuko", reason="needs zuko")
pytest.importorskip("FrEIA", reason="needs FrEIA")

from FrEIA.framework import SequenceINN  # noqa: E402
from FrEIA.modules import NICECouplingBlock  # noqa: E402
from nflows.distributions import StandardNormal  # noqa: E402
from nflows.flows import Flow  # noqa: E402
from nflows.transforms import AdditiveCouplingTransform, CompositeTransform  # noqa: E402
from zuko.transforms import AdditiveTransform, MonotonicAffineTransform  # noqa: E402

D, COUPLINGS = 6, 2


class Net(nn.Module):
    """A conditioner with what acts differently in training and in evaluation mode."""

    def __init__(self, a, b):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(a, 5), nn.BatchNorm1d(5), nn.Linear(5, b)

    def forward(self, x, context=None):
        return self.last(torch.tanh(self.norm(self.first(x))))


def masks(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(D, generator=generator) % 2 for _ in range(COUPLINGS)]


def make_nflows(seed):
    made = [AdditiveCouplingTransform(mask, Net) for mask in masks(seed)]
    return Flow(CompositeTransform(made), StandardNormal((D,)))


def make_normflows(make):
    def flow(seed):
        made = [each for mask in masks(seed) for each in make(mask)]
        return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(D), made)

    return flow


def masked(mask):
    return [normflows.flows.MaskedAffineFlow(mask.float(), Net(D, D))]


def block(mode):
    half = normflows.flows.AffineCouplingBlock
    return lambda mask: [half(Net(D // 2, D // 2), scale=False, split_mode=mode)]


def halves(mask):
    of = normflows.flows
    coupling = of.AffineCoupling(Net(D // 2, D // 2), scale=False)
    return [of.Split("channel"), coupling, of.Merge("channel")]


def make_zuko(seed):
    options = {"univariate": AdditiveTransform, "shapes": [()], "hidden_features": (5,)}
    flow = zuko.flows.NICE(D, transforms=COUPLINGS, **options)
    for coupling, mask in zip(flow.transform.transforms, masks(seed), strict=True):
        coupling.mask.copy_(mask.bool())
        coupling.hyper = Net(D // 2, D // 2)
    return flow


def make_freia(seed):
    flow = SequenceINN(D)
    for _ in range(COUPLINGS):
        flow.append(NICECouplingBlock, subnet_constructor=Net, split_len=3)
    return flow


KINDS = {
    "nflows": make_nflows,
    "masked": make_normflows(masked),
    "channel": make_normflows(block("channel")),
    "channel_inv": make_normflows(block("channel_inv")),
    "checkerboard": make_normflows(block("checkerboard")),
    "halves": make_normflows(halves),
    "zuko": make_zuko,
    "freia": make_freia,
}
CONDITIONERS = ("transform_net", "param_map", "t", "hyper", "F", "G")
BUFFERS = ("identity_features", "transform_features", "b", "mask")


def both_ways(flow, x):
    if isinstance(flow, Flow):
        return flow.log_prob(x), flow._transform.inverse(x)
    if isinstance(flow, SequenceINN):
        return flow(x), flow(x, rev=True)
    if isinstance(flow, normflows.NormalizingFlow):
        return flow.log_prob(x), flow.forward_and_log_det(x)
    # (the inverse's log-determinant has zuko call its conditioners a second time)
    return flow().log_prob(x), flow().transform.inv(x)


def results(flow):
    """Values and gradients of both directions."""
    p = next(flow.parameters())
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(0)).to(p.dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = tree_leaves(both_ways(flow, x))
    torch.manual_seed(0)
    x.requires_grad_()
    found = tree_leaves(both_ways(flow, x))
    loss = sum(t.sin().sum() for t in found if torch.is_tensor(t))
    inputs = [x, *(q for q in flow.parameters() if q.requires_grad)]
    return plain, found, torch.autograd.grad(loss, inputs, allow_unused=True)


def results_or_error(flow):
    try:
        return results(flow)
    except RuntimeError as error:
        return type(error)


def assert_alike(before, after, said):
    found = [results_or_error(flow) for flow in (before, after)]
    if RuntimeError in found:  # theirs keep buffers of inference mode for a gradient, say
        assert found[0] is RuntimeError, said
        return
    for a, b in zip(*map(tree_leaves, found), strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-4, msg=lambda m: f"{said}: {m}")
    for a, b in zip(before.buffers(), after.buffers(), strict=True):  # running statistics
        torch.testing.assert_close(b, a, msg=lambda m: f"{said}: {m}")


# --- ways to change a flow: each gets the flow and a generator of numbers, and may return another


def modules_of(flow, kinds):
    return [m for name, m in flow.named_modules() if name.rpartition(".")[2] in kinds]


def conditioners(flow):
    return modules_of(flow, CONDITIONERS)


def couplings(flow):
    return [m for m in flow.modules() if any(name in m._modules for name in CONDITIONERS)]


def one(rng, found):
    return found[rng.randrange(len(found))]


def masks_of(flow, rng):
    """Each buffer that says a partition, and the values that another one has."""
    for coupling in couplings(flow):
        order = torch.tensor(rng.sample(range(D), D))
        new = {
            "identity_features": order[:3].sort().values,
            "transform_features": order[3:].sort().values,
            "b": (order % 2).float()[None],
            "mask": order % 2 == 0,
        }
        for name in BUFFERS:
            buffer = coupling._buffers.get(name)
            if buffer is not None:
                yield coupling, name, buffer, new[name].to(buffer.dtype)


def through_data(flow, rng):
    for _, _, buffer, new in masks_of(flow, rng):
        buffer.data.copy_(new)


def data_replaced(flow, rng):
    for _, _, buffer, new in masks_of(flow, rng):
        buffer.data = new


def numpy_view(flow, rng):
    for _, _, buffer, new in masks_of(flow, rng):
        buffer.numpy()[...] = new.numpy()


def in_place(flow, rng):
    for _, _, buffer, new in masks_of(flow, rng):
        buffer.copy_(new)


def in_inference_mode(flow, rng):
    with torch.inference_mode():
        for coupling, name, _, new in masks_of(flow, rng):
            setattr(coupling, name, new.clone())
        for _, _, buffer, new in masks_of(flow, rng):
            buffer.copy_(new)


def another_buffer(flow, rng):
    for coupling, name, _, new in masks_of(flow, rng):
        setattr(coupling, name, new)


def a_strided_buffer(flow, rng):
    for coupling, name, _, new in masks_of(flow, rng):
        setattr(coupling, name, torch.stack((new, new), -1)[..., 0])


def other(flow, rng):
    kind = next(k for k, make in KINDS.items() if k == flow.kind)
    seed = rng.randrange(1000)
    torch.manual_seed(seed)
    return KINDS[kind](seed).to(next(flow.parameters()).dtype)


def loaded(flow, rng):
    flow.load_state_dict(other(flow, rng).state_dict(), strict=False)


def assigned(flow, rng):
    flow.load_state_dict(other(flow, rng).state_dict(), strict=False, assign=True)


def deep_copied(flow, rng):
    return copy.deepcopy(flow)


def pickled(flow, rng):
    return pickle.loads(pickle.dumps(flow))


def saved(flow, rng):
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def doubled(flow, rng):
    return flow.double()


def single(flow, rng):
    return flow.float()


def training(flow, rng):
    return flow.train()


def evaluating(flow, rng):
    return flow.eval()


def one_conditioner_evaluates(flow, rng):
    one(rng, conditioners(flow)).eval()


def doubles(module, args, output):
    """A hook that changes what comes out."""
    return tuple_like(output, lambda t: t * 2)


def tuple_like(output, change):
    if torch.is_tensor(output):
        return change(output)
    if isinstance(output, list):
        return [tuple_like(t, change) for t in output]
    if isinstance(output, tuple):
        return (tuple_like(output[0], change), *output[1:])
    return output


def halves_input(module, args):
    first = args[0] if args else None
    return (tuple_like(first, lambda t: t / 2), *args[1:]) if first is not None else None


def hook_on_a_conditioner(flow, rng):
    one(rng, conditioners(flow)).register_forward_hook(doubles)


def pre_hook_on_a_conditioner(flow, rng):
    one(rng, conditioners(flow)).register_forward_pre_hook(halves_input)


def parts(flow):
    return [p for c in couplings(flow) for p in c.modules()] + [
        p for m in flow.modules() for p in m.children() if isinstance(m, nn.ModuleList)
    ]


def hook_on_any_part(flow, rng):
    one(rng, parts(flow)).register_forward_hook(doubles)


def pre_hook_on_any_part(flow, rng):
    part = one(rng, parts(flow))
    part.register_forward_pre_hook(halves_input)


def gradient_hook(module, given, wanted):
    return tuple(None if t is None else t * 2 for t in given)


def backward_hook_on_a_conditioner(flow, rng):
    one(rng, conditioners(flow)).register_full_backward_hook(gradient_hook)


class Swapped(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.old = old

    def forward(self, *given):
        return torch.sin(self.old(*given)) + 0.25


def another_conditioner(flow, rng):
    coupling = one(rng, couplings(flow))
    name = one(rng, [name for name in CONDITIONERS if name in coupling._modules])
    setattr(coupling, name, Swapped(getattr(coupling, name)))


class Negated:
    """A method put on an instance; it can be copied and pickled with it."""

    def __init__(self, module, name):
        self.kind, self.name, self.module = type(module), name, module

    def __call__(self, *given, **options):
        return tuple_like(
            getattr(type(self.module), self.name)(self.module, *given, **options), neg
        )


def neg(t):
    return -t


def own_method(flow, rng):
    """One of its class's methods replaced on an instance: forward, or what forward calls."""
    names = (
        "forward", "inverse", "_scale_and_shift", "_coupling_transform_forward",
        "_coupling_transform_inverse", "_coupling1", "_coupling2",
    )  # fmt: skip
    part = one(rng, parts(flow))
    found = [name for name in names if hasattr(type(part), name)]
    if isinstance(part, nn.ModuleList) or hasattr(part, "mask"):
        return
    name = one(rng, found)
    object.__setattr__(part, name, Negated(part, name))


def twice_the_shift(shift):
    return AdditiveTransform(2 * shift)


def other_settings(flow, rng):
    """What a constructor was told, told anew."""
    for m in flow.modules():
        if hasattr(m, "univariate"):
            m.univariate = twice_the_shift
        elif isinstance(m, normflows.flows.MaskedAffineFlow):
            m.s = (
                Swapped(Net(D, D).to(m.b.dtype).eval()) if rng.random() < 0.5 else torch.zeros_like
            )
        elif type(m).__name__ == "Split":
            m.mode = {"channel": "channel_inv", "channel_inv": "channel"}.get(m.mode, m.mode)
        elif type(m).__name__ == "AdditiveCouplingTransform" and rng.random() < 0.5:
            m.unconditional_transform = nflows.transforms.PointwiseAffineTransform(0.5, 2.0)


def more_parts(flow, rng):
    for m in flow.modules():
        if isinstance(m, normflows.flows.AffineCouplingBlock):
            m.flows.append(normflows.flows.Permute(D, mode="swap"))


def other_parts(flow, rng):
    """A part of a block in its place: it scales, or comes of a subclass."""
    for m in flow.modules():
        if isinstance(m, normflows.flows.AffineCouplingBlock):
            dtype = next(m.parameters()).dtype
            m.flows[1] = normflows.flows.AffineCoupling(Net(D // 2, D).to(dtype).eval(), scale=True)


class Louder(normflows.flows.AffineCoupling):
    def forward(self, z):
        (z1, z2), log_det = super().forward(z)
        return [z1, 2 * z2], log_det


def part_of_a_subclass(flow, rng):
    for m in flow.modules():
        if isinstance(m, normflows.flows.AffineCouplingBlock):
            louder = Louder(m.flows[1].param_map, scale=False)
            m.flows[1] = louder


def linears(flow):
    return [m for m in flow.modules() if isinstance(m, nn.Linear)]


class Third(nn.Module):
    def forward(self, x):
        return x / 3


def parametrized(flow, rng):
    parametrize.register_parametrization(one(rng, linears(flow)), "weight", Third(), unsafe=True)


def weight_norm(flow, rng):
    found = [m for m in linears(flow) if not parametrize.is_parametrized(m)]
    if found:
        parametrizations.weight_norm(one(rng, found))


def pruned(flow, rng):
    found = [m for m in linears(flow) if not parametrize.is_parametrized(m)]
    found = [m for m in found if isinstance(m._parameters.get("weight"), nn.Parameter)]
    if found:
        prune.ln_structured(one(rng, found), "weight", 0.4, 2, 0)


def weights_written(flow, rng):
    p = one(rng, list(flow.parameters()))
    p.data.mul_(1.5)


def accelerated_again(flow, rng):
    if flow.fast:
        nf.accelerate(flow)


def restored(flow, rng):
    if flow.fast:
        nf.restore(flow)
        nf.accelerate(flow)


# copies of what is parametrised by a class of its own cannot be pickled: PyTorch says so
COPIES = (deep_copied, pickled, saved)
CHANGES = [
    through_data, data_replaced, numpy_view, in_place, in_inference_mode, another_buffer,
    a_strided_buffer, loaded, assigned, deep_copied, pickled, saved, doubled, single, training,
    evaluating, one_conditioner_evaluates, hook_on_a_conditioner, pre_hook_on_a_conditioner,
    hook_on_any_part, pre_hook_on_any_part, backward_hook_on_a_conditioner, another_conditioner,
    own_method, other_settings, more_parts, other_parts, part_of_a_subclass, parametrized,
    weight_norm, pruned, weights_written, accelerated_again, restored,
]  # fmt: skip


def changed(flow, change, seed):
    if change in (pickled, saved) and flow.kind == "freia":
        change = deep_copied  # FrEIA's blocks have functions that cannot be pickled
    torch.manual_seed(seed)
    found = change(flow, random.Random(seed))
    return flow if found is None else found


def pair(kind, seed=0):
    torch.manual_seed(seed)
    before = KINDS[kind](seed).eval()
    before.kind, before.fast = kind, False
    after = copy.deepcopy(before)
    assert len(nf.accelerate(after).replaced) == COUPLINGS
    after.fast = True
    for flow in (before, after):  # what a first call finds
        both_ways(flow, torch.ones(2, D))
    return before, after


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["nflows", "masked", "channel", "halves", "zuko", "freia"])
def test_each_change_is_seen(kind, change):
    assert_alike(*(changed(flow, change, 1) for flow in pair(kind)), change.__name__)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_one_after_the_other(kind):
    for seed in range(5):
        rng, flows, said = random.Random(seed), pair(kind, seed), []
        for step in range(5):
            change = one(rng, CHANGES)
            said.append(change.__name__)
            try:
                flows_now = [changed(flows[0], change, 10 * seed + step)]
            except (RuntimeError, NotImplementedError) as refused:
                with pytest.raises(type(refused)):
                    changed(flows[1], change, 10 * seed + step)
                break
            flows = [*flows_now, changed(flows[1], change, 10 * seed + step)]
            assert_alike(*flows, said)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", ["nflows", "masked", "zuko"])
def test_a_copy_of_a_flow_whose_masks_were_loaded(kind, copied):
    """A copy has the partitions that its masks say, whatever was kept for those before."""
    _, model = pair(kind, 0)
    model.load_state_dict(KINDS[kind](1).state_dict(), strict=False)
    again = copied(model, None)
    assert_alike(model, again, copied.__name__)
    nf.restore(again)
    assert_alike(model, again, "restored")


def test_hooks_of_all_modules_see_the_parts_of_a_block():
    before, after = pair("channel")
    for flow in (before, after):
        with global_hooks.register_module_forward_hook(doubles):
            flow.seen = tree_leaves(both_ways(flow, torch.ones(2, D)))
    torch.testing.assert_close(after.seen, before.seen)


@pytest.mark.parametrize("univariate", [AdditiveTransform, MonotonicAffineTransform])
def test_a_transform_of_zuko_follows_its_coupling(univariate):
    """A transform that was made before looks its coupling's conditioner up when it is called."""
    before, after = pair("zuko")
    x, found = torch.randn(4, D), []
    for flow in (before, after):
        torch.manual_seed(0)
        coupling = flow.transform.transforms[0]
        made = coupling()
        total = 3 * (1 if univariate is AdditiveTransform else 2)
        coupling.hyper, coupling.univariate = nn.Linear(3, total), univariate
        coupling.shapes = [()] if univariate is AdditiveTransform else [(), ()]
        coupling.total = len(coupling.shapes)
        found.append((made.call_and_ladj(x), made.inv.call_and_ladj(x)))
        found[-1] += (made(x), made.inv(x), made.log_abs_det_jacobian(x, x))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("kind", ["channel", "checkerboard"])
def test_each_part_of_a_block_is_looked_at_in_each_call(kind, part):
    def hook(module):
        module.register_forward_hook(doubles)

    def forward(module):
        module.forward = Negated(module, "forward")

    def inverse(module):
        module.inverse = Negated(module, "inverse")

    for change in (hook, forward, inverse):
        before, after = pair(kind)
        for flow in (before, after):
            change(flow.flows[0].flows[part])
        assert_alike(before, after, change.__name__)


@pytest.mark.parametrize("method", ["_coupling1", "_coupling2", "_scale_and_shift", "meta"])
def test_methods_put_on_an_instance_later_are_called(method):
    kind = {"_scale_and_shift": "nflows", "meta": "zuko"}.get(method, "freia")
    before, after = pair(kind)
    for flow in (before, after):
        coupling = couplings(flow)[0]
        own = Negated(coupling, method)
        if method == "_scale_and_shift":
            own = lambda shift: (torch.ones_like(shift), 2 * shift)  # noqa: E731
        if method == "meta":
            own = lambda c, x, m=coupling: MonotonicAffineTransform(m.hyper(x), x)  # noqa: E731
        setattr(coupling, method, own)
    assert_alike(before, after, method)


def test_a_block_whose_inner_coupling_is_fast_already():
    before = block("channel")(None)[0]
    after = copy.deepcopy(before)
    assert len(nf.accelerate(after.flows[1]).replaced) == 1
    report = nf.accelerate(after)
    assert [found.kind for found in report.replaced] == ["AffineCouplingBlock"]
    assert report.left == ()
    x = torch.randn(4, D)
    torch.testing.assert_close(after.eval()(x), before.eval()(x))
    assert nf.restore(after) == 2
    assert [type(m) for m in after.modules()] == [type(m) for m in before.modules()]
    after.flows[1] = Louder(after.flows[1].param_map, scale=False)
    reason = nf.accelerate(after).left[0].reason
    assert "test_changes_after.Louder" in reason
    assert "expected normflows' Split, AffineCoupling and Merge" in reason


def test_indices_on_a_device_are_not_waited_for(monkeypatch):
    """nflows' own are on the device of its model; as asked for there, on the CPU."""
    from nicefast.compat import nflows as fast

    before, after = pair("nflows")
    monkeypatch.setattr(fast, "_CPU", torch.device("meta"))
    monkeypatch.setattr(fast, "contents", None)
    for change in (weights_written, loaded, through_data):
        flows = [changed(flow, change, 3) for flow in (before, after)]
        assert_alike(*flows, change.__name__)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("kind", KINDS)
def test_make_fx_of_couplings_that_were_never_called(kind, mode):
    """A trace shows the library's own code, warm or cold, and calls of it give the same."""
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.manual_seed(0)
    before = KINDS[kind](0).eval()
    after = copy.deepcopy(before)
    nf.accelerate(after)
    x, other = torch.randn(3, D), torch.randn(3, D)
    try:
        graph = make_fx(lambda x: tree_leaves(both_ways(before, x)), mode)(x)
    except Exception as refused:
        with pytest.raises(type(refused)):
            make_fx(lambda x: tree_leaves(both_ways(after, x)), mode)(x)
        return
    own = make_fx(lambda x: tree_leaves(both_ways(after, x)), mode)(x)
    assert [n.target for n in own.graph.nodes if n.op == "call_function"] == [
        n.target for n in graph.graph.nodes if n.op == "call_function"
    ]
    torch.testing.assert_close(own(other), tree_leaves(both_ways(before, other)))
    torch.testing.assert_close(after and tree_leaves(both_ways(after, other)), own(other))
