"""torch.compile(fullgraph=True): the same values, the same gradients, the same operations."""

import copy
import shutil

import pytest
import torch

import nicefast as nf

HAS_COMPILER = any(shutil.which(c) for c in ("c++", "g++", "clang++"))
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler"),
    ),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(partition, **options):
    model = nf.NICE(6, hidden=(16, 8), couplings=3, partition=partition, **options)
    with torch.no_grad():
        model.scaling.log_scale.normal_(0, 0.5)
        for coupling in model.couplings:
            coupling.conditioner.linears[-1].reset_parameters()  # away from the identity
    return model


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize(
    "partition", ["half", pytest.param("alternating", marks=pytest.mark.long), "random"]
)
def test_log_prob(partition, compiler):
    model = make(partition)
    x = torch.randn(11, 6, requires_grad=True)
    weights = torch.randn(11)
    compiled = torch.compile(model.log_prob, fullgraph=True, backend=compiler)
    for rows in (11, 5):  # the second size recompiles with a symbolic one
        got, want = compiled(x[:rows]), model.log_prob(x[:rows])
        assert torch.allclose(got, want, atol=1e-5)
        inputs = [x, *model.parameters()]
        grads = torch.autograd.grad((got * weights[:rows]).sum(), inputs)
        wants = torch.autograd.grad((want * weights[:rows]).sum(), inputs)
        for a, b in zip(grads, wants, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("compiler", BACKENDS)
def test_context_forward_and_inverse(compiler):
    model = make("alternating", context=2, prior="normal")
    x, c = torch.randn(7, 6), torch.randn(7, 2)
    for function in (model.forward, model.inverse):
        for a, b in zip(
            torch.compile(function, fullgraph=True, backend=compiler)(x, c),
            function(x, c),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("partition", [pytest.param("half", marks=pytest.mark.long), "random"])
def test_a_whole_training_step_in_one_graph(partition, compiler):
    """Loss, backward and update in a single graph; three steps, against eager ones."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("needs a torch whose compiler traces autograd.grad")
    eager = make(partition)
    compiled = copy.deepcopy(eager)
    start = copy.deepcopy(eager)

    def step(model, x):
        loss = -model.log_prob(x).mean()
        parameters = list(model.parameters())
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.sub_(g, alpha=0.1)
        return loss.detach()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        fast = torch.compile(step, fullgraph=True, backend=compiler)
        for _ in range(3):
            x = torch.randn(16, 6)
            assert torch.allclose(fast(compiled, x), step(eager, x), atol=1e-5)
    moved = [
        not torch.equal(a, b) for a, b in zip(start.parameters(), eager.parameters(), strict=True)
    ]
    assert all(moved)
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("compiler", BACKENDS)
def test_a_training_step_with_an_optimizer(compiler):
    eager = make("alternating")
    compiled = copy.deepcopy(eager)
    results = []
    for model in (eager, compiled):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        log_prob, update = model.log_prob, optimizer.step
        if model is compiled:
            log_prob = torch.compile(log_prob, fullgraph=True, backend=compiler)
            update = torch.compile(update, backend=compiler)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = -log_prob(torch.randn(16, 6, generator=generator)).mean()
            loss.backward()
            update()
        results.append([loss, *model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_graph_holds_our_operations():
    """Forward and backward call the kernels' operations, not what they are made of."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = {}

    def record(which):
        def compiler(graph, inputs):
            targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
            seen[which] = {t.split(".")[1] for t in targets if t.startswith("nicefast.")}
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=record("forward"), bw_compiler=record("backward"))
    x = torch.randn(5, 6, requires_grad=True)
    torch.compile(make("alternating").log_prob, backend=backend, fullgraph=True)(x).sum().backward()
    assert seen["forward"] == {"select_features", "additive_coupling", "scale_log_prob"}
    assert seen["backward"] == {"select_features", "additive_coupling", "scale_log_prob_backward"}


def test_a_non_finite_log_scale_is_noticed_in_a_compiled_graph():
    model = make("half")
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(torch.zeros(2, 6))
        model.scaling.log_scale[0] = torch.nan
        with pytest.raises(ValueError, match="log_scale must be finite"):
            compiled(torch.zeros(2, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
def test_on_a_gpu(partition):
    model = make(partition).cuda()
    x = torch.randn(1000, 6, device="cuda", requires_grad=True)
    compiled = torch.compile(model.log_prob, fullgraph=True)
    got, want = compiled(x), model.log_prob(x)
    assert torch.allclose(got, want, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(got.sum(), [x, *model.parameters()]),
        torch.autograd.grad(want.sum(), [x, *model.parameters()]),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-2, rtol=1e-4)


def test_reference_noise_is_traced_too():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def sample(log_scale):
        return nf.reference.sample_prior(log_scale, 6, 3)

    log_scale = torch.zeros(8)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(log_scale), sample(log_scale))
    with FakeTensorMode():
        assert sample(torch.zeros(8)).shape == (6, 8)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("partition", ["half", "alternating", "random"])
@pytest.mark.parametrize("method", ["log_prob", "forward", "inverse"])
def test_an_exported_program_has_gradients(method, partition, strict):
    """It consists of PyTorch's own operations."""

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = make(partition)

        def forward(self, x):
            found = getattr(self.flow, method)(x)
            return found if isinstance(found, torch.Tensor) else found[0]

    model, x = Call(), torch.randn(9, 6)
    exported = torch.export.export(model, (x,), strict=strict)
    assert not [n for n in exported.graph.nodes if "nicefast" in str(n.target)]
    program = exported.module()
    found, expected = program(x), model(x)
    torch.testing.assert_close(found, expected)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    known = dict(model.named_parameters())
    for name, p in program.named_parameters():
        torch.testing.assert_close(p.grad, known[name].grad, atol=1e-5, rtol=1e-4)
