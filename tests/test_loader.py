"""The training plan and the batches read from it: pure functions of seed and step,
whatever the processes and loader processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pixlat.common.datasets.batches import GRACE_SECONDS, TrainingPlan, training_batches
from pixlat.common.errors import UserError
from pixlat.common.images.files import FolderImages
from pixlat.common.images.image_set import ArrayImages, ImageSet

LABELS = np.repeat(np.arange(4), [1, 5, 20, 74]).astype(np.int64)

Step = list[dict[str, Tensor]]


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (100, 3, 4, 4), dtype=np.uint8)
    return ArrayImages(pixels, LABELS, "noise")


def plan_of(balanced: bool, batch: int = 24, seed: int = 0, flip: bool = True) -> TrainingPlan:
    return TrainingPlan(LABELS, batch, seed, balanced, flip)


def assert_same(a: list[Step], b: list[Step]) -> None:
    for step_a, step_b in zip(a, b, strict=True):
        for batch_a, batch_b in zip(step_a, step_b, strict=True):
            assert batch_a.keys() == batch_b.keys()
            for name in batch_a:
                torch.testing.assert_close(batch_a[name], batch_b[name], rtol=0, atol=0)


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [True, False])
def test_a_step_does_not_depend_on_the_steps_before(balanced: bool) -> None:
    walked = plan_of(balanced)
    for step in range(30):
        indices, flips = walked.indices(step)
        fresh_indices, fresh_flips = plan_of(balanced).indices(step)
        np.testing.assert_array_equal(indices, fresh_indices)
        np.testing.assert_array_equal(flips, fresh_flips)


@pytest.mark.parametrize("batch", [7, 24, 100, 130, 250])
def test_epochs_are_permutations(batch: int) -> None:
    plan = plan_of(balanced=False, batch=batch)
    steps = -(-300 // batch)
    epochs = np.concatenate([plan.indices(step)[0] for step in range(steps)])[:300].reshape(3, 100)
    assert (np.sort(epochs, 1) == np.arange(100)).all()
    assert (epochs[0] != epochs[1]).any()


def test_balanced_draws_classes_uniformly_and_reaches_every_image() -> None:
    plan = plan_of(balanced=True, batch=500)
    drawn = np.concatenate([plan.indices(step)[0] for step in range(40)])
    counts = np.bincount(LABELS[drawn])
    assert abs(counts / len(drawn) - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(drawn))
    assert len(np.unique(drawn)) == 100


def test_flips_are_fair_or_off() -> None:
    on = np.concatenate([plan_of(True, 500).indices(step)[1] for step in range(40)])
    assert abs(on.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(on))
    assert not plan_of(True, 500, flip=False).indices(0)[1].any()


def test_flipping_does_not_change_which_images_are_drawn() -> None:
    np.testing.assert_array_equal(plan_of(True, flip=True).indices(3)[0], plan_of(True, flip=False).indices(3)[0])


@pytest.mark.parametrize("balanced", [True, False])
def test_the_seed_matters(balanced: bool) -> None:
    assert (plan_of(balanced, seed=0).indices(0)[0] != plan_of(balanced, seed=1).indices(0)[0]).any()


def test_late_steps_of_large_sets_are_as_cheap_as_early_ones() -> None:
    plan = TrainingPlan(np.zeros(1_281_167, dtype=np.int64), 1024, 0, balanced=False)
    plan.indices(750_000)
    start = time.perf_counter()
    for step in range(750_001, 750_101):
        plan.indices(step)
    assert time.perf_counter() - start < 1.0  # 100 steps; walking there would take 750,000


# -- random crops ------------------------------------------------------------------------------------------------------


class Ramp(ImageSet):
    """Images whose pixel (y, x) of the resized whole is (y, x, number of the image),
    10 x 14 pixels of which 4 x 4 are cut.
    """

    def _read_one(self, index: int) -> np.ndarray:
        return np.full((3, 4, 4), 255, dtype=np.uint8)

    def _read_resized(self, index: int) -> np.ndarray:
        y, x = np.mgrid[:10, :14]
        return np.stack([y, x, np.full_like(y, index)], axis=-1).astype(np.uint8)


def cropping_plan(batch: int = 24, flip: bool = True, seed: int = 0) -> TrainingPlan:
    return TrainingPlan(LABELS, batch, seed, balanced=False, flip=flip, crop=True)


def test_crops_are_a_pure_function_of_seed_and_step_and_leave_the_other_draws_alone() -> None:
    plain, plan = plan_of(False), cropping_plan()
    for step in (5, 0, 5):
        for ours, theirs in zip(plan.indices(step), plain.indices(step), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(plan.offsets(step), cropping_plan().offsets(step))
    assert plain.offsets(0) is None
    first, other_step, other_seed = plan.offsets(0), plan.offsets(1), cropping_plan(seed=1).offsets(0)
    assert first is not None and first.shape == (24, 2) and (first != other_step).all() and (first != other_seed).all()


def test_crops_reach_every_place_equally_often() -> None:
    images = Ramp(LABELS, 4, "ramp")
    plan = cropping_plan(batch=100, flip=False)
    corners = np.concatenate([images.fetch(*plan.indices(step), plan.offsets(step))[:, :2, 0, 0] for step in range(60)])
    counts = np.zeros((7, 11))
    np.add.at(counts, tuple(corners.T), 1)
    expected = 6000 / 77
    assert ((counts - expected) ** 2 / expected).sum() < 77 + 4 * np.sqrt(2 * 77)  # chi squared


def test_a_cut_is_a_piece_of_its_own_image_mirrored_where_the_plan_says() -> None:
    indices, offsets = np.array([3, 7]), np.array([[0.0, 0.999], [0.999, 0.0]])
    cut = Ramp(LABELS, 4, "ramp").fetch(indices, [False, True], offsets)
    assert cut[0, :2, 0, 0].tolist() == [0, 10] and cut[1, :2, 0].T.tolist() == [[6, 3], [6, 2], [6, 1], [6, 0]]
    assert cut[:, 2].reshape(2, -1).tolist() == [[3] * 16, [7] * 16]
    assert (Ramp(LABELS, 4, "ramp").fetch(indices) == 255).all()  # without offsets: the centre


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_do_not_depend_on_processes_loader_processes_or_resuming(workers: int) -> None:
    images = Ramp(LABELS, 4, "ramp")
    one = list(islice(training_batches(images, cropping_plan(), 0, 6, 4), 5))
    ranks = [
        list(islice(training_batches(images, cropping_plan(), 2, 6, 2, rank=rank, world=2, workers=workers), 3))
        for rank in range(2)
    ]
    assert_same(one[2:], [[a[0], b[0], a[1], b[1]] for a, b in zip(*ranks, strict=True)])


def test_images_that_are_cut_at_random_are_never_seen_twice() -> None:
    assert cropping_plan(batch=50).distinct(10, 50) == 500 > plan_of(False, batch=50).distinct(10, 50)


def test_batches_without_images_read_none(images: ImageSet) -> None:
    class Unreadable(ArrayImages):
        def _read(self, indices: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
            raise AssertionError("an image was read")

    unreadable = Unreadable(np.zeros((100, 3, 4, 4), np.uint8), LABELS, "none")
    ((batch,),) = islice(training_batches(unreadable, plan_of(False), 0, 24, 1, needs_images=False), 1)
    assert set(batch) == {"label", "index", "mirrored"}


# -- the batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("balanced", [True, False])
def test_batches_hold_what_the_plan_says(images: ImageSet, balanced: bool, workers: int) -> None:
    plan = plan_of(balanced)
    for step, micro_batches in enumerate(islice(training_batches(images, plan, 0, 12, 2, workers=workers), 6)):
        indices, flips = plan_of(balanced).indices(step)
        assert [len(batch["image"]) for batch in micro_batches] == [12, 12]
        assert torch.cat([batch["index"] for batch in micro_batches]).tolist() == indices.tolist()
        assert torch.cat([batch["label"] for batch in micro_batches]).tolist() == LABELS[indices].tolist()
        pixels = torch.cat([batch["image"] for batch in micro_batches])
        assert pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels.numpy(), images.fetch(indices, flips))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("balanced", [True, False])
def test_resuming_gives_the_batches_of_the_uninterrupted_run(images: ImageSet, balanced: bool, workers: int) -> None:
    whole = list(islice(training_batches(images, plan_of(balanced), 0, 8, 3), 12))
    resumed = list(islice(training_batches(images, plan_of(balanced), 7, 8, 3, workers=workers), 5))
    assert_same(whole[7:], resumed)


def test_two_processes_see_what_one_with_two_micro_batches_sees(images: ImageSet) -> None:
    one = list(islice(training_batches(images, plan_of(False), 0, 6, 4), 5))
    ranks = [
        list(islice(training_batches(images, plan_of(False), 0, 6, 2, rank=rank, world=2), 5)) for rank in range(2)
    ]
    joined = [[a[0], b[0], a[1], b[1]] for a, b in zip(*ranks, strict=True)]
    assert_same(one, joined)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generator_alone(images: ImageSet, workers: int) -> None:
    before = torch.get_rng_state()
    list(islice(training_batches(images, plan_of(True), 0, 24, 1, workers=workers), 3))
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_batch_sizes_that_do_not_agree_are_explained(images: ImageSet) -> None:
    with pytest.raises(UserError, match=r"2 processes x 3 micro-batches x 5 images = 30, but the global batch is 24"):
        training_batches(images, plan_of(True), 0, 5, 3, world=2)


def test_no_images_is_explained() -> None:
    with pytest.raises(UserError, match="no training images"):
        TrainingPlan(np.zeros(0, dtype=np.int64), 4, 0, balanced=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_names_its_file_in_any_process(tmp_path: Path, workers: int) -> None:
    names = [f"{number}.png" for number in range(8)]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:40])
    folder = FolderImages(tmp_path, names, np.zeros(8, dtype=np.int64), 4, "names")
    plan = TrainingPlan(folder.labels, 8, 0, balanced=False)
    with pytest.raises(UserError, match=r"5\.png") as caught:
        next(training_batches(folder, plan, 0, 8, 1, workers=workers))
    assert "Traceback" not in str(caught.value)


class Whoami(ImageSet):
    """Images whose first pixels spell the process that read them."""

    def _read_one(self, index: int) -> np.ndarray:
        return np.frombuffer(os.getpid().to_bytes(12, "little"), dtype=np.uint8).reshape(3, 2, 2)


def reader_pid(batches: Iterator[Step]) -> int:
    return int.from_bytes(next(batches)[0]["image"][0].numpy().tobytes(), "little")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_loader_processes_outlive_the_signals_of_a_scheduler(number: signal.Signals) -> None:
    batches = training_batches(Whoami(LABELS, 2, "pid"), plan_of(True, flip=False), 0, 24, 1, workers=1)
    pid = reader_pid(batches)
    assert pid in {child.pid for child in multiprocessing.active_children()}
    os.kill(pid, number)
    time.sleep(0.2)
    assert [reader_pid(batches) for _ in range(5)] == [pid] * 5


EXIT_WITH_A_LIVE_ITERATOR = """
import numpy as np
from pixlat.common.images.image_set import ArrayImages
from pixlat.common.datasets.batches import TrainingPlan, training_batches

images = ArrayImages(np.zeros((9, 3, 4, 4), np.uint8), np.zeros(9, np.int64), "black")
batches = training_batches(images, TrainingPlan(images.labels, 8, 0, True), 0, 8, 1, workers=2)
next(batches)
"""


def test_exit_does_not_wait_for_loader_processes() -> None:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", EXIT_WITH_A_LIVE_ITERATOR], check=True, cwd=Path(__file__).parents[1], timeout=60
    )
    assert time.perf_counter() - start < GRACE_SECONDS
