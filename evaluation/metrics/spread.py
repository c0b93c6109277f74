"""Several sampling seeds of one model as one score, and the difference between two models
that were sampled with the same seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixlat.common.errors import UserError
from pixlat.evaluation.metrics.frechet import jackknife
from pixlat.evaluation.records.record import Metric


def over_seeds(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """The metrics of each seed as their mean, with all values and their standard deviation; never the best one.

    The error of a mean of S independent estimates is 1/sqrt(S) of theirs.
    Metrics that do not depend on the seed keep what they were.
    """
    if len(parts) == 1:
        return parts[0]
    return {name: _over_seeds([part[name] for part in parts]) for name in parts[0]}


def _over_seeds(metrics: Sequence[Metric]) -> Metric:
    values = [metric["value"] for metric in metrics]
    if all(metric == metrics[0] for metric in metrics):
        return metrics[0]
    result = {
        **metrics[0],
        "value": float(np.mean(values)),
        "values": values,
        "sd_seeds": float(np.std(values, ddof=1)),
    }
    if metrics[0].get("value_bc") is not None:
        result["value_bc"] = float(np.mean([metric["value_bc"] for metric in metrics]))
    if metrics[0].get("se") is not None:
        result["se"] = float(np.linalg.norm([metric["se"] for metric in metrics])) / len(metrics)
    if "left_out" in metrics[0]:
        result["left_out"] = np.mean([metric["left_out"] for metric in metrics], axis=0).tolist()
    return result


@dataclass(frozen=True)
class Difference:
    """First minus second, of one metric."""

    metric: str
    value: float
    value_bc: float
    se: float

    @property
    def deviations(self) -> float:
        """The bias-corrected difference in standard errors; beyond 3 it is no accident of sampling."""
        return (
            self.value_bc / self.se if self.se else float(np.copysign(np.inf, self.value_bc)) if self.value_bc else 0.0
        )


def paired_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """The metrics in which two records differ, for those whose jackknife values were kept.

    Image i of both was made from the same seed and label, so what both share (labels, noise, the reference)
    cancels when group g is left out of both. Records of other protocols, or sampled with other seeds, are a UserError.
    """
    if first["protocol_hash"] != second["protocol_hash"] or first["protocol_hash"] is None:
        raise UserError(
            f"{first['name']} and {second['name']} were measured differently ({first['protocol_hash']} "
            f"and {second['protocol_hash']})."
        )
    seeds = [record.get("seeds", {}).get("sample") for record in (first, second)]
    if seeds[0] is None or seeds[0] != seeds[1]:
        raise UserError(
            f"{first['name']} was sampled with seeds {seeds[0]} and {second['name']} with {seeds[1]}: "
            "give both the same seeds=."
        )
    shared = [
        name
        for name, metric in first["metrics"].items()
        if metric.get("left_out") and second["metrics"].get(name, {}).get("left_out")
    ]
    shared = [name for name in shared if name != "fd_floor"]
    if not shared:
        raise UserError(
            "no metric of these records keeps its jackknife values. Evaluate both again with `pixlat evaluate`."
        )
    return [difference(name, first["metrics"][name], second["metrics"][name]) for name in shared]


def difference(name: str, first: Metric, second: Metric) -> Difference:
    """The jackknife of the difference of two estimates whose groups belong together."""
    left_out = [a - b for a, b in zip(first["left_out"], second["left_out"], strict=True)]
    estimate = jackknife(first["value"] - second["value"], left_out)
    return Difference(name, estimate.value, estimate.value_bc, estimate.se)
