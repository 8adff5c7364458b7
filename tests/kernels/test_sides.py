"""Rows to the sides of a partition and back, of every kind of partition."""

import pytest
import torch

import nicefast as nf
from helpers import partitions, strided

pytest.importorskip("triton", reason="needs Triton")

from nicefast.kernels.sides import _places, enter, leave

R = nf.reference


@pytest.mark.parametrize("kind", ["dense", "rows", "columns"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("d", [3, 4, 9, 40, 150])
def test_there_and_back(guarded, device, d, inverse, kind):
    sign = -1 if inverse else 1
    for i, p in enumerate(partitions(d)):
        sides = p.locate(device, conditioning=True), p.locate(device)
        order = [s.columns for s in sides]
        b = [
            torch.randn(s.size, device=device) if i % 3 != k else None for k, s in enumerate(sides)
        ]
        added = torch.cat(
            [
                torch.zeros(s.size, device=device) if v is None else v
                for v, s in zip(b, sides, strict=True)
            ]
        )
        x = strided(torch.randn(17, d, device=device), kind)
        log_scale = 0.3 * torch.randn(d, device=device)
        y = enter(x, sides, tuple(b), log_scale if inverse else None, inverse)
        scaled = x * torch.exp(-log_scale) if inverse else x
        want = torch.cat([scaled[:, c] for c in order], 1) + sign * added
        torch.testing.assert_close(y, want)
        z, log_prob = torch.empty(17, d, device=device), torch.empty(17, device=device)
        leave(y, sides, tuple(b), log_scale, "logistic", inverse, z, log_prob)
        back = torch.empty(17, d, device=device)
        back[:, order[0]], back[:, order[1]] = (y + sign * added).split([s.size for s in sides], 1)
        exact = R.scale_log_prob(back, log_scale, "logistic", return_z=True)
        torch.testing.assert_close(z, exact[0])
        torch.testing.assert_close(log_prob, exact[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("d", [3, 4, 9, 40])
def test_alternating_sides_are_told_from_others(device, d):
    for i, p in enumerate(partitions(d)):
        sides = p.locate(device, conditioning=True), p.locate(device)
        assert _places(sides)["ALTERNATING"] == (i in (2, 3) or p.mask.tolist() in _alternating(d))


def _alternating(d):
    return [[(j + k) % 2 == 0 for j in range(d)] for k in range(2)]
