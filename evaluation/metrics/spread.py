"""Combines the scores of several seeds, and compares two models by paired differences. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pixlat.common.errors import UserError
from pixlat.evaluation.metrics.jackknife import jackknife
from pixlat.evaluation.metrics.student import t_quantile
from pixlat.evaluation.protocols.identity import JACKKNIFE_GROUPS
from pixlat.evaluation.records.record import Metric

OF_REAL_IMAGES = ("fd_floor", "class_accuracy_real")  # metrics of held-out images, which no model changes


def over_seeds(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """The mean of every metric over sampling seeds, with all values and their standard deviation; never the best one.

    The error of a mean of S independent estimates is 1/sqrt(S) times the error of one. The part of the error that is
    due to the held-out images (`se_real`) is the same for all seeds, so it does not become smaller.
    A metric that is equal for all seeds stays unchanged.
    """
    if len(parts) == 1:
        return parts[0]
    return {name: _over_seeds([part[name] for part in parts]) for name in parts[0]}


def _over_seeds(metrics: Sequence[Metric]) -> Metric:
    values = [metric["value"] for metric in metrics]
    if all(metric == metrics[0] for metric in metrics):
        return metrics[0]
    result = {**metrics[0], "value": fmean(values), "values": values, "sd_seeds": stdev(values)}
    if metrics[0].get("value_bc") is not None:
        result["value_bc"] = fmean(metric["value_bc"] for metric in metrics)
    if metrics[0].get("se") is not None:
        result["se"] = math.hypot(math.hypot(*map(own_error, metrics)) / len(metrics), shared_error(metrics[0]))
    if "left_out" in metrics[0]:
        result["left_out"] = [fmean(column) for column in zip(*(m["left_out"] for m in metrics), strict=True)]
    return result


def shared_error(metric: Metric) -> float:
    """The part of the standard error that is due to the held-out images, which all rows share."""
    return float(metric.get("se_real") or 0.0)


def own_error(metric: Metric) -> float:
    """The standard error without the part that all rows share; 0 if none is recorded."""
    return math.sqrt(max((metric.get("se") or 0.0) ** 2 - shared_error(metric) ** 2, 0.0))


def mean_of_trainings(metrics: Sequence[Metric]) -> Metric:
    """One metric as the mean over several trainings with different seeds; its error includes that of training.

    The error is the values' standard deviation divided by sqrt(n), with the part that all rows share.
    """
    values = [metric["value"] for metric in metrics]
    corrected = [metric.get("value_bc") for metric in metrics]
    error = math.hypot(stdev(values) / math.sqrt(len(values)), shared_error(metrics[0]))
    bias_corrected = None if None in corrected else fmean(map(float, corrected))  # type: ignore[arg-type]
    kept: Metric = {key: metrics[0][key] for key in ("n", "unit", "se_real") if key in metrics[0]}
    return {**kept, "value": fmean(values), "value_bc": bias_corrected, "se": error, "values": values}


# -- differences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The difference, first minus second, of one metric."""

    metric: str
    value: float
    value_bc: float  # equal to `value` for a metric that is not bias-corrected
    se: float
    df: int = JACKKNIFE_GROUPS - 1  # degrees of freedom of `se`
    seeds: int = 1  # the training seeds that both have

    @property
    def deviations(self) -> float:
        """The bias-corrected difference in standard errors. Above 3, sampling noise does not explain it."""
        return self.value_bc / self.se if self.se else math.copysign(math.inf, self.value_bc) if self.value_bc else 0.0

    @property
    def margin(self) -> float:
        """Half of the 95 % interval of the bias-corrected difference (Student's t)."""
        return t_quantile(self.df) * self.se

    @property
    def separated(self) -> bool:
        """Whether the 95 % interval of the difference excludes zero."""
        return abs(self.value_bc) > self.margin


def paired_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """The differences between two records, for all metrics with recorded jackknife values.

    Image i of both was made from the same seed and label. When the jackknife leaves group g out of both, the effect of
    everything they share (labels, noise, reference) cancels. Raises UserError if protocols or sampling seeds differ.
    """
    check_same_measurement(first, second)
    seeds = [record.get("seeds", {}).get("sample") for record in (first, second)]
    if seeds[0] is None or seeds[0] != seeds[1]:
        raise UserError(
            f"{first['name']} was sampled with seeds {seeds[0]} and {second['name']} with {seeds[1]}: "
            "give both the same seeds=."
        )
    shared = [name for name in first["metrics"] if name not in OF_REAL_IMAGES and has_groups(first, second, name)]
    if not shared:
        raise UserError("these records hold no jackknife values. Evaluate both runs again with `pixlat evaluate`.")
    return [difference(name, first["metrics"][name], second["metrics"][name]) for name in shared]


def check_same_measurement(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raises UserError unless both records were measured under one protocol."""
    if first["protocol_hash"] != second["protocol_hash"] or first["protocol_hash"] is None:
        raise UserError(
            f"{first['name']} and {second['name']} were measured differently ({first['protocol_hash']} "
            f"and {second['protocol_hash']})."
        )


def has_groups(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> bool:
    """Whether both records have as many jackknife values of a metric."""
    counts = [len(record["metrics"].get(name, {}).get("left_out") or ()) for record in (first, second)]
    return counts[0] == counts[1] > 1


def difference(name: str, first: Metric, second: Metric) -> Difference:
    """The difference of two estimates with the jackknife error of the paired groups."""
    left_out = [a - b for a, b in zip(first["left_out"], second["left_out"], strict=True)]
    estimate = jackknife(first["value"] - second["value"], left_out)
    corrected = None not in (first.get("value_bc"), second.get("value_bc"))
    value_bc = estimate.value_bc if corrected else estimate.value
    return Difference(name, estimate.value, value_bc, estimate.se, len(left_out) - 1)


def trained_difference(
    name: str, first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]]
) -> Difference | None:
    """The difference of one metric between two models whose records are keyed by their training seed.

    With several common training seeds it is the mean of the differences of equal seeds, and its error is the spread of
    these differences, which includes the randomness of training. With one it is the paired jackknife, whose error is
    that of sampling alone. None if no pair of records with a common training seed can be compared.
    """
    common = sorted(first.keys() & second.keys())
    if len(common) == 1:
        one, other = first[common[0]], second[common[0]]
        alike = one.get("seeds", {}).get("sample") == other.get("seeds", {}).get("sample")
        paired = alike and has_groups(one, other, name)
        return difference(name, one["metrics"][name], other["metrics"][name]) if paired else None
    return over_trainings(name, [(first[seed], second[seed]) for seed in common]) if common else None


def over_trainings(name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Difference:
    """The mean difference of at least two pairs of records of the same training seed."""
    metrics = [(first["metrics"][name], second["metrics"][name]) for first, second in pairs]
    plain = [a["value"] - b["value"] for a, b in metrics]
    corrected = [best_value(a, b) for a, b in metrics]
    error = stdev(corrected) / math.sqrt(len(corrected))
    return Difference(name, fmean(plain), fmean(corrected), error, len(corrected) - 1, len(corrected))


def best_value(first: Metric, second: Metric) -> float:
    """The difference of two estimates, of the bias-corrected ones if both are recorded."""
    field = "value" if None in (first.get("value_bc"), second.get("value_bc")) else "value_bc"
    return float(first[field] - second[field])


def unpaired_difference(name: str, first: Sequence[Metric], second: Sequence[Metric]) -> Difference:
    """The difference of two models that have no common training seed or no jackknife values, from their two errors.

    Each model's metrics are those of its trainings. Without recorded errors the interval has no width.
    """
    one, other = (metrics[0] if len(metrics) == 1 else mean_of_trainings(metrics) for metrics in (first, second))
    df = min(JACKKNIFE_GROUPS if len(metrics) == 1 else len(metrics) for metrics in (first, second)) - 1
    error = math.hypot(own_error(one), own_error(other))
    return Difference(name, one["value"] - other["value"], best_value(one, other), error, df, 0)
