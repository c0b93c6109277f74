"""The Fréchet distance between Gaussians, exact in float64, and its error bar.

FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).
With S1 = L L^T the last trace is the sum of the square roots of the eigenvalues of the symmetric matrix L^T S2 L. They
are real by construction and far cheaper than general eigenvalues or a matrix root (`pixlat bench frechet`).

SciPy's LAPACK computes the Cholesky factor, the congruence and the eigenvalues. NumPy's and PyTorch's BLAS have
separate threads, which spin for a while after a product and would take the cores from SciPy's threads. The matrices
are symmetric, so NumPy's row order is the same as LAPACK's column order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.evaluation.features.moments import Gaussian

#: Matrices of at most this size take PyTorch's eigenvalues: they need no second set of threads, and on one thread
#: they take milliseconds. On two busy cores SciPy's threads and PyTorch's waited for each other 500 times as long.
SMALL = 512


@dataclass(frozen=True)
class Factored:
    """A reference whose covariance is factored once, S = L L^T."""

    gaussian: Gaussian
    factor: Tensor  # (D, D); unless regularised, only its lower triangle is valid: the upper one is not zero
    regularised: bool  # whether Cholesky failed: S is singular, or negative eigenvalues were set to 0


def factorise(gaussian: Gaussian) -> Factored:
    """The Cholesky factor, or V sqrt(max(lambda, 0)) of the eigendecomposition if S is not positive definite."""
    if gaussian.n > len(gaussian.mean):
        factor, fault = lapack.dpotrf(gaussian.cov.numpy().T, lower=1, clean=0)
        if not fault:
            return Factored(gaussian, torch.from_numpy(factor), regularised=False)
    eigenvalues, vectors = torch.linalg.eigh(gaussian.cov)
    return Factored(gaussian, vectors * eigenvalues.clamp_min(0).sqrt(), regularised=True)


def frechet_distance(generated: Gaussian, reference: Factored) -> float:
    """FD in squared feature units."""
    if len(generated.mean) <= SMALL:
        lower = reference.factor if reference.regularised else reference.factor.tril()
        found = torch.linalg.eigvalsh(lower.T @ generated.cov @ lower)
        rank = min(len(found), generated.n - 1, reference.gaussian.n - 1)
        return _assemble(generated.mean, generated.cov.trace(), found[-rank:], reference)
    L, S = reference.factor.numpy(), generated.cov.numpy()
    # the lower triangle of L^T S L
    middle = L.T @ S @ L if reference.regularised else lapack.dsygst(S.T, L, itype=2, lower=1)[0]
    eigenvalues = torch.from_numpy(symmetric_eigenvalues(middle))
    # the other eigenvalues are rounding errors, whose roots would add up
    rank = min(len(eigenvalues), generated.n - 1, reference.gaussian.n - 1)
    return _assemble(generated.mean, generated.cov.trace(), eigenvalues[-rank:], reference)


def symmetric_eigenvalues(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The eigenvalues in ascending order. Reads and overwrites the lower triangle.

    It does the same as LAPACK's dsyev without dsyev's two passes for the norm.
    """
    workspace = int(lapack.dsytrd_lwork(len(matrix), lower=1)[0])
    _, diagonal, beside, _, _ = lapack.dsytrd(matrix, lower=1, lwork=workspace, overwrite_a=1)
    eigenvalues, fault = lapack.dsterf(diagonal, beside)
    if fault:
        raise UserError(
            f"Fréchet distance: LAPACK's dsterf found no eigenvalues ({fault}); "
            "are there NaN or infinite values among the features?"
        )
    return cast("NDArray[np.float64]", eigenvalues)


def frechet_distance_few(features: Tensor, reference: Factored, weights: Tensor | None = None) -> float:
    """FD for n < D generated features (n, D); weights (n,) default to 1.

    It uses the eigenvalues of the n x n matrix X S X^T / (n - 1), where X has the centred features as rows. With
    weights w the rows are scaled by sqrt(w), and the divisor is that of `features.moments`: sum w - sum w^2 / sum w.
    """
    features = features.double()
    w = features.new_ones(len(features)) if weights is None else weights.double()
    mean = (w[:, None] * features).sum(0) / w.sum()
    centred = w[:, None].sqrt() * (features - mean)
    projected = centred @ (reference.factor if reference.regularised else reference.factor.tril())
    divisor = w.sum() - w.square().sum() / w.sum()
    rank = min(len(features) - 1, reference.gaussian.n - 1)
    eigenvalues = torch.linalg.eigvalsh(projected @ projected.T / divisor)[-rank:]
    return _assemble(mean, centred.square().sum() / divisor, eigenvalues, reference)


def _assemble(mean: Tensor, trace: Tensor, eigenvalues: Tensor, reference: Factored) -> float:
    offset = (mean - reference.gaussian.mean).square().sum()
    root = eigenvalues.clamp_min(0).sqrt().sum()
    return float(offset + trace + reference.gaussian.cov.trace() - 2 * root)
