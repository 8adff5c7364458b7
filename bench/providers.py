"""Everybody's additive flow from the same weights, and the calls that are timed.

A provider is a module with ``log_prob(x)`` and its linear layers in the order in which the
couplings act. Couplings are the library's own; the scaling and the logistic prior are plain PyTorch
for everybody but nicefast, since no peer has them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import nicefast as nf


@dataclass(frozen=True)
class Shape:
    """A flow and the rows it gets: half split, ReLU, logistic prior."""

    features: int
    hidden: tuple[int, ...]
    rows: int
    couplings: int = 4

    def __post_init__(self) -> None:
        if self.features % 2:
            raise ValueError(f"features must be even for a half split, got {self.features}")

    @property
    def half(self) -> int:
        return self.features // 2

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.half, *self.hidden, self.half)

    @property
    def title(self) -> str:
        hidden = f"{self.hidden[0]} x {len(self.hidden)}"
        return f"D={self.features}, hidden {hidden}, {self.couplings} couplings, {self.rows:,} rows"

    def operations(self, training: bool) -> int:
        """Floating-point operations of the matrix products in one call."""
        each = [2 * self.rows * a * b for a, b in itertools.pairwise(self.widths)]
        forward = self.couplings * sum(each)
        # x needs no gradient, so neither does the input of the very first product
        return 3 * forward - each[0] if training else forward


class Weights(NamedTuple):
    """For each coupling the (weight, bias) of each linear layer, and log_scale; float32."""

    layers: list[list[tuple[Tensor, Tensor]]]
    log_scale: Tensor


def make_weights(shape: Shape, seed: int = 0) -> Weights:
    """Random weights that keep activations, and the shifts, near one."""
    g = torch.Generator().manual_seed(seed)

    def linear(a: int, b: int, gain: float) -> tuple[Tensor, Tensor]:
        weight = torch.randn(b, a, generator=g) * (gain / a) ** 0.5
        return weight, 0.1 * torch.randn(b, generator=g)

    *inner, last = itertools.pairwise(shape.widths)
    layers = [
        [linear(a, b, 2.0) for a, b in inner] + [linear(*last, 1.0)] for _ in range(shape.couplings)
    ]
    return Weights(layers, 0.1 * torch.randn(shape.features, generator=g))


class MLP(nn.Sequential):
    """Linear layers with ReLU between them; takes and ignores a context, as nflows passes one."""

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers[:-1])

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


def logistic_noise(like: Tensor, rows: int) -> Tensor:
    """Draws of the logistic prior (rows, D) as they are usually written."""
    u = torch.rand(rows, like.shape[0], dtype=like.dtype, device=like.device)
    eps = torch.finfo(like.dtype).tiny
    return torch.log(u.clamp_min(eps)) - torch.log1p(-u)


def logistic_log_prob(h: Tensor, log_scale: Tensor) -> Tensor:
    """Scaling and logistic prior as they are usually written."""
    z = h * log_scale.exp()
    return (-softplus(z) - softplus(-z)).sum(-1) + log_scale.sum()


class Provider(nn.Module):
    """Couplings of one library, then the plain scaling and prior.

    Attributes:
        linears: the linear layers of each coupling, in the order in which they act on x.
        sign: -1 where the library subtracts the conditioner in the direction used here.
    """

    linears: list[list[nn.Linear]]
    sign = 1
    trains = True  # or computes without gradients alone

    def __init__(self, shape: Shape, weights: Weights) -> None:
        super().__init__()
        self.shape = shape
        self.log_scale = nn.Parameter(torch.zeros(shape.features))
        self.build(shape)
        self.load(weights)

    def build(self, shape: Shape) -> None:
        raise NotImplementedError

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """h before the scaling, and the couplings' log-determinant."""
        raise NotImplementedError

    def data(self, h: Tensor) -> Tensor:
        """x of h: back through the couplings."""
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        h, log_det = self.latent(x)
        return logistic_log_prob(h, self.log_scale) + log_det

    def inverse(self, z: Tensor) -> Tensor:
        return self.data(z * torch.exp(-self.log_scale))

    def sample(self, rows: int) -> Tensor:
        return self.inverse(logistic_noise(self.log_scale, rows))

    def ready(self, mode: Mode) -> Any:
        """The object whose ``log_prob``, ``inverse`` and ``sample`` are timed in this mode."""
        return self

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        for linears, layers in zip(self.linears, weights.layers, strict=True):
            for linear, (weight, bias) in zip(linears, layers, strict=True):
                sign = self.sign if linear is linears[-1] else 1
                linear.weight.copy_(sign * weight)
                linear.bias.copy_(sign * bias)
        self.log_scale.copy_(weights.log_scale)

    def gradients(self) -> list[Tensor]:
        """Of weights, biases and log_scale, in everybody's order and sign; detached copies."""
        grads = []
        for linears in self.linears:
            for linear in linears:
                sign = self.sign if linear is linears[-1] else 1
                grads += [sign * p.grad for p in (linear.weight, linear.bias)]
        return [*grads, self.log_scale.grad.clone()]


class Plain(Provider):
    """Half-split PyTorch as it is usually written."""

    def build(self, shape: Shape) -> None:
        self.nets = nn.ModuleList(MLP(shape.widths) for _ in range(shape.couplings))
        self.linears = [_linears(net) for net in self.nets]

    def latent(self, x: Tensor) -> tuple[Tensor, float]:
        d = self.shape.half
        for i, net in enumerate(self.nets):
            a, b = x[:, :d], x[:, d:]
            x = torch.cat((a + net(b), b) if i % 2 else (a, b + net(a)), 1)
        return x, 0.0

    def data(self, h: Tensor) -> Tensor:
        d = self.shape.half
        for i in reversed(range(len(self.nets))):
            a, b, net = h[:, :d], h[:, d:], self.nets[i]
            h = torch.cat((a - net(b), b) if i % 2 else (a, b - net(a)), 1)
        return h


class Compiled(Plain):
    """The same under torch.compile, whole calls at a time."""

    options: ClassVar[dict[str, Any]] = {}

    def build(self, shape: Shape) -> None:
        super().build(shape)
        compiled = partial(torch.compile, dynamic=False, **self.options)
        for name in ("log_prob", "inverse", "sample"):
            setattr(self, name, compiled(getattr(self, name)))


class MaxAutotune(Compiled):
    """The same, with the products tuned as well."""

    options: ClassVar[dict[str, Any]] = {"mode": "max-autotune"}


class Nicefast(Provider):
    """This library."""

    def build(self, shape: Shape) -> None:
        self.flow = nf.NICE(shape.features, shape.hidden, shape.couplings, partition="half")
        self.linears = [list(c.conditioner.linears) for c in self.flow.couplings]
        self.log_scale = self.flow.scaling.log_scale

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def inverse(self, z: Tensor) -> Tensor:
        return self.flow.inverse(z)[0]

    def sample(self, rows: int) -> Tensor:
        return self.flow.sample(rows)


class Frozen(Nicefast):
    """This library's frozen flow, of the weights that it has when a call is made ready.

    On a GPU, calls are captured as CUDA graphs of as many rows as the shape has.
    """

    trains = False

    def ready(self, mode: Mode) -> _FrozenCalls:
        mode.prepare()
        with mode.products(self.log_scale.device.type):
            return _FrozenCalls(self.flow.frozen(batch=self.shape.rows))


class _FrozenCalls(NamedTuple):
    """A frozen flow with a provider's methods."""

    flow: Any

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def inverse(self, z: Tensor) -> Tensor:
        return self.flow.inverse(z)[0]

    def sample(self, rows: int) -> Tensor:
        return self.flow.sample(rows)


class Nflows(Provider):
    """nflows: AdditiveCouplingTransform in a CompositeTransform."""

    def build(self, shape: Shape) -> None:
        from nflows.transforms import AdditiveCouplingTransform, CompositeTransform

        masks = _shifted_masks(shape)
        self.transform = CompositeTransform(
            [
                AdditiveCouplingTransform(mask, lambda a, b: MLP((a, *shape.hidden, b)))
                for mask in masks
            ]
        )
        self.linears = [_linears(t.transform_net) for t in self.transform._transforms]

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(x)

    def data(self, h: Tensor) -> Tensor:
        return self.transform.inverse(h)[0]


class Normflows(Provider):
    """normflows: AffineCouplingBlock(scale=False), the faster of its two ways to NICE.

    Used from data to latent in its forward direction, which costs what its inverse does.
    """

    def build(self, shape: Shape) -> None:
        import normflows

        nets = [MLP(shape.widths) for _ in range(shape.couplings)]
        flows = [
            normflows.flows.AffineCouplingBlock(
                net, scale=False, split_mode="channel_inv" if i % 2 else "channel"
            )
            for i, net in enumerate(nets)
        ]
        base = normflows.distributions.DiagGaussian(shape.features, trainable=False)
        self.flow = normflows.NormalizingFlow(base, flows)
        self.linears = [_linears(net) for net in nets]

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.forward_and_log_det(x)

    def data(self, h: Tensor) -> Tensor:
        return self.flow.inverse(h)


class Freia(Provider):
    """FrEIA: NICECouplingBlock, two couplings each, in a SequenceINN.

    A block shifts its first half first, so data go through it in reverse, where it subtracts.
    """

    sign = -1

    def build(self, shape: Shape) -> None:
        from FrEIA.framework import SequenceINN
        from FrEIA.modules import NICECouplingBlock

        if shape.couplings % 2:
            raise ValueError("a NICECouplingBlock is two couplings")
        self.inn = SequenceINN(shape.features)
        for _ in range(shape.couplings // 2):
            self.inn.append(
                NICECouplingBlock, subnet_constructor=lambda a, b: MLP((a, *shape.hidden, b))
            )
        self.linears = [
            _linears(net) for block in reversed(self.inn.module_list) for net in (block.G, block.F)
        ]

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        return self.inn(x, rev=True)

    def data(self, h: Tensor) -> Tensor:
        return self.inn(h)[0]


class Zuko(Provider):
    """zuko: GeneralCouplingTransform of AdditiveTransform."""

    def build(self, shape: Shape) -> None:
        from zuko.flows.coupling import GeneralCouplingTransform
        from zuko.lazy import LazyComposedTransform
        from zuko.transforms import AdditiveTransform

        self.transform = LazyComposedTransform(
            *(
                GeneralCouplingTransform(
                    shape.features,
                    mask=~mask.bool(),
                    univariate=AdditiveTransform,
                    shapes=[()],
                    hidden_features=shape.hidden,
                )
                for mask in _shifted_masks(shape)
            )
        )
        self.linears = [_linears(t.hyper) for t in self.transform.transforms]

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform().call_and_ladj(x)

    def data(self, h: Tensor) -> Tensor:
        return self.transform().inv(h)


PROVIDERS: dict[str, type[Provider]] = {
    "plain": Plain,
    "compile": Compiled,
    "compile-max": MaxAutotune,
    "nicefast": Nicefast,
    "nicefast (frozen)": Frozen,
    "nflows": Nflows,
    "normflows": Normflows,
    "FrEIA": Freia,
    "zuko": Zuko,
}
FROZEN = "nicefast (frozen)"
#: this library's: none of them is another's competitor
OWN = ("nicefast", FROZEN)
#: the other libraries
PEERS = ("nflows", "normflows", "FrEIA", "zuko")


def _linears(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if hasattr(m, "weight")]  # zuko has a Linear of its own


def _shifted_masks(shape: Shape) -> list[Tensor]:
    """1 where a feature is shifted: the second half, the first, ..."""
    second = (torch.arange(shape.features) >= shape.half).int()
    return [1 - second if i % 2 else second for i in range(shape.couplings)]


class Mode(NamedTuple):
    """How a precision is asked for."""

    name: str
    matmul: str  # for torch.set_float32_matmul_precision
    autocast: bool = False

    def prepare(self) -> None:
        torch.set_float32_matmul_precision(self.matmul)

    def products(self, device: str = "cpu") -> contextlib.AbstractContextManager[Any]:
        if self.autocast:
            return torch.autocast(device, torch.bfloat16)
        return contextlib.nullcontext()


FLOAT32 = Mode("float32", "highest")
TF32 = Mode("tf32", "high")
MEDIUM = Mode("medium", "medium")
AUTOCAST = Mode("autocast", "highest", autocast=True)
# the first mode is the one whose error, in plain PyTorch, is what a precision allows: "medium" may
# still be float32 products, where the processor has no faster ones in oneDNN's eyes
PRECISIONS = {"float32": (FLOAT32,), "tf32": (TF32,), "bf16": (AUTOCAST, MEDIUM)}


def inference_call(model: Provider, mode: Mode, direction: str) -> Callable[[Tensor], object]:
    """``log_prob``, ``inverse`` or ``sample`` (as many rows as it is given), without gradients."""
    method = getattr(model.ready(mode), direction)

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        with mode.products(x.device.type):
            return method(len(x) if direction == "sample" else x)

    return call


def log_prob_call(model: Provider, mode: Mode) -> Callable[[Tensor], object]:
    return inference_call(model, mode, "log_prob")


def training_call(model: Provider, mode: Mode) -> Callable[[Tensor], object]:
    """One step of maximum likelihood with torch's default Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def call(x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with mode.products(x.device.type):
            loss = -model.log_prob(x).mean()
        loss.backward()
        optimizer.step()

    return call


def make_call(model: Provider, mode: Mode, direction: str) -> Callable[[Tensor], object]:
    """What is timed in a direction."""
    if direction == "training":
        return training_call(model, mode)
    return inference_call(model, mode, direction)
