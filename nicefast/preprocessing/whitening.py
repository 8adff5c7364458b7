"""Whitening, the invertible step that learns a matrix: principal components, ZCA, triangular."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice
from ..runtime.precision import at_matmul_precision
from .moments import Rows, moments
from .transforms import check_numbers, check_vectors, check_width, constant, like

KINDS = ("zca", "pca", "approximate")


@dataclass(frozen=True, eq=False)
class Whiten:
    """``y = (x - mean) F``, of covariance I (but for epsilon): a linear map, exactly invertible.

    With S the covariance of x and v = ``variance``, ``log_det = -1/2 sum_d log v_d`` for each kind:

    - ``"pca"``: ``S = V diag(l) V^T``, ``v = l + epsilon``, ``F = V diag(v)^(-1/2)``. Features are
      principal components, the largest first.
    - ``"zca"``: ``F = V diag(v)^(-1/2) V^T``, symmetric: of all whitenings the nearest to x, so
      that images still look like images.
    - ``"approximate"``: the affine layer ``L x + b`` that Dinh et al. (2014, section 5.1) learn for
      TFD. They learn it by gradient; for a triangular L the likelihood of a standard normal prior
      has one optimum, which is taken here in closed form. With ``S + epsilon I = B diag(v) B^T``,
      B unit lower triangular, ``L = diag(v)^(-1/2) B^-1`` and ``F = L^T``: each feature less its
      regression on those before it, over the standard deviation of what is left. Approximate is
      the paper's word; this one whitens as fully as the others.

    Args:
        kind: which.
        epsilon: what was added to the variance of every direction, in squared units of x.
        mean: (D,). basis: (D, D), V or B. variance: (D,), v; all float64.

    ValueError for an unknown kind, tensors that do not fit it, and rows of another width.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    >>> Whiten.fit(x, "zca", epsilon=0.0).forward(x)[0].T.cov(correction=0).round(decimals=3).abs()
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """

    kind: str
    epsilon: float
    mean: Tensor
    basis: Tensor
    variance: Tensor
    name: ClassVar[str] = "whiten"
    _made: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_whitening(self.kind, self.epsilon)
        check_vectors(mean=self.mean, variance=self.variance)
        d, basis = len(self.mean), self.basis
        if basis.shape != (d, d) or basis.dtype != torch.float64:
            raise ValueError(f"basis must be float64 {(d, d)}, got {basis.dtype} {basis.shape}")
        if not (self.variance > 0).all():
            raise ValueError("variance must be positive")
        probe = torch.linspace(-1, 1, d, dtype=torch.float64, device=basis.device).cos()
        if self.kind == "approximate":
            fits = torch.equal(basis.tril(), basis) and bool((basis.diagonal() == 1).all())
        else:
            fits = torch.allclose(basis.T @ (basis @ probe), probe, rtol=0, atol=1e-8)
        if not fits or not basis.isfinite().all():
            wanted = "unit lower triangular" if self.kind == "approximate" else "orthogonal"
            raise ValueError(f"basis must be {wanted} for kind {self.kind!r}")

    @classmethod
    def fit(cls, x: Rows, kind: str = "zca", epsilon: float = 1e-6) -> Whiten:
        """From the mean and covariance (of the population) of ``x``, in float64.

        ValueError where the covariance is singular and epsilon does not help.
        """
        _check_whitening(kind, epsilon)
        found = moments(x, products=True)
        mean, covariance, d = found.mean, found.second, len(found.mean)
        if kind == "approximate":
            factor, _ = torch.linalg.cholesky_ex(
                covariance + epsilon * torch.eye(d, dtype=torch.float64, device=covariance.device)
            )
            scale = factor.diagonal()
            basis, variance = factor / scale, scale * scale
            least = d * torch.finfo(torch.float64).eps * (covariance.diagonal().max() + epsilon)
        else:
            values, vectors = torch.linalg.eigh(covariance)
            variance, basis = values.clamp(min=0).flip(0) + epsilon, vectors.flip(1)
            least = d * torch.finfo(torch.float64).eps * variance.max()
        lost = int((~(variance > least)).sum())  # NaN, where the factorisation came to nothing
        if lost:
            raise ValueError(
                f"the covariance is singular: {lost} of {d} directions have no variance of their "
                f"own with epsilon = {epsilon:g}; give a larger one, such as 1e-6"
            )
        return cls(kind, epsilon, mean, basis.contiguous(), variance.contiguous())

    @property
    def configuration(self) -> dict[str, Any]:
        return {"kind": self.kind, "epsilon": self.epsilon}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "basis": self.basis, "variance": self.variance}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, matrix = self._matrix(x, inverse=False)
        with _exact_products(x.device):
            y = (x - mean) @ matrix
        return y, constant(y, -0.5 * self.variance.log().sum().item())

    def inverse(self, y: Tensor) -> Tensor:
        mean, matrix = self._matrix(y, inverse=True)
        with _exact_products(y.device):
            return y @ matrix + mean

    def describe(self) -> str:
        return f"whiten: {self.kind}, {len(self.mean)} features, epsilon = {self.epsilon:g}"

    def _matrix(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The mean and F, or its inverse, as ``x`` needs them."""
        check_width(x, self.mean)
        key = "inverse" if inverse else "forward"
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():  # or it could not be used elsewhere
                self._made[key] = self._product(inverse).contiguous()
        return like(self._made, "mean", self.mean, x), like(self._made, key, self._made[key], x)

    def _product(self, inverse: bool) -> Tensor:
        """F, or its inverse, in float64."""
        scale, basis = self.variance.sqrt(), self.basis
        if self.kind == "zca":
            return (basis * scale if inverse else basis / scale) @ basis.T
        if inverse:
            return scale[:, None] * basis.T
        if self.kind == "pca":
            return basis / scale
        eye = torch.eye(len(scale), dtype=torch.float64, device=basis.device)
        solved = torch.linalg.solve_triangular(basis, eye, upper=False, unitriangular=True)
        return solved.T / scale


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Products in the dtype of their operands, whatever training has in force."""
    with at_matmul_precision("highest"), torch.autocast(device.type, enabled=False):
        yield


def _check_whitening(kind: str, epsilon: float) -> None:
    check_choice("kind", kind, KINDS)
    check_numbers(epsilon=epsilon)
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
