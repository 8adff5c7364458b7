"""The element-wise operations alone, each beside other ways to do the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import AffineTransform, SigmoidTransform, TransformedDistribution, Uniform

import nicefast as nf

from .providers import logistic_log_prob, logistic_noise
from .timing import input_sets

Way = Callable[[Any], Any]
COMPILED = "torch.compile"
CHECKED = 4096  # rows that are compared with float64


def one_exponential(h: Tensor, log_scale: Tensor) -> Tensor:
    """Scaling + logistic prior with the least arithmetic: softplus(z) + softplus(-z) at once."""
    a = (h * log_scale.exp()).abs()
    return log_scale.sum() - (a + 2 * torch.log1p(torch.exp(-a))).sum(-1)


def no_grad(way: Way) -> Way:
    return torch.no_grad()(way)


def backward(way: Way) -> Way:
    """The backward pass alone: its graph is made when an input comes for the first time."""
    made: dict[int, tuple[Any, ...]] = {}

    def call(given: list[Tensor]) -> Tensor:
        if id(given) not in made:
            leaves = [t.detach().requires_grad_() for t in given[:-1]]
            made[id(given)] = (way(leaves), leaves, given)  # given too: no id comes twice
        output, leaves, (*_, cotangent) = made[id(given)]
        grads = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        few = len(cotangent) <= CHECKED  # those are compared, all of them
        return torch.cat([g.flatten() for g in grads]) if few else grads[0]

    return call


@dataclass
class Operation:
    """Ways to do one thing to one of ``inputs``, over which a way may write.

    ``exact`` takes an input in float64 and defines the result; a ``yardstick`` computes less.
    """

    case: str
    direction: str
    work: str  # as bench.work.elementwise_work calls it
    ways: dict[str, Way]
    exact: Way
    inputs: list[Any]
    yardsticks: dict[str, Way] = field(default_factory=dict)

    def check(self, name: str) -> tuple[float, str | None]:
        """A way's error against float64, and what is wrong with it, if anything."""
        if name in self.yardsticks:
            return 0.0, None
        given = [t.detach()[:CHECKED].clone() for t in self.inputs[0]]
        want = self.exact([t.double() for t in given])
        if isinstance(want, float):  # of a random result: how far it may be off
            error = float(self.ways[name](given))
            return error, None if error <= want else f"off by {error:.1e}, allowed {want:.1e}"
        got = self.ways[name](given).double()
        # a few roundings of the largest value, or of the largest partial sum
        allowed = 8 * torch.finfo(torch.float32).eps * want.abs().max().item()
        error = (got - want).abs().max().item()
        return error, None if error <= allowed else f"off by {error:.1e}, allowed {allowed:.1e}"


def operations(rows: int, features: int, device: torch.device) -> Iterator[Operation]:
    """Coupling forward, inverse, in place and backward; scaling + prior both ways; sampling."""
    yield from couplings(rows, features, device)
    yield from priors(rows, features, device)


def couplings(rows: int, features: int, device: torch.device) -> Iterator[Operation]:
    half = features // 2
    partition = nf.Partition.half(features)
    rand = partial(torch.randn, device=device)
    sets = input_sets(4 * rows * features, device)
    pairs = [[rand(rows, features), rand(rows, half)] for _ in range(sets)]

    def slice_cat(sign: int) -> Way:
        return lambda g: torch.cat((g[0][:, :half], g[0][:, half:] + sign * g[1]), 1)

    first = torch.arange(half, device=device)
    second = torch.arange(half, features, device=device)

    def gather_scatter(g: list[Tensor]) -> Tensor:
        y = torch.empty_like(g[0])
        y[:, first] = g[0][:, first]
        y[:, second] = g[0][:, second] + g[1]
        return y

    def in_view(g: list[Tensor]) -> Tensor:
        g[0][:, half:].add_(g[1])
        return g[0]

    coupling = nf.functional.additive_coupling
    yield Operation(
        "coupling", "forward", "coupling forward",
        {
            "nicefast": no_grad(lambda g: coupling(g[0], g[1], partition)),
            "slice + cat": no_grad(slice_cat(1)),
            "gather + scatter": no_grad(gather_scatter),
        },
        no_grad(slice_cat(1)), pairs,
    )  # fmt: skip
    yield Operation(
        "coupling", "inverse", "coupling inverse",
        {
            "nicefast": no_grad(lambda g: coupling(g[0], g[1], partition, inverse=True)),
            "slice + cat": no_grad(slice_cat(-1)),
        },
        no_grad(slice_cat(-1)), pairs,
    )  # fmt: skip
    spare = rand(rows, half)
    touch = {
        "x2.add_(1)": no_grad(lambda _: spare.add_(1)),
        "x2.add_(shift)": no_grad(lambda g: spare[: len(g[1])].add_(g[1])),
    }
    yield Operation(
        "coupling", "in place", "coupling in place",
        {
            "nicefast": no_grad(
                lambda g: nf.functional.additive_coupling_(g[0], g[1], partition)
            ),
            "x[:, d:].add_(shift)": no_grad(in_view),
            **touch,
        },
        no_grad(slice_cat(1)), pairs, touch,
    )  # fmt: skip
    triple = [*pairs[0], rand(rows, features)]
    yield Operation(
        "coupling", "backward", "coupling backward",
        {
            "nicefast": backward(lambda g: coupling(g[0], g[1], partition)),
            "slice + cat": backward(slice_cat(1)),
        },
        backward(slice_cat(1)), [triple],
    )  # fmt: skip


def priors(rows: int, features: int, device: torch.device) -> Iterator[Operation]:
    rand = partial(torch.randn, device=device)
    log_scale = 0.1 * rand(features)
    sets = input_sets(4 * rows * features, device)
    ones = [[rand(rows, features)] for _ in range(sets)]
    compiled = torch.compile(one_exponential, dynamic=True)
    # the logistic distribution as the documentation of torch.distributions builds it
    logistic = TransformedDistribution(
        Uniform(0.0, 1.0, validate_args=False),
        [SigmoidTransform().inv, AffineTransform(0.0, 1.0)],
        validate_args=False,
    )

    def like(h: Tensor) -> Tensor:
        return log_scale.to(h.dtype)

    scaling: dict[str, Way] = {
        "nicefast": lambda g: nf.functional.scale_log_prob(g[0], like(g[0])),
        "plain": lambda g: logistic_log_prob(g[0], like(g[0])),
        COMPILED: lambda g: compiled(g[0], like(g[0])),
        "torch.distributions": lambda g: (
            logistic.log_prob(g[0] * like(g[0]).exp()).sum(-1) + like(g[0]).sum()
        ),
    }
    yield Operation(
        "scaling", "forward", "scaling forward",
        {name: no_grad(way) for name, way in scaling.items()},
        no_grad(scaling["plain"]), ones,
    )  # fmt: skip
    alone = {name: scaling[name] for name in ("nicefast", "plain")}
    yield Operation(
        "scaling", "backward", "scaling backward",
        {name: backward(way) for name, way in alone.items()},
        backward(scaling["plain"]), [[*ones[0], rand(rows)]],
    )  # fmt: skip

    def distance(sample: Callable[[int], Tensor]) -> Way:
        """Draws; for a few, Kolmogorov's distance of their latents from the prior."""

        def call(given: list[Tensor]) -> Any:
            draws = sample(len(given[0]))
            if len(draws) > CHECKED:
                return draws
            z = (draws.double() * log_scale.double().exp()).flatten().sort().values
            steps = torch.arange(len(z) + 1, dtype=z.dtype, device=device) / len(z)
            cdf = torch.sigmoid(z)
            gap = torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max().item()
            return gap * len(z) ** 0.5

        return no_grad(call)

    yield Operation(
        "sampling", "sample", "sampling",
        {
            "nicefast": distance(lambda n: nf.functional.sample_prior(log_scale, n, seed=0)),
            "plain": distance(lambda n: logistic_noise(log_scale, n) * torch.exp(-log_scale)),
        },
        lambda _: 3.0, ones,
    )  # fmt: skip


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: on a CPU a C++ compiler."""
    return device.type == "cuda" or any(map(shutil.which, ("g++", "clang++")))
