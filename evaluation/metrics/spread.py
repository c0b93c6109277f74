"""Combines the scores of several sampling seeds, and compares two models that were sampled with the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixlat.common.errors import UserError
from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.records.record import Metric


def over_seeds(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """The mean of every metric over seeds, with all values and their standard deviation; never the best one.

    The error of a mean of S independent estimates is 1/sqrt(S) times the error of one.
    A metric that is equal for all seeds stays unchanged.
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
    """The difference, first minus second, of one metric."""

    metric: str
    value: float
    value_bc: float
    se: float

    @property
    def deviations(self) -> float:
        """The bias-corrected difference in standard errors. Above 3, sampling noise does not explain it."""
        return (
            self.value_bc / self.se if self.se else float(np.copysign(np.inf, self.value_bc)) if self.value_bc else 0.0
        )


def paired_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """The differences between two records, for all metrics with recorded jackknife values.

    Image i of both was made from the same seed and label. When the jackknife leaves group g out of both, the effect of
    everything they share (labels, noise, reference) cancels. Raises UserError if protocols or sampling seeds differ.
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
        raise UserError("these records hold no jackknife values. Evaluate both runs again with `pixlat evaluate`.")
    return [difference(name, first["metrics"][name], second["metrics"][name]) for name in shared]


def difference(name: str, first: Metric, second: Metric) -> Difference:
    """The difference of two estimates with the jackknife error of the paired groups."""
    left_out = [a - b for a, b in zip(first["left_out"], second["left_out"], strict=True)]
    estimate = jackknife(first["value"] - second["value"], left_out)
    return Difference(name, estimate.value, estimate.value_bc, estimate.se)
