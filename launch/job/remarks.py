"""Warnings about a finished run: samples that show nothing, and scores that an untrained network reaches as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixlat.common.pictures.neighbours import contrast, variety

SAMPLES = "The samples "  # every remark on samples begins so
FAINT = 0.2  # share of the contrast, or the variety, of real images; below it a grid shows hardly anything
CAUSES = (
    "Likely causes: a training too short for its average (eval.ema=raw shows the weights without it), "
    "a learning rate that is far too high or too low, or labels that do not fit the images."
)

DISTANCES = ("fd_ratio", "fd")  # of the embedded protocol; without held-out images there is no ratio


def warning_lines(record: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> list[str]:
    """For a run's summary: the notes of its record, remarks on its scores beside `others` in the folder, causes."""
    notes = [record["notes"]] if record["notes"] else []
    remarks = score_remarks(record, others)
    causes = [CAUSES] if remarks or any(SAMPLES in note for note in notes) else []
    return [f"  {line}" for line in (*notes, *remarks, *causes)]


def sample_remarks(samples: NDArray[np.uint8], real: NDArray[np.uint8]) -> list[str]:
    """Visible faults of samples (N, 3, H, W) uint8, compared with real images (M, 3, H, W) uint8.

    Returns nothing for fewer than two samples or two real images.
    """
    if len(samples) < 2 or len(real) < 2:
        return []
    remarks = []
    faint, usual = float(np.median(contrast(samples))), float(np.median(contrast(real)))
    if faint < FAINT * usual:
        remarks.append(f"{SAMPLES}have almost no contrast: {faint:.3f} where real images have {usual:.3f}.")
    alike, apart = variety(samples), variety(real)
    if alike < FAINT * apart:
        remarks.append(
            f"{SAMPLES}are almost all alike: they differ by {alike:.3f} where real images differ by {apart:.3f}."
        )
    return remarks


def score_remarks(record: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> list[str]:
    """Remarks on scores of a trained run that are no better than those of an untrained network.

    Two facts are known without sampling from an untrained network. Its samples show no class, so the classifier only
    guesses. And the folder may have the record of an untrained run (train.images=0) under the same protocol.
    """
    if not record.get("train", {}).get("images_seen"):
        return []
    remarks = []
    metrics, classes = record["metrics"], record["data"]["num_classes"]
    shown, real = metrics.get("class_accuracy"), record.get("real", {}).get("metrics", {}).get("class_accuracy")
    if shown and real and classes > 1:
        guessing = 1 / classes + 2 * (shown["se"] or 0)
        if shown["value"] <= guessing < real["value"] / 2:
            remarks.append(
                f"{SAMPLES}do not show their classes: {shown['value']:.3f} of them are recognised, "
                f"as by guessing and as of an untrained network; of real images {real['value']:.3f}."
            )
    for other in others:
        if (
            _is_untrained(other, record)
            and (name := next((each for each in DISTANCES if each in metrics), None))
            and metrics[name]["value"] >= other["metrics"][name]["value"]
        ):
            remarks.append(
                f"The distance {name}={metrics[name]['value']:.4g} is no better than that of the untrained "
                f"{other['name']} ({other['metrics'][name]['value']:.4g})."
            )
            break
    return remarks


def _is_untrained(other: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether `other` is the record of an untrained network with the same metrics under the same protocol."""
    untrained = other.get("train", {}).get("images_seen") == 0
    same = other["protocol_hash"] == record["protocol_hash"]
    return untrained and same and record["metrics"].keys() <= other["metrics"].keys()
