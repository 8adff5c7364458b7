"""The definition of every operation, in plain PyTorch.

The functions here say what the operations of :mod:`nicefast.functional` mean, and what the fast
ways through a flow do; in float64 they are what kernels, compiled code and lower precisions are
compared with. They also run themselves: on request, and where nothing faster serves. Everything is
differentiable by autograd any number of times.

Where a *partition* is expected, an index tensor or a slice naming the features does as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .philox import philox, unsigned
from .runtime.precision import at_least_float32
from .runtime.watchers import is_compiled

PRIORS = ("logistic", "normal")
NOISE_ELEMENTS = 1 << 18  # of a block of noise, for each thread: its integers stay in the caches
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "elu": torch.nn.functional.elu,
}


def _shifted(partition: Any) -> slice | Tensor:
    """The features of a partition that are shifted; or what is given instead of one."""
    return partition if isinstance(partition, slice | Tensor) else partition.shifted


def additive_coupling(
    x: Tensor, shift: Tensor, partition: Any, inverse: bool = False, bias: Tensor | None = None
) -> Tensor:
    """``y = x`` with ``shift + bias`` added to (inverse: taken from) the shifted features.

    Shapes: x (..., D), shift (..., S), bias (S,). See Dinh et al. 2014, section 3.2.

    >>> import torch, nicefast as nf
    >>> nf.reference.additive_coupling(torch.zeros(4), torch.ones(2), nf.Partition.half(4))
    tensor([0., 0., 1., 1.])
    """
    features = _shifted(partition)
    if isinstance(features, slice):
        features = torch.arange(x.shape[-1], device=x.device)[features]
    delta = (shift if bias is None else shift + bias).to(x.dtype)
    return x.index_add(-1, features.to(x.device), -delta if inverse else delta)


def additive_coupling_(
    x: Tensor, shift: Tensor, partition: Any, inverse: bool = False, bias: Tensor | None = None
) -> Tensor:
    """:func:`additive_coupling` written over ``x``; only the shifted features are touched."""
    features = _shifted(partition)
    delta = shift if bias is None else shift + bias
    if isinstance(features, slice):
        x[..., features].add_(delta, alpha=-1 if inverse else 1)
    else:
        delta = delta.to(x.dtype)
        x.index_add_(-1, features.to(x.device), delta, alpha=-1 if inverse else 1)
    return x


def select_features(x: Tensor, partition: Any) -> Tensor:
    """The shifted features of ``x``, in order: the transpose of a coupling's addition."""
    features = _shifted(partition)
    return x[..., features] if isinstance(features, slice) else x.index_select(-1, features)


def couple(
    x: Tensor,
    couplings: Sequence[Sequence[tuple[Tensor, Tensor]]],
    features: Sequence[tuple[Any, Any]],
    activation: str,
    inverse: bool = False,
    context: Tensor | None = None,
) -> Tensor:
    """A chain of additive couplings whose conditioners are MLPs, given by their tensors.

    Coupling l: ``x[shifted] += m_l([x[conditioning]; context])`` in order (inverse: ``-=``, in the
    opposite order), m_l the linear layers ``couplings[l]``, pairs (weight, bias), with
    ``activation`` between them; ``features[l]`` is (conditioning, shifted). Shapes: x (N, D),
    context (N, K).

    >>> import torch, nicefast as nf
    >>> layers = [(torch.ones(1, 1), torch.zeros(1))]
    >>> features = [(slice(0, 1), slice(1, 2))]
    >>> nf.reference.couple(torch.tensor([[2.0, 3.0]]), [layers], features, "relu")
    tensor([[2., 5.]])
    """
    steps = list(zip(couplings, features, strict=True))
    for layers, (conditioning, shifted) in reversed(steps) if inverse else steps:
        h = select_features(x, conditioning)
        if context is not None:
            h = torch.cat((h, context.to(h.dtype)), -1)
        for k, (weight, bias) in enumerate(layers):
            h = torch.nn.functional.linear(
                h if k == 0 else ACTIVATIONS[activation](h), weight, bias
            )
        x = additive_coupling(x, h, shifted, inverse)
    return x


def check_prior(prior: str) -> str:
    """``prior`` itself, or a ValueError that names the known ones."""
    if prior not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}")
    return prior


def prior_log_prob(z: Tensor, prior: str) -> Tensor:
    """Element-wise log-density of the prior, in nats: finite wherever ``z`` is.

    logistic ``-softplus(z) - softplus(-z)``, normal ``-z^2 / 2 - log(2 pi) / 2``
    (Dinh et al. 2014, section 3.4).

    >>> import torch, nicefast as nf
    >>> nf.reference.prior_log_prob(torch.tensor([0.0, 1e4]), "logistic")
    tensor([-1.3863e+00, -1.0000e+04])
    """
    if prior == "logistic":
        # -softplus(z) - softplus(-z), but torch's softplus drops exp(-z) beyond z = 20: 2e-9 off
        return logsigmoid(z) + logsigmoid(-z)
    check_prior(prior)
    return -0.5 * z * z - 0.5 * math.log(2 * math.pi)


def scale_log_prob(
    h: Tensor, log_scale: Tensor, prior: str = "logistic", return_z: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """``z = exp(log_scale) h`` and ``log_prob = sum_d log p(z_d) + sum_d log_scale_d``, in nats.

    Shapes: h (..., D), log_scale (D,); returns log_prob (...) or ``(z, log_prob)``. log_prob is
    at least float32 (Dinh et al. 2014, equation 1 with section 3.3).

    >>> import torch, nicefast as nf
    >>> nf.reference.scale_log_prob(torch.zeros(2), torch.zeros(2), prior="normal")
    tensor(-1.8379)
    """
    work = at_least_float32(h.dtype, log_scale.dtype)
    s = log_scale.to(work)
    z = h.to(work) * s.exp()
    log_prob = prior_log_prob(z, prior).sum(-1) + s.sum()
    return (z.to(h.dtype), log_prob) if return_z else log_prob


def cell_log_prob(h: Tensor, log_scale: Tensor, grid: float, prior: str = "logistic") -> Tensor:
    """``sum_d log(F(s_d (h_d + grid/2)) - F(s_d (h_d - grid/2)))``, F the prior's distribution
    function, ``s = exp(log_scale)``: the log-probability of the grid cell around h, in nats, <= 0.

    In float64; shapes as in :func:`scale_log_prob`. logistic: ``log sigma(b) + log sigma(-a) +
    log(1 - exp(a - b))``; normal: in the tail that the cell is nearer to, ``log F(b) +
    log(1 - F(a) / F(b))``, and for narrow cells the density in the middle times the width.

    >>> import torch, nicefast as nf
    >>> nf.reference.cell_log_prob(torch.tensor([0.5]), torch.zeros(1), 1.0).exp()
    tensor(0.2311)
    """
    s = log_scale.double().exp()
    a, b, width = (h.double() - grid / 2) * s, (h.double() + grid / 2) * s, grid * s
    if check_prior(prior) == "logistic":
        inside = torch.log(-torch.expm1(-width))
        cells = logsigmoid(b) + logsigmoid(-a) + inside
    else:
        flip = a + b > 0
        a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
        middle = (a + b) / 2
        narrow = width * (1 + middle.abs()) < 1e-4  # to 1e-9, where the difference keeps 1e-9
        upper, lower = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
        gap = torch.where(narrow, -1.0, lower - upper)  # and no infinite gradient from the other
        density = prior_log_prob(middle, prior) + width.log()
        cells = torch.where(narrow, density, upper + torch.log(-torch.expm1(gap)))
    return cells.sum(-1).to(at_least_float32(h.dtype, log_scale.dtype))


def scale_log_prob_backward(
    grad_z: Tensor | None, grad_log_prob: Tensor, h: Tensor, log_scale: Tensor, prior: str
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`scale_log_prob` with respect to ``h`` (N, D) and ``log_scale`` (D,).

    With ``a = grad_log_prob * d log p(z)/dz + grad_z``: ``a exp(log_scale)`` and
    ``sum_n (a z + grad_log_prob)``.
    """
    work = at_least_float32(h.dtype, log_scale.dtype)
    scale = log_scale.to(work).exp()
    z = h.to(work) * scale
    g = grad_log_prob.to(work)[..., None]
    a = g * (-torch.tanh(z / 2) if prior == "logistic" else -z)
    if grad_z is not None:
        a = a + grad_z.to(work)
    return (a * scale).to(h.dtype), (a * z + g).sum(0).to(log_scale.dtype)


def sample_prior(
    log_scale: Tensor,
    n: int,
    seed: int,
    prior: str = "logistic",
    row_offset: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``h = exp(-log_scale) z`` (n, D) with ``z`` drawn from the prior.

    Entry (i, d) is a function of ``seed``, ``row_offset + i`` and ``d`` alone, so that a sample
    does not depend on how it is cut into batches.

    >>> import torch, nicefast as nf
    >>> whole = nf.reference.sample_prior(torch.zeros(3), 4, seed=1)
    >>> torch.equal(whole[2:], nf.reference.sample_prior(torch.zeros(3), 2, seed=1, row_offset=2))
    True
    """
    dtype = dtype or log_scale.dtype
    d = log_scale.shape[0]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    scale, step = torch.exp(-log_scale.to(work)), _rows_of_noise(d)

    def block(start: int) -> Tensor:
        rows = torch.arange(start, min(start + step, n), device=log_scale.device) + row_offset
        return (prior_noise(rows, d, seed, prior, work) * scale).to(dtype)

    if n <= step:
        return block(0)
    out = torch.empty((n, d), dtype=dtype, device=log_scale.device)
    for i in range(0, n, step):
        out[i : i + step] = block(i)
    return out


def sample_prior_backward(grad_h: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of :func:`sample_prior` with respect to ``log_scale``: ``-sum_n grad_h h``."""
    work = at_least_float32(h.dtype, grad_h.dtype)
    return -(grad_h.to(work) * h.to(work)).sum(0).to(dtype)


def prior_noise(rows: Tensor, features: int, seed: int, prior: str, dtype: torch.dtype) -> Tensor:
    """Standard noise (len(rows), features) of the prior: Philox4x32-10 (Salmon et al. 2011).

    Counter (row, d // 4, 0), one 32-bit word for each of four features; float64 takes 32 more bits
    from counter (row, d // 4, 1). Logistic: the top bit is the sign, the others are
    ``w = P(|Z| > t)``, hence ``t = log((2 - w) / w)``; normal: Box-Muller on pairs of words.
    No value is infinite.
    """
    quads = torch.arange(-(-features // 4), device=rows.device)
    high = philox(rows, quads, 0, seed)
    low = philox(rows, quads, 1, seed) if dtype == torch.float64 else None

    fraction = 0.5 if low is None else (unsigned(low, dtype) + 0.5) * 2.0**-32
    if prior == "logistic":
        w = (high & 0x7FFFFFFF).to(dtype).add_(fraction).mul_(2.0**-31)
        z = torch.copysign((2.0 - w).div_(w).log_(), high)
    else:
        z = box_muller(unsigned(high, dtype).add_(fraction).mul_(2.0**-32))
    return z.view(high.shape)[:, :features]


def box_muller(u: Tensor) -> Tensor:
    """Standard normal noise (N, D) of uniform numbers ``u`` (N, D), D even, in (0, 1], by pairs.

    >>> import torch, nicefast as nf
    >>> nf.reference.box_muller(torch.tensor([[1.0, 0.5]])).abs()
    tensor([[0., 0.]])
    """
    radius = torch.log(u[:, 0::2]).mul_(-2.0).sqrt_()
    angle = 2 * math.pi * u[:, 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).view(u.shape)


def dequantise(
    levels: Tensor,
    k: int | None,
    seed: int = 0,
    row_offset: int = 0,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """``x = low + (level + u) / k * (high - low)`` in [low, high), float32; u uniform on [0, 1).

    ``levels`` (N, ...) are integers 0 .. k-1; with k None, any integers, and ``x = level + u``.
    ``u`` of row i and flattened feature d is made of word d % 4 of Philox at counter
    (row_offset + i, d // 4), as :func:`prior_noise` is. It takes the midpoints of 2^b equal
    intervals, ``b = 21 - ceil(log2 k)``: what float32 has room for beside the level, less three
    bits for rounding, so that no x is rounded into a neighbouring level. With k None it takes the
    multiples of 2^-24; what the sum would round up to level + 1 becomes level, which lost as much
    to rounding: the floats of an interval stay equally likely.

    >>> import torch, nicefast as nf
    >>> nf.reference.dequantise(torch.tensor([[0, 1, 2]]), 3, seed=1).mul(3).floor()
    tensor([[0., 1., 2.]])
    """
    n, d = levels.shape[0], levels.shape[1:].numel()
    flat = levels.reshape(n, d)
    out = torch.empty((n, d), dtype=torch.float32, device=levels.device)
    quads = torch.arange(-(-d // 4), device=levels.device)
    bits, low, scale, top = _grid(k, low, high)
    step = _rows_of_noise(d)
    for i in range(0, n, step):
        rows = torch.arange(i, min(i + step, n), device=levels.device) + row_offset
        words = philox(rows, quads, 0, seed)[:, :d]
        fraction = words.bitwise_right_shift_(32 - bits).bitwise_and_((1 << bits) - 1)
        level, x = flat[i : i + step], out[i : i + step]
        if k is None:
            x.copy_(level)
            noisy = x + fraction.to(x.dtype) * scale
            torch.where(noisy < x + 1, noisy, x, out=x)
        else:
            x.copy_(fraction).add_(0.5).add_(level, alpha=1 << bits).mul_(scale)
            if low:
                x.add_(low)
            x.clamp_(max=top)
    return out.view(levels.shape)


@cache
def _grid(k: int | None, low: float, high: float) -> tuple[int, float, float, float]:
    """Bits of the noise, ``low``, the size of its steps, and the largest float32 below ``high``."""
    if k is None:
        return 24, 0.0, 2.0**-24, math.inf
    ends = torch.tensor([low, high], dtype=torch.float32, device="cpu")
    low, high = ends.tolist()
    bits = 21 - (k - 1).bit_length()
    return bits, low, (high - low) / (k << bits), torch.nextafter(ends[1], ends[0]).item()


def _rows_of_noise(features: int) -> int:
    """How many rows of noise are made at a time."""
    threads = 1 if is_compiled() else torch.get_num_threads()
    return max(1, NOISE_ELEMENTS * threads // features)
