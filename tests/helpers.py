"""What several tests share: partitions, data, error rules, guarded memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nicefast as nf
from nicefast.engine import frozen
from nicefast.runtime import captures

HALF_AND_UP = [torch.float16, torch.float32, torch.float64]
#: bf16 is wrong in Triton's interpreter, so kernels meet it on a GPU only
DTYPES = [*HALF_AND_UP, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def partitions(d):
    """Partitions of ``d`` features of every kind, both ways round."""
    found = [nf.Partition.half(d), nf.Partition.alternating(d), nf.Partition.random(d, seed=d)]
    if d >= 6:
        mask = torch.ones(d, dtype=torch.bool)
        mask[2:-2] = False  # a block in the middle: arithmetic, but neither half
        found.append(nf.Partition.from_mask(mask))
        steps = torch.ones(d, dtype=torch.bool)
        steps[3:-1:2] = False  # every second of some, not all
        found.append(nf.Partition.from_mask(steps))
    return [q for p in found for q in (p, ~p)]


def strided(x, kind):
    """``x`` (N, D) laid out otherwise: rows apart, columns apart, or one row for all."""
    n, d = x.shape
    if kind == "rows":
        return torch.cat((x, torch.full((n, 3), torch.nan, dtype=x.dtype, device=x.device)), 1)[
            :, :d
        ]
    if kind == "columns":
        return x.t().contiguous().t()
    if kind == "expanded":
        return x[:1].expand(n, d)
    assert kind == "dense"
    return x


def make(features=6, device="cpu", **options):
    options = {"hidden": (16, 8), "couplings": 3, **options}
    model = nf.NICE(features, **options)
    with torch.no_grad():
        model.scaling.log_scale.normal_(0, 0.5)
        for coupling in model.couplings:
            coupling.conditioner.linears[-1].reset_parameters()  # away from the identity
    return model.to(device)


def plain_log_prob(model, x, context=None):
    """The flow written out in plain PyTorch."""
    h = x.flatten(x.ndim - len(model.event_shape)) if model.event_shape else x
    for coupling in model.couplings:
        x1 = h[..., coupling.partition.conditioning.to(h.device)]
        inputs = x1 if context is None else torch.cat((x1, context), -1)
        layers = coupling.conditioner.linears
        for linear in layers[:-1]:
            inputs = torch.relu(linear(inputs))
        h = nf.reference.additive_coupling(h, layers[-1](inputs), coupling.partition)
    return nf.reference.scale_log_prob(h, model.scaling.log_scale, model.prior_name)


def error(value, exact):
    """Largest absolute difference from the float64 value; NaN must match NaN."""
    value, exact = value.detach().cpu().double(), exact.detach().cpu().double()
    assert value.shape == exact.shape
    assert torch.equal(value.isnan(), exact.isnan())
    return (
        (value - exact).nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf).abs().max().item()
        if value.numel()
        else 0.0
    )


def assert_three_way(value, plain, exact, slack=2.0):
    """error(kernel, float64) <= 2 error(plain PyTorch in the same dtype, float64) + tiny."""
    assert value.dtype == plain.dtype, (value.dtype, plain.dtype)
    scale = exact.abs().nan_to_num(0.0).max().item() if exact.numel() else 0.0
    tiny = 4 * torch.finfo(value.dtype).eps * max(scale, 1.0)
    found, known = error(value, exact), error(plain, exact)
    print(f"error {found:.3g}, of PyTorch {known:.3g}, ratio {found / max(known, 1e-300):.3g}")
    assert found <= slack * known + tiny


def assert_gradients(values, plain, exact, slack=2.0):
    """The same of all gradients of a result together, each measured by its own largest number, and
    of the root of their mean square: of a few long sums, the largest error is a matter of luck."""
    scales = [(e.abs().nan_to_num(0.0).max().item() if e.numel() else 0.0) or 1.0 for e in exact]

    def usual(found):
        assert [g.dtype for g in found] == [p.dtype for p in plain]
        errors = []
        for g, e, scale in zip(found, exact, scales, strict=True):
            assert error(g, e) < 1e-3 * scale
            errors.append((g.detach().cpu().double() - e.detach().cpu().double()).flatten() / scale)
        every = torch.cat(errors).nan_to_num(0.0)
        return math.sqrt(every.square().sum().item() / max(1, len(every)))

    assert usual(values) <= slack * usual(plain) + torch.finfo(plain[0].dtype).eps


def kolmogorov_smirnov(z, prior):
    """sqrt(n) times the largest distance of the empirical from the exact distribution function."""
    z = z.double().flatten().sort().values
    n = len(z)
    cdf = nf.priors.standard(prior, dtype=torch.float64, device=z.device).cdf(z)
    steps = torch.arange(n + 1, dtype=torch.float64, device=z.device) / n
    return math.sqrt(n) * torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max().item()


class Operators(TorchDispatchMode):
    """Remembers what PyTorch is asked to do in this thread: the names of operators, in order."""

    FREE = ("empty", "detach", "view", "slice", "t", "transpose", "select", "alias", "unsqueeze")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def computing(self):
        """All but views and allocations."""
        return [n for n in self.seen if n not in self.FREE and "split" not in n]

    def products(self):
        names = ("mm", "addmm", "addmm_", "_linear_pointwise", "linear", "_addmm_activation")
        return [n for n in self.seen if n in names]


class GuardedMemory:
    """Stands in for ``torch.empty``: NaN inside, a guard band on either side."""

    BAND, MARK = 256, 12345.0

    def __init__(self, empty):
        self._empty = empty
        self.buffers = []

    def empty(self, *size, dtype=None, device=None, **options):
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point or options:
            return self._empty(size, dtype=dtype, device=device, **options)
        numel = torch.Size(size).numel()
        buffer = self._empty(numel + 2 * self.BAND, dtype=dtype, device=device).fill_(self.MARK)
        inside = buffer[self.BAND : self.BAND + numel].fill_(torch.nan)
        self.buffers.append(buffer)
        return inside.view(size)

    def check(self):
        assert self.buffers, "no output was allocated"
        for buffer in self.buffers:
            assert (buffer[: self.BAND] == self.MARK).all(), "written before the output"
            assert (buffer[-self.BAND :] == self.MARK).all(), "written after the output"


class Recorder:
    """Stands in for CUDA's capture: what is replayed reads and writes fixed memory, as there."""

    def __init__(self):
        self.captures = 0

    def __call__(self, call, device):
        self.captures += 1
        outputs = tuple(t.clone() for t in call())

        def replay():
            for out, new in zip(outputs, call(), strict=True):
                out.copy_(new)

        return replay, outputs

    @classmethod
    def install(cls, monkeypatch):
        """In the place of the real capture; on a GPU that one captures, and is counted."""
        found, real = cls(), captures.warm_capture
        if torch.cuda.is_available():

            def capture(call, device):
                found.captures += 1
                return real(call, device)

            monkeypatch.setattr(captures, "warm_capture", capture)
        else:
            for module in (captures, frozen):
                monkeypatch.setattr(module, "can_capture", lambda device: True)
            monkeypatch.setattr(frozen, "has_graphs", lambda device: True)
            monkeypatch.setattr(captures, "warm_capture", found)
        return found
