"""The gemm engine: three kernels besides its products, relu in their epilogue where NaN is kept."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import nicefast as nf
from helpers import Operators, assert_three_way, make, partitions, strided

pytest.importorskip("triton", reason="needs Triton")

from nicefast.engine.gemm import GemmEngine, gives_numbers
from nicefast.engine.rows import RowEngine
from nicefast.engine.stack import read
from nicefast.kernels import sides

KERNELS = ("enter_kernel", "add_kernel", "leave_kernel")


class Counted:
    """A kernel whose launches are remembered by its name."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(self.name)
            with _disable_current_modes():  # the interpreter's own operators
                return self.kernel[grid](*arguments, **options)

        return launch


def gemm(model, x, dtype=torch.float32, kind=GemmEngine):
    stack = read(model.couplings, x.device, dtype)
    return kind(stack, model.scaling.log_scale, model.prior_name)


@pytest.mark.parametrize("partition", [0, 2, 3, 6, 9])
@pytest.mark.parametrize("kind", ["dense", "rows"])
@torch.no_grad()
def test_everything_is_written_once_and_nothing_beside_it(guarded, device, partition, kind):
    model = make(7, partition=partitions(7)[partition], hidden=(12, 20), device=device)
    x = strided(torch.randn(33, 7, device=device), kind)
    engine, rows = gemm(model, x), gemm(model, x, kind=RowEngine)
    for method in ("log_prob", "forward", "inverse"):
        found, known = (getattr(e, method)(x) for e in (engine, rows))
        torch.testing.assert_close(found, known, atol=1e-5, rtol=1e-5)
    for inverse in (False, True):
        found, known = (e.couple(x, None, inverse) for e in (engine, rows))
        torch.testing.assert_close(found, known, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("partition", ["half", "random"])
@pytest.mark.parametrize("inverse", [False, True])
@torch.no_grad()
def test_four_couplings_take_three_kernels_besides_their_products(
    monkeypatch, triton_backend, device, partition, inverse
):
    model = make(10, hidden=(16,) * 5, couplings=4, partition=partition, device=device)
    x, launches = torch.randn(8, 10, device=device), []
    for name in KERNELS:
        monkeypatch.setattr(sides, name, Counted(getattr(sides, name), name, launches))
    engine = gemm(model, x)
    with Operators() as operators:
        engine.inverse(x) if inverse else engine.log_prob(x)
    assert launches == list(KERNELS)
    products = operators.products()
    assert len(products) == 4 * 6
    others = [name for name in operators.computing() if name not in products]
    assert others.count("relu_") == 4 * 5  # of each hidden layer, there and back
    # whether log_scale is finite is looked at on the CPU alone: a GPU would have to be waited for
    looks = {"sum", "_local_scalar_dense"} if device.type == "cpu" else set()
    assert {*others} - {"relu_"} <= looks


@torch.no_grad()
def test_bfloat16_operands(triton_backend, device):
    model = make(6, hidden=(40, 24), couplings=3, context=2, device=device)
    x, c = torch.randn(9, 6, device=device), torch.randn(9, 2, device=device)
    for method in ("log_prob", "forward", "inverse"):
        wide, narrow = (
            getattr(gemm(model, x, dtype), method)(x, c)
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, wide, atol=0.5, rtol=0.1)
        assert not torch.equal(narrow, wide)


@torch.no_grad()
@pytest.mark.parametrize("inverse", [False, True])
def test_a_shift_of_bfloat16_operands_is_not_rounded(triton_backend, device, monkeypatch, inverse):
    """Where PyTorch's product can be float32; elsewhere a stand-in for that product is."""
    model = make(6, hidden=(16,), couplings=1, partition="half", device=device)
    model.couplings[0].conditioner.linears[-1].bias.zero_()
    x = torch.randn(50, 6, device=device)
    x[:, 3:] = 0  # then the result is the shift
    engine, real = gemm(model, x, torch.bfloat16), torch.mm
    if device.type == "cpu":
        assert not rounded(engine.couple(x, None, inverse)[:, 3:])
        monkeypatch.setattr("nicefast.engine.gemm.gives_float32", lambda _: True)
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: real(a.to(out_dtype), b.float()))
    assert rounded(engine.couple(x, None, inverse)[:, 3:])


def rounded(shift):
    """Whether bfloat16 would round it."""
    return not torch.equal(shift.bfloat16().float(), shift)


@torch.no_grad()
def test_signed_zeros_and_nan_stay_where_they_are(triton_backend, device):
    model = make(6, hidden=(8,), couplings=1, partition="half", device=device)
    x = torch.full((3, 6), -0.0, device=device)
    x[1, 5] = torch.nan
    y = gemm(model, x).couple(x)
    assert y[:, :3].signbit().all()
    assert y.isnan().nonzero().tolist() == [[1, 5]]
    assert gemm(model, x).log_prob(x).isnan().tolist() == [False, True, False]


# a GPU's product makes 0 of NaN in its epilogue, where relu is ----------------------------------

HALVES = {"hidden": (24, 16, 20), "couplings": 2, "partition": "half"}


@pytest.fixture
def frozen(monkeypatch, triton_backend):
    """log_prob as a frozen flow computes it on a GPU; how often it had relu in an epilogue."""
    real, asked = torch._addmm_activation, []

    def product(bias, a, b, **options):
        asked.append(1)
        return real(bias, a, b, **options).nan_to_num(0.0, torch.inf, -torch.inf)

    monkeypatch.setattr(torch, "_addmm_activation", product)

    def log_prob(model, x, context=None):
        engine = gemm(model, x)
        engine.fuses_relu = gives_numbers(engine.stack)
        with torch.no_grad():
            return engine.log_prob(x, context)

    log_prob.asked = asked
    return log_prob


def expected(model, x, context=None):
    with nf.set_backend("reference"), torch.no_grad():
        return model.log_prob(x, context)


def test_usual_parameters_need_no_launch_of_their_own_for_relu(frozen, device):
    model, x = make(6, device=device, **HALVES), torch.randn(9, 6, device=device)
    torch.testing.assert_close(frozen(model, x), expected(model, x))
    assert len(frozen.asked) == 2 * 3
    engine = gemm(model, x)
    engine.fuses_relu = True
    with torch.no_grad():
        x[2, 1] = torch.nan
        assert engine.forward(x)[2, 3:].isnan().all()
    assert len(frozen.asked) == 2 * 3  # rows that are given back show where NaN is


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38, 1e25])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_no_parameter_is_missed(frozen, device, layer, name, value):
    model, x = make(6, device=device, **HALVES), torch.randn(9, 6, device=device)
    with torch.no_grad():
        p = getattr(model.couplings[0].conditioner.linears[layer], name)
        p[1] = value
        if name == "weight":
            p[2] = -value
    found, plain = frozen(model, x), expected(model, x)
    assert torch.equal(found.isnan(), plain.isnan())
    assert torch.equal(found.isinf(), plain.isinf())


def test_an_overflow_that_later_weights_hide_is_not_missed(frozen, device):
    model, x = make(6, device=device, **HALVES), 1e6 * torch.randn(9, 6, device=device)
    with torch.no_grad():
        linears = model.couplings[0].conditioner.linears
        for linear, size in zip(linears, (1e17, 1e17, 1.0, 1e-17), strict=True):
            linear.weight.normal_().mul_(size)
    plain = expected(model, x)
    assert plain.isnan().any()
    assert torch.equal(frozen(model, x).isnan(), plain.isnan())


def test_no_context_and_no_row_is_missed(frozen, device):
    model = make(6, device=device, context=2, **HALVES)
    x, c = torch.randn(9, 6, device=device), torch.randn(9, 2, device=device)
    c[4, 1] = torch.nan
    assert frozen(model, x, c).isnan().nonzero().flatten().tolist() == [4]
    assert not frozen.asked
    model = make(6, device=device, **HALVES)
    x[2, 1], x[7, 5] = torch.nan, torch.nan
    assert frozen(model, x).isnan().nonzero().flatten().tolist() == [2, 7]
    assert frozen.asked


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [(300, 200), (1000,) * 5])
def test_a_gpu_takes_it(device, hidden):
    model = make(784, hidden=hidden, couplings=4, device=device)
    x = torch.randn(1000, 784, device=device)
    assert model.plan(x).name == "gemm"
    with torch.no_grad(), nf.set_backend("reference"):
        plain, exact = model.log_prob(x), model.double().log_prob(x.double())
    model.float()
    with torch.no_grad():
        assert_three_way(model.log_prob(x), plain, exact)
        torch.testing.assert_close(model.inverse(model(x)[0])[0], x, atol=1e-3, rtol=1e-3)
    assert model.log_prob(x).requires_grad
