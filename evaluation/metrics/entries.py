"""The entries of a record's `metrics`, from estimates of single metrics."""

from __future__ import annotations

from torch import Tensor

from pixlat.evaluation.features.feature_sets import balanced_weights, jackknife_groups
from pixlat.evaluation.metrics.jackknife import Estimate, jackknife
from pixlat.evaluation.metrics.kid import KernelDistance
from pixlat.evaluation.protocols.identity import JACKKNIFE_GROUPS
from pixlat.evaluation.records.record import Metric


def frechet_metric(estimate: Estimate, n: int, regularised: bool) -> Metric:
    """The record's entry for a Fréchet distance. regularised: the reference's covariance was not positive definite."""
    left_out = list(estimate.left_out)
    return {
        "value": estimate.value, "value_bc": estimate.value_bc, "se": estimate.se, "left_out": left_out,
        "n": n, "unit": "feature^2", "regularised": regularised,
    }  # fmt: skip


def kid_metric(kid: KernelDistance, n: int) -> Metric:
    """The record's entry for KID, which is unbiased and needs no bias-corrected value."""
    entry = {"value": kid.value, "value_bc": None, "se": kid.se, "n": n, "unit": "1"}
    return entry | ({"left_out": list(kid.left_out)} if kid.left_out else {})


def mean_metric(values: Tensor, weights: Tensor | None = None) -> Metric:
    """The record's entry for the mean of per-image values (n,).

    The standard error assumes independent images. With weights, which only reference images have, there is none.
    """
    n = len(values)
    mean = values.mean() if weights is None else (weights * values).sum() / weights.sum()
    se = None if weights is not None else float(values.std()) / n**0.5
    return {"value": float(mean), "value_bc": None, "se": se, "n": n, "unit": "1"}


def balanced_metric(values: Tensor, labels: Tensor | None) -> Metric:
    """The record's entry for a mean over generated images, values (n,), in which every class weighs alike.

    labels: (n,), or None if they are not known. The error is the jackknife's.
    """
    group = jackknife_groups(labels, len(values))

    def mean(chosen: Tensor) -> float:
        weights = balanced_weights(None if labels is None else labels[chosen], int(chosen.sum()))
        return float((weights * values[chosen]).sum() / weights.sum())

    left_out = [mean(group != g) for g in range(JACKKNIFE_GROUPS)]
    return plain_metric(jackknife(mean(group >= 0), left_out), len(values))


def plain_metric(estimate: Estimate, n: int, se_real: float | None = None) -> Metric:
    """The record's entry for an estimate without bias correction.

    se_real: the part of the error that the real images cause. All rows of a table share it, so `left_out`, which serves
    the differences of rows, does not contain it.
    """
    entry: Metric = {"value": estimate.value, "value_bc": None, "se": estimate.se, "n": n, "unit": "1"}
    entry["left_out"] = list(estimate.left_out)
    if se_real is not None:
        entry |= {"se": (estimate.se**2 + se_real**2) ** 0.5, "se_real": se_real}
    return entry
