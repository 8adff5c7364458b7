"""Rows worth a look: on the way from one to another, and the nearest that training has seen."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..checks import check_count, check_tensor, check_type


class Flow(Protocol):
    """What :func:`interpolate` needs of a :class:`nicefast.NICE`."""

    prior_name: str
    event_shape: torch.Size

    def forward(self, x: Tensor, /) -> tuple[Tensor, Tensor]: ...

    def inverse(self, z: Tensor, /) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def interpolate(model: Flow, a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Rows on the way from ``a`` to ``b`` through latent space, both ends among them.

    With the normal prior the way is spherical, ``(sin((1-t) w) z_a + sin(t w) z_b) / sin w`` with
    w the angle between z_a and z_b, which keeps to the lengths that the prior makes likely. With
    any other prior it is the straight line ``(1-t) z_a + t z_b``.

    Args:
        model: a NICE without context.
        a, b: (R, \\*event_shape), floating point, as the model sees rows.
        steps: rows for each pair, >= 2.

    Returns:
        (R, steps, \\*event_shape); the ends are a and b but for rounding.

    Raises ValueError for shapes that differ or do not fit the model, and for steps below 2.

    >>> import nicefast as nf
    >>> a, b = torch.rand(2, 3, 1, 4, 4)
    >>> way = interpolate(nf.NICE((1, 4, 4), hidden=(8,)), a, b, 5)
    >>> way.shape, torch.allclose(way[:, -1], b, atol=1e-5)
    (torch.Size([3, 5, 1, 4, 4]), True)
    """
    if not hasattr(model, "event_shape"):
        raise TypeError(f"model must be a nicefast.NICE, got {type(model).__name__}")
    check_tensor("a", a)
    check_tensor("b", b)
    event = tuple(model.event_shape)
    if a.shape != b.shape or tuple(a.shape[1:]) != event:
        raise ValueError(
            f"a and b must both have shape (R, {', '.join(map(str, event))}), "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    steps = check_count("steps", steps, 2)
    ends = [model.forward(x)[0].flatten(1).unsqueeze(1) for x in (a, b)]
    t = torch.linspace(0, 1, steps, dtype=ends[0].dtype, device=a.device).view(1, -1, 1)
    weights = (1 - t, t)
    if model.prior_name == "normal":
        cosine = torch.cosine_similarity(ends[0], ends[1], dim=-1).clamp(-1, 1).unsqueeze(-1)
        angle = cosine.acos()
        # where the ends point the same way, or opposite ways, no arc is given
        arc = angle.sin() > 1e-4
        sine = angle.sin().clamp(min=1e-4)
        near, far = (torch.where(arc, (w * angle).sin() / sine, w) for w in weights)
        weights = (near, far)
    z = weights[0] * ends[0] + weights[1] * ends[1]
    x, _ = model.inverse(z.reshape(-1, *event))
    return x.view(len(a), steps, *event)


@torch.no_grad()
def nearest(samples: Tensor, train: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """The training row nearest to each sample in Euclidean distance: ``(indices, distances)``.

    Blockwise: at most ``chunk`` training rows and ``chunk`` samples are looked at together, in
    float64, so memory is ``chunk (chunk + 2 D)`` doubles beside what came.

    Args:
        samples: (M, \\*event_shape), any real dtype, finite.
        train: (N, \\*event_shape), N >= 1, in the same units, on the same device.
        chunk: >= 1.

    Returns:
        indices (M,) int64, the first of equally near ones but for rounding; distances (M,) float64.

    Raises ValueError for shapes that do not fit, no training rows, or a chunk below 1.

    >>> indices, distances = nearest(torch.tensor([[0.9, 0.0]]), torch.eye(2))
    >>> indices, distances
    (tensor([0]), tensor([0.1000], dtype=torch.float64))
    """
    check_type("samples", samples, Tensor, "a torch.Tensor")
    check_type("train", train, Tensor, "a torch.Tensor")
    if samples.ndim < 2 or samples.shape[1:] != train.shape[1:] or not len(train):
        raise ValueError(
            f"samples and train must be (M, *event_shape) and (N, *event_shape) with N >= 1, "
            f"got {tuple(samples.shape)} and {tuple(train.shape)}"
        )
    chunk = check_count("chunk", chunk, 1)
    indices = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    distances = torch.full((len(samples),), torch.inf, dtype=torch.float64, device=samples.device)
    for start in range(0, len(train), chunk):
        rows = train[start : start + chunk].flatten(1).double()
        lengths = rows.square().sum(1)
        for first in range(0, len(samples), chunk):
            some = slice(first, first + chunk)
            points = samples[some].flatten(1).double()
            # the samples' own lengths shift all candidates alike
            found, where = torch.addmm(lengths, points, rows.T, alpha=-2).min(1)
            better = found < distances[some]
            distances[some] = torch.where(better, found, distances[some])
            indices[some] = torch.where(better, where + start, indices[some])
    for first in range(0, len(samples), chunk):  # again, without the difference of large numbers
        some = slice(first, first + chunk)
        gap = samples[some].double() - train[indices[some]].double()
        distances[some] = gap.flatten(1).norm(dim=1)
    return indices, distances
