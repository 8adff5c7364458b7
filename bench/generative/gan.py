"""A generative adversarial network (Goodfellow et al. 2014, arXiv 1406.2661).

The value of the game is ``V = E_p log D(x) + E_q log(1 - D(x))`` (equation 1), p being the data and
q what the generator makes. D = p / (p + q) maximises it, to ``2 JSD(p, q) - 2 ln 2``: -2 ln 2 where
q = p (proposition 1, theorem 1). The generator maximises ``E_q log D`` instead of minimising
``E_q log(1 - D)`` (end of section 3): the fixed point is the same, and gradients do not vanish.
There is no likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import nicefast as nf


def value(real: Tensor, fake: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
    """V of the discriminator's logits, in nats; ``p`` and ``q`` are weights in place of means.

    >>> value(torch.zeros(3), torch.zeros(3))
    tensor(-1.3863)
    """
    return _mean(functional.logsigmoid(real), p) + _mean(functional.logsigmoid(-fake), q)


def generator_loss(fake: Tensor, q: Tensor | None = None) -> Tensor:
    """``-E_q log D``, the non-saturating loss."""
    return -_mean(functional.logsigmoid(fake), q)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (values * weights).sum()


class Generator(nn.Module):
    """z from N(0, I), an MLP, and the training rows' mean and deviation."""

    def __init__(self, x: Tensor, latent: int, hidden: Sequence[int]) -> None:
        super().__init__()
        rows = x.flatten(1)
        self.latent = latent
        self.net = nf.MLP(latent, tuple(hidden), rows.shape[1])
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("deviation", rows.std(0))

    def forward(self, z: Tensor) -> Tensor:
        return self.mean + self.deviation * self.net(z)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self(torch.randn(n, self.latent, generator=generator))


class Adversaries:
    """Generator, discriminator and their optimisers: a step of each for a batch."""

    def __init__(self, x: Tensor, latent: int, hidden: Sequence[int], lr: float) -> None:
        self.generator = Generator(x, latent, hidden)
        layers: list[nn.Module] = []
        width = x[0].numel()
        for units in hidden:
            layers += [nn.Linear(width, units), nn.LeakyReLU(0.2), nn.Dropout(0.2)]
            width = units
        self.discriminator = nn.Sequential(*layers, nn.Linear(width, 1))
        self._optimisers = [
            torch.optim.Adam(m.parameters(), lr=lr, betas=(0.5, 0.99))
            for m in (self.generator, self.discriminator)
        ]

    def judge(self, x: Tensor) -> Tensor:
        """Logits of D, (N,)."""
        standard = (x.flatten(1) - self.generator.mean) / self.generator.deviation
        return self.discriminator(standard).squeeze(1)

    def step(self, x: Tensor) -> None:
        """The discriminator's step up V, then the generator's down its loss."""
        made = self.generator(torch.randn(len(x), self.generator.latent))
        generators, discriminators = self._optimisers
        discriminators.zero_grad()
        (-value(self.judge(x), self.judge(made.detach()))).backward()
        discriminators.step()
        generators.zero_grad()
        generator_loss(self.judge(made)).backward()
        generators.step()
