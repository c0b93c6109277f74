"""What a finished run should say about itself in plain words: samples that show nothing,
and scores that an untrained network reaches as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixlat.common.pictures.neighbours import contrast, variety

SAMPLES = "The samples "  # begins every remark on samples
FAINT = 0.2  # of the contrast, or the variety, of real images: less than that is hardly visible in a grid
CAUSES = (
    "Likely causes: a training too short for its average (eval.ema=raw shows the weights without it), "
    "a learning rate that is far too high or too low, or labels that do not fit the images."
)


def warning_lines(record: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> list[str]:
    """For the summary of a run: the notes of its record, what its scores say beside the `others` in the same folder,
    and likely causes.
    """
    notes = [record["notes"]] if record["notes"] else []
    remarks = score_remarks(record, others)
    causes = [CAUSES] if remarks or any(SAMPLES in note for note in notes) else []
    return [f"  {line}" for line in (*notes, *remarks, *causes)]


def sample_remarks(samples: NDArray[np.uint8], real: NDArray[np.uint8]) -> list[str]:
    """What is visibly wrong with samples (N, 3, H, W) uint8 beside real images (M, 3, H, W) uint8;
    at least two of each, else nothing is said.
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
    """Whether the scores of a trained run are no better than those of an untrained network, as far as the records tell.

    Two things are known without sampling from such a network: it shows no class, so that the classifier can only guess,
    and what an untrained run beside this one scored under the same protocol (train.images=0).
    """
    if not record.get("train", {}).get("images_seen"):
        return []
    remarks = []
    metrics, classes = record["metrics"], record["data"]["num_classes"]
    shown, real = metrics.get("class_accuracy"), metrics.get("class_accuracy_real")
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
            and (own := metrics.get("fd_embedded"))
            and own["value"] >= other["metrics"]["fd_embedded"]["value"]
        ):
            remarks.append(
                f"The distance fd_embedded={own['value']:.4g} is no better than that of the untrained {other['name']} "
                f"({other['metrics']['fd_embedded']['value']:.4g})."
            )
            break
    return remarks


def _is_untrained(other: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """A record of a network as initialised whose distance may be compared with the record's."""
    images_seen = other.get("train", {}).get("images_seen")
    return images_seen == 0 and other["protocol_hash"] == record["protocol_hash"] and "fd_embedded" in other["metrics"]
