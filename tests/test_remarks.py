"""What a run says of itself when it has learned nothing."""

import copy

import numpy as np
import pytest
from records import record

from pixlat.launch.job.remarks import CAUSES, sample_remarks, score_remarks, warning_lines


def noise(count: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(count)).integers(low, high, (count, 3, 8, 8), dtype=np.uint8)


def scored(fd: float, accuracy: float, images_seen: int = 6400, se: float = 0.02, **changes) -> dict:
    row = copy.deepcopy(record("run"))
    row["train"]["images_seen"], row["data"]["num_classes"], row["notes"] = images_seen, 10, ""
    entry = {"value_bc": None, "n": 200, "unit": "1"}
    row["metrics"] = {
        "fd_ratio": {"value": fd, "se": 1.0, **entry},
        "class_accuracy": {"value": accuracy, "se": se, **entry},
    }
    row["real"] = {"metrics": {"class_accuracy": {"value": 0.74, "se": None, **entry}}, "judges": []}
    return row | changes


def test_grey_samples_are_told():
    (remark,) = sample_remarks(np.concatenate([noise(20, 120, 136), noise(5)]), noise(30))
    assert "almost no contrast" in remark
    alike = noise(1).repeat(20, 0)
    assert [remark.split(":")[0] for remark in sample_remarks(alike, noise(30))] == ["The samples are almost all alike"]
    assert len(sample_remarks(alike // 16 + 120, noise(30))) == 2


def test_ordinary_samples_get_no_remark():
    assert sample_remarks(noise(20, 64, 192), noise(30)) == [] and sample_remarks(noise(1, 128, 129), noise(30)) == []


def test_a_run_that_shows_no_class_is_told():
    (remark,) = score_remarks(scored(3315.9, 0.11), [])
    assert remark.startswith("The samples do not show their classes: 0.110") and "of real images 0.740" in remark
    lines = warning_lines(scored(3315.9, 0.11), [])
    assert len(lines) == 2 and CAUSES in lines[1]


def test_a_distance_no_better_than_an_untrained_run_s_is_told():
    untrained = scored(2240.6, 0.1, images_seen=0, name="bare")
    (remark,) = score_remarks(scored(3315.9, 0.5), [scored(100.0, 0.9), untrained])
    assert "fd_ratio=3316 is no better than that of the untrained bare (2241)" in remark
    assert score_remarks(scored(2000.0, 0.5), [untrained]) == []
    assert score_remarks(scored(3315.9, 0.5), [untrained | {"protocol_hash": "another"}]) == []


@pytest.mark.parametrize(
    "row",
    [
        scored(750.0, 0.65),
        scored(2240.6, 0.1, images_seen=0),  # it is untrained and says so elsewhere
        scored(900.0, 0.15, se=0.01),
        record("without scores of that kind"),
    ],
)
def test_what_has_learned_something_is_left_alone(row):
    assert score_remarks(row, [row]) == []


def test_other_notes_are_shown_without_causes():
    assert warning_lines(scored(750.0, 0.65, notes="2 unreadable training images were skipped."), []) == [
        "  2 unreadable training images were skipped."
    ]
    assert (
        warning_lines(
            scored(750.0, 0.65, notes="The samples have almost no contrast: 0.010 where real images have 0.300."), []
        )[-1]
        == f"  {CAUSES}"
    )
