"""Grids, nearest training images and training curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixlat.common.errors import UserError
from pixlat.common.images.image_set import ArrayImages
from pixlat.common.pictures.curves import _panels, _running_mean, training_curves
from pixlat.common.pictures.grids import ALARM, BACKGROUND, image_grid, save_png
from pixlat.common.pictures.neighbours import (  # fmt: skip
    Neighbours,
    _neighbour_caption,
    contrast,
    merged,
    nearest,
    neighbour_picture,
    variety,
)


def noise(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def image_set(pixels: np.ndarray) -> ArrayImages:
    return ArrayImages(pixels, np.zeros(len(pixels), dtype=np.int64), "test")


# -- grids -------------------------------------------------------------------------------------------------------------


def test_grid_shows_every_pixel_as_a_square_of_its_color() -> None:
    images = noise(5)
    canvas = np.asarray(image_grid(images, columns=3, scale=4, gap=2))
    tile, margin = 32, 16
    assert canvas.shape == (2 * margin + 2 * tile + 2, 2 * margin + 3 * tile + 4, 3)
    for number, image in enumerate(images):
        row, column = divmod(number, 3)
        top, left = margin + row * (tile + 2), margin + column * (tile + 2)
        shown = canvas[top : top + tile, left : left + tile].reshape(8, 4, 8, 4, 3)
        assert (shown == image.transpose(1, 2, 0)[:, None, :, None]).all()
    assert (canvas[margin + tile + 2 :, -margin - tile :] == BACKGROUND).all()  # the sixth place is empty


@pytest.mark.parametrize(("size", "tile"), [(8, 96), (32, 96), (64, 128), (256, 256)])
def test_grid_enlarges_small_images_only(size: int, tile: int) -> None:
    assert image_grid(noise(1, size), columns=1).size == (tile + 32, tile + 32)


def test_grid_writes_names_left_of_the_rows() -> None:
    images = noise(4)
    plain, named = image_grid(images, 2), image_grid(images, 2, ["cat", "a rather long name"])
    added = named.width - plain.width
    assert added > 100
    strip = np.asarray(named)[:, : added + 8]
    half = len(strip) // 2
    assert all((part < 128).any() for part in (strip[:half], strip[half:]))
    np.testing.assert_array_equal(np.asarray(named)[:, added + 16 :], np.asarray(plain)[:, 16:])


def test_grid_of_nothing_is_explained() -> None:
    with pytest.raises(UserError, match="0 images"):
        image_grid(noise(0), 3)


def test_png_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_png(Image.new("RGB", (2, 2), (1, 2, 3)), path)
    monkeypatch.setattr(Image.Image, "save", lambda self, file, format: file.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_png(Image.new("RGB", (2, 2)), path)
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (1, 2, 3)


# -- nearest training images -------------------------------------------------------------------------------------------


def brute_force(samples: np.ndarray, train: np.ndarray, mirrored: bool, positions: np.ndarray) -> Neighbours:
    """In float64, in which these sums are exact, image by image in the order of the documented choice among equals."""
    indices, flips, distances = [], [], []
    for sample in samples.astype(np.float64):
        candidates = [(p, flip) for p in positions for flip in ((False, True) if mirrored else (False,))]
        squared = [np.square(sample - (train[p][..., ::-1] if flip else train[p])).sum() for p, flip in candidates]
        best = int(np.argmin(squared))
        indices.append(candidates[best][0])
        flips.append(candidates[best][1])
        distances.append(np.sqrt(squared[best] / sample.size) / 255)
    return Neighbours(np.array(indices), np.array(flips), np.array(distances))


def assert_equal(found: Neighbours, expected: Neighbours) -> None:
    for name in ("indices", "mirrored", "distances"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def near_copies(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples and training images that are nearly alike, with copies, mirror images and symmetric ones among them,
    so that equals are frequent.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    # far from the middle: the largest products
    base = rng.choice(np.array([0, 255], dtype=np.uint8), (1, 3, size, size))
    train = np.repeat(base, 23, 0)
    train[rng.random(train.shape) < 0.002] ^= 1  # a level apart here and there
    train[[3, 11, 17]] = train[[9, 4, 9]]
    train[[5, 20]] = train[[6, 6]][..., ::-1]
    train[14] = np.concatenate([train[14, ..., : size // 2], train[14, ..., : size // 2][..., ::-1]], -1)
    samples = np.concatenate(
        [train[[9, 6, 14]], train[[5]][..., ::-1], rng.integers(0, 256, (3, 3, size, size), dtype=np.uint8)]
    )
    return samples, train


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_nearest_equals_brute_force(mirrored: bool, seed: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40  # 4800 values: more than one sum of 1024, and a remainder
    monkeypatch.setattr("pixlat.common.pictures.neighbours.BLOCK_VALUES", 5 * 3 * size * size)
    samples, train = near_copies(seed, size)
    positions = np.random.Generator(np.random.PCG64(seed)).permutation(len(train))[:20]
    with torch.autocast("cpu", torch.bfloat16):  # pictures are drawn under the training's precision
        parts = [nearest(samples, image_set(train), mirrored, positions[rank::processes]) for rank in range(processes)]
    assert_equal(merged(parts), brute_force(samples, train, mirrored, np.sort(positions)))


def test_a_share_without_images_changes_nothing() -> None:
    train, samples = noise(2, seed=1), noise(3, seed=2)
    parts = [nearest(samples, image_set(train), positions=np.arange(2)[rank::3]) for rank in range(3)]
    assert_equal(merged(parts), nearest(samples, image_set(train)))


def test_large_images_of_the_extremes_are_exact() -> None:
    """The largest sums that 1024 products can have; float32 would round those of a whole image."""
    black, white = np.zeros((1, 3, 256, 256), dtype=np.uint8), np.full((2, 3, 256, 256), 255, dtype=np.uint8)
    white[1, 0, 0, 0] = 254
    found = nearest(black, image_set(white))
    assert found.indices.tolist() == [1] and found.distances[0] == np.sqrt(
        1 - (255**2 - 254**2) / (255**2 * 3 * 256**2)
    )


def test_every_training_image_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixlat.common.pictures.neighbours.BLOCK_VALUES", 5 * 3 * 8 * 8)
    images, read = image_set(noise(23)), []
    monkeypatch.setattr(images, "fetch", lambda indices: read.extend(indices) or images.images[indices])
    nearest(noise(7, seed=2), images, mirrored=True)
    assert read == list(range(23))


def test_nearest_finds_copies_at_distance_zero() -> None:
    train = noise(40)
    samples = np.stack([train[31], train[7][..., ::-1]])
    found = nearest(samples, image_set(train), mirrored=True)
    assert found.indices.tolist() == [31, 7]
    assert found.mirrored.tolist() == [False, True]
    assert found.distances.tolist() == [0.0, 0.0]


def test_nearest_searches_only_the_positions_given() -> None:
    train = noise(40)
    found = nearest(train[[3]], image_set(train), positions=np.array([1, 20, 35]))
    assert found.indices[0] in (1, 20, 35)


def test_distance_of_black_and_white_is_one() -> None:
    black, white = np.zeros((1, 3, 4, 4), dtype=np.uint8), np.full((1, 3, 4, 4), 255, dtype=np.uint8)
    assert nearest(black, image_set(white)).distances.tolist() == [1.0]


def has_alarm(picture: Image.Image) -> bool:
    return bool((np.asarray(picture) == ALARM).all(-1).any())


def test_copies_are_framed_in_red() -> None:
    images = noise(3)
    reference = np.linspace(0.1, 0.3, 50)
    assert has_alarm(neighbour_picture(images, images, np.array([0.0, 0.2, 0.2]), reference))
    assert not has_alarm(neighbour_picture(images, images, np.array([0.15, 0.2, 0.2]), reference))
    assert not has_alarm(neighbour_picture(images, images, np.zeros(3)))


def test_grey_samples_are_no_copies_and_the_caption_says_so() -> None:
    """A short run's grey samples are near to every training image, and were framed as copies without exception."""
    grey = np.random.Generator(np.random.PCG64(0)).integers(120, 136, (20, 3, 8, 8), dtype=np.uint8)
    reference, distances = np.linspace(0.1, 0.3, 50), np.full(20, 0.05)
    assert contrast(grey).max() < 0.03
    assert not has_alarm(neighbour_picture(grey, noise(20), distances, reference))
    assert _neighbour_caption(distances, reference, 0.11, 0, 20)[-2:] == [
        "0 of these 20 samples (0%) are below that too, and framed in red.",
        (
            "20 samples are near only because they have almost no contrast (their mean colour is nearer still): "
            "these are no copies."
        ),
    ]
    grey[7] = noise(1)[0]  # one real copy among them
    distances[7] = 0.0
    assert has_alarm(neighbour_picture(grey, grey, distances, reference))


def test_contrast_and_variety_are_root_mean_squares() -> None:
    half = np.zeros((1, 3, 4, 4), dtype=np.uint8)
    half[..., :2] = 255
    assert contrast(half).tolist() == [0.5] and contrast(np.full((2, 3, 4, 4), 77, dtype=np.uint8)).tolist() == [
        0.0,
        0.0,
    ]
    assert variety(half.repeat(5, 0)) == 0 and variety(np.concatenate([half, half[..., ::-1]])) == 0.5


def test_sample_and_neighbour_stand_side_by_side() -> None:
    samples, neighbours = np.full((2, 3, 8, 8), 10, dtype=np.uint8), np.full((2, 3, 8, 8), 200, dtype=np.uint8)
    pixels = np.asarray(neighbour_picture(samples, neighbours, np.array([0.5, 0.5])))
    row = pixels[np.flatnonzero((pixels == 200).all(-1).sum(1) == 2 * 96)[0]]
    left, right = np.flatnonzero((row == 10).all(-1)), np.flatnonzero((row == 200).all(-1))
    assert left[0] < right[0] < left[96] < right[96]


# -- curves ------------------------------------------------------------------------------------------------------------


def rows_of(count: int) -> list[dict[str, float]]:
    return [
        {"step": i, "images": 64 * i, "loss": 1 / i, "grad_norm": 1.0, "lr": 1e-3, "images_per_s": 200.0, "seconds": i}
        for i in range(1, count + 1)
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 2, 60, 3000])
def test_curves_of_any_length(tmp_path: Path, count: int) -> None:
    path = tmp_path / "training.png"
    training_curves(rows_of(count), path)
    with Image.open(path) as image:
        assert image.size == (1320, 768)
        assert np.asarray(image).std() > 1


@pytest.mark.filterwarnings("error")
def test_curves_of_two_phases_with_gaps_and_non_finite_values(tmp_path: Path) -> None:
    rows = [
        {"images": 64, "generator/loss": 1.0, "generator/adv_loss": float("nan"), "lr": 0.0, "images_per_s": 0.0},
        {
            "images": 128,
            "generator/loss": 0.5,
            "discriminator/loss": float("inf"),
            "discriminator/accuracy": 0.5,
            "lr": 0.0,
            "images_per_s": 3.0,
        },
    ]
    training_curves(rows, tmp_path / "training.png")
    assert _panels(rows) == {
        "loss": ["generator/loss", "generator/adv_loss", "discriminator/loss"],
        "accuracy": ["discriminator/accuracy"],
        "learning rate": ["lr"],
        "images per second": ["images_per_s"],
    }


def test_curves_of_nothing_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics to draw"):
        training_curves([], tmp_path / "training.png")


def test_running_mean_keeps_lines_and_shrinks_at_the_start() -> None:
    values = np.array([8.0, 0.0, 4.0, 0.0, 2.0, 6.0])
    np.testing.assert_allclose(_running_mean(values, 1), [8, 4, 4 / 3, 2, 8 / 3, 4], rtol=1e-14)
    np.testing.assert_array_equal(_running_mean(values, 0), values)
