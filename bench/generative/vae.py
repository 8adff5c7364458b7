"""A variational auto-encoder (Kingma and Welling 2014, arXiv 1312.6114).

Bayes' rule, ``p(x) = p(x|z) p(z) / p(z|x)``, holds for every z. With any q(z|x) in place of the
unknown p(z|x), the mean over q of ``log p(x|z) + log p(z) - log q(z|x)`` falls short of log p(x) by
``KL(q(z|x) || p(z|x)) >= 0``: it is the ELBO, ``E_q log p(x|z) - KL(q(z|x) || p(z))``. The mean of
k importance weights before the logarithm is a tighter bound, the tighter the larger k (Burda et al.
2016, arXiv 1509.00519, equation 8 and theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import nicefast as nf

LOG_2PI = math.log(2 * math.pi)
CHUNK = 65_536  # rows of x and z that are decoded at a time


class VAE(nn.Module):
    """p(z) = N(0, I), q(z|x) a diagonal Gaussian, p(x|z) a product of logistic or normal densities.

    Data are standardised on the way in, and locations and scales brought back on the way out, with
    the training rows' ``mean`` and ``deviation``: all densities are of x as it is given.

    Args:
        encoder: (N, D) -> (N, 2 L): mean and log standard deviation of q.
        decoder: (N, L) -> (N, 2 D): location and log scale of p(x|z).
        observation: "logistic" or "normal".
        mean, deviation: (D,).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        mean: Tensor,
        deviation: Tensor,
        observation: str = "logistic",
    ) -> None:
        super().__init__()
        if observation not in ("logistic", "normal"):
            raise ValueError(f"observation must be logistic or normal, got {observation!r}")
        self.encoder, self.decoder, self.observation = encoder, decoder, observation
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    @classmethod
    def of_mlps(cls, x: Tensor, latent: int, hidden: Sequence[int]) -> VAE:
        """Two MLPs, and the mean and deviation of ``x`` (N, ...)."""
        rows = x.flatten(1)
        features = rows.shape[1]
        encoder = nf.MLP(features, tuple(hidden), 2 * latent)
        decoder = nf.MLP(latent, tuple(reversed(hidden)), 2 * features)
        return cls(encoder, decoder, rows.mean(0), rows.std(0))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z|x)."""
        standard = (x.flatten(1) - self.mean) / self.deviation
        mean, log_deviation = self.encoder(standard).chunk(2, -1)
        return mean, log_deviation

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Location and log scale of p(x|z)."""
        location, log_scale = self.decoder(z).chunk(2, -1)
        return self.mean + self.deviation * location, self.deviation.log() + log_scale

    def log_observation(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), summed over features in float64 outside of training."""
        location, log_scale = self.decode(z)
        u = (x - location) * torch.exp(-log_scale)
        if self.observation == "logistic":
            each = -functional.softplus(u) - functional.softplus(-u) - log_scale
        else:
            each = -0.5 * (u.square() + LOG_2PI) - log_scale
        return each.sum(-1) if torch.is_grad_enabled() else each.double().sum(-1)

    def elbo(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One reparameterised sample ``z = mean + deviation eps`` a row; KL in closed form."""
        mean, log_deviation = self.posterior(x)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        z = mean + log_deviation.exp() * noise
        divergence = 0.5 * (mean.square() + (2 * log_deviation).exp() - 1) - log_deviation
        return self.log_observation(x.flatten(1), z) - divergence.sum(-1)

    @torch.no_grad()
    def log_weights(self, x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """``log p(x|z) + log p(z) - log q(z|x)`` for z from q(z|x): (N, samples) float64."""
        rows, found = max(1, CHUNK // samples), []
        for part in x.flatten(1).split(rows):
            mean, log_deviation = (p[:, None] for p in self.posterior(part))
            shape = (len(part), samples, mean.shape[-1])
            noise = torch.randn(shape, generator=generator, dtype=part.dtype)
            z = mean + log_deviation.exp() * noise
            ratio = 0.5 * (noise.double().square() - z.double().square()) + log_deviation.double()
            found.append(self.log_observation(part[:, None], z) + ratio.sum(-1))
        return torch.cat(found)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """z from the prior, then x from p(x|z), noise and all: (n, D)."""
        location, log_scale = self.decode(self.prior(n, generator))
        if self.observation == "logistic":
            u = torch.rand(location.shape, generator=generator, dtype=torch.float64)
            noise = u.clamp(1e-16, 1 - 1e-16).logit().to(location.dtype)
        else:
            noise = torch.randn(location.shape, generator=generator, dtype=location.dtype)
        return location + log_scale.exp() * noise

    def prior(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, L) from N(0, I)."""
        latent = self.posterior(self.mean[None])[0].shape[1]
        return torch.randn(n, latent, generator=generator, dtype=self.mean.dtype)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The location of p(x|z) at the mean z of q(z|x)."""
        return self.decode(self.posterior(x)[0])[0].view(x.shape)


def bound(log_weights: Tensor, k: int) -> Tensor:
    """IWAE_k of each row, (N,): the mean over groups of k of ``log mean exp log_weights``.

    k = 1 is the ELBO by sampling. ValueError for a k that is not from 1 to the samples at hand.
    """
    samples = log_weights.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to {samples}, got {k}")
    groups = log_weights[:, : samples // k * k].double().unflatten(1, (-1, k))
    return (groups.logsumexp(2) - math.log(k)).mean(1)
