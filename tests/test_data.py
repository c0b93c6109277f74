"""Data sets: the embedded one, image folders, synthetic shapes, and the ADM centre crop."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixlat.common.config.identity import identity
from pixlat.common.config.resolve import resolve
from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.load import load_data
from pixlat.common.datasets.notes import data_notes, epochs_text
from pixlat.common.datasets.summary import DataSummary
from pixlat.common.errors import UserError
from pixlat.common.images import crop, listing, synthetic
from pixlat.common.images.crop import center_crop, decode_square, read_rgb, read_square, to_rgb
from pixlat.common.images.decoding import decoding_digest, resizing_digest
from pixlat.common.images.emoji32 import concept, load_emoji32
from pixlat.common.images.files import FolderImages
from pixlat.common.images.names import Names
from pixlat.common.images.splits import held_out
from pixlat.launch.job.execute import run_one
from pixlat.methods import get_spec

TRAIN_COUNTS = [406, 726, 146, 309, 379, 174, 351, 834, 549, 215]
HELD_OUT_COUNTS = [98, 181, 36, 80, 95, 42, 87, 208, 136, 54]


def noise_image(width: int, height: int) -> Image.Image:
    rng = np.random.Generator(np.random.PCG64(width * 1000 + height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_folder(root: Path, classes: dict[str, int], size: tuple[int, int] = (20, 24)) -> Path:
    """A folder of noise images: class name -> number of images."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise_image(size[0] + number, size[1]).save(root / name / f"{number:03d}.png")
    return root


def folder_config(root: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(name="folder", path=str(root), image_size=8, holdout=0.25), **changes)  # type: ignore[arg-type]


# -- emoji32 -----------------------------------------------------------------------------------------------------------


def test_emoji32_counts_per_class() -> None:
    data = load_data(DataConfig())
    assert np.bincount(data.train.labels).tolist() == TRAIN_COUNTS
    assert np.bincount(data.heldout.labels).tolist() == HELD_OUT_COUNTS
    assert data.balanced
    assert (data.info.num_classes, data.info.image_size, data.info.num_train, data.info.num_heldout) == (
        10,
        32,
        4089,
        1017,
    )


def test_emoji32_pixels_and_digest_are_frozen() -> None:
    emoji = load_emoji32()
    assert emoji.images.shape == (5106, 3, 32, 32)
    assert (
        hashlib.sha256(emoji.images.tobytes()).hexdigest()
        == "785e05f0858aa21c4cd656b89baae3eab6dd77606cfa332fa8f6e470f73b982f"
    )
    assert load_data(DataConfig()).info.digest == "1fa0b0dbc1afac7109987c15a9a8082d2c4011e9441c49cb35e04d77cb71cf3b"


def test_emoji32_concepts_never_straddle_the_split() -> None:
    emoji = load_emoji32()
    mask = held_out(emoji.concepts, emoji.labels, 0.1)
    sides = list(zip(emoji.concepts, emoji.codes, mask, strict=True))
    assert not {name for name, _, held in sides if held} & {name for name, _, held in sides if not held}
    assert not {code for _, code, held in sides if held} & {code for _, code, held in sides if not held}


def test_emoji32_has_no_near_copies_across_the_split() -> None:
    data = load_data(DataConfig())
    train, heldout = (
        part.fetch(np.arange(len(part))).reshape(len(part), -1).astype(np.float32) / 255
        for part in (data.train, data.heldout)
    )
    squared = np.square(heldout).sum(1)[:, None] - 2 * heldout @ train.T + np.square(train).sum(1)
    assert np.sqrt(squared.min() / train.shape[1]) > 0.035


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1f468-200d-1f680", "1f9d1-1f680"),  # man astronaut
        ("1f3c3-200d-2640-200d-27a1", "1f3c3"),  # woman running to the right
        ("1f468-200d-1f469-200d-1f467-200d-1f466", "1f9d1-1f9d2"),  # a family
        ("27a1", "27a1"),  # the arrow itself
        ("1f1e9-1f1ea", "1f1e9-1f1ea"),  # a flag
    ],
)
def test_concept(code: str, expected: str) -> None:
    assert concept(code) == expected


def test_a_damaged_sheet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        __import__("pixlat.common.images.emoji32", fromlist=["SHA256"]).SHA256, "emoji32.json", "0" * 64
    )
    with pytest.raises(UserError, match=r"emoji32\.json is damaged"):
        load_emoji32()


def test_fetch_mirrors_only_the_chosen_images_and_never_the_set() -> None:
    train = load_data(DataConfig()).train
    before = train.fetch([5, 6])
    mirrored = train.fetch([5, 6], [True, False])
    np.testing.assert_array_equal(mirrored[0], before[0, :, :, ::-1])
    np.testing.assert_array_equal(mirrored[1], before[1])
    np.testing.assert_array_equal(train.fetch([5, 6]), before)


# -- the split ---------------------------------------------------------------------------------------------------------


def test_held_out_respects_quota_and_keeps_singles() -> None:
    labels = np.repeat([0, 1, 2], [40, 1, 3])
    mask = held_out([f"file{i}" for i in range(44)], labels, 0.1)
    assert [int(mask[labels == label].sum()) for label in range(3)] == [4, 0, 1]
    assert not held_out(["a", "b"], np.array([0, 0]), 0.0).any()


def test_held_out_does_not_depend_on_the_order_of_the_images() -> None:
    names = [f"file{i}" for i in range(50)]
    labels = np.arange(50) % 3
    mask = held_out(names, labels, 0.2)
    order = np.random.Generator(np.random.PCG64(0)).permutation(50)
    shuffled = held_out([names[i] for i in order], labels[order], 0.2)
    np.testing.assert_array_equal(shuffled, mask[order])


# -- the crop ----------------------------------------------------------------------------------------------------------

# SHA-256 of the (size, size, 3) pixels that the ADM code's whole-image resizes give under Pillow 12.3.0.
# Pillow 13.0.0 alone differs on the tall ones.
PILLOW_12 = {
    (50, 173, 32): "8f9916d9f479",
    (173, 50, 32): "c343e83e1c36",
    (97, 300, 32): "70e481e27abd",
    (64, 64, 32): "e408b2acc2bc",
    (40, 41, 32): "e4a67c1c39c6",
    (500, 375, 256): "67084050f251",
    (33, 400, 64): "367ad2420491",
    (300, 1111, 128): "a3fb488d2144",
    (20, 90, 64): "a5a432a46380",
}


@pytest.mark.parametrize(("case", "expected"), PILLOW_12.items(), ids=str)
def test_center_crop_equals_adm_under_pillow_12(case: tuple[int, int, int], expected: str) -> None:
    width, height, size = case
    pixels = np.ascontiguousarray(center_crop(noise_image(width, height), size).transpose(1, 2, 0))
    assert hashlib.sha256(pixels.tobytes()).hexdigest().startswith(expected)


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5."""
    x = abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resize_rows(pixels: np.ndarray, length: int) -> np.ndarray:
    """Antialiased bicubic along axis 0 in float64, rounded and clipped to 8 bits."""
    scale = max(len(pixels) / length, 1)
    centers = (np.arange(length) + 0.5) * len(pixels) / length
    weights = cubic((np.arange(len(pixels))[None] + 0.5 - centers[:, None]) / scale)
    weights /= weights.sum(1, keepdims=True)
    return np.clip(np.floor(np.tensordot(weights, pixels, 1) + 0.5), 0, 255)


def test_the_decoding_of_images_is_known_by_what_it_gives_not_by_a_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Data that Pillow decodes carry the digest; the same pixels have the same one,
    a grey level elsewhere another one.
    """
    make_folder(tmp_path / "images", {"a": 3, "b": 3})
    assert load_data(folder_config(tmp_path / "images")).train.decoding == decoding_digest()
    assert load_data(DataConfig()).train.decoding is None  # stored losslessly and never scaled
    found = decoding_digest()
    decoding_digest.cache_clear()
    monkeypatch.setattr(Image, "__version__", "99.0")
    assert decoding_digest() == found and len(found) == 12
    decoding_digest.cache_clear()
    monkeypatch.setattr(crop, "_BICUBIC", Image.Resampling.BILINEAR)
    try:
        assert decoding_digest() != found
    finally:
        decoding_digest.cache_clear()
    assert resizing_digest(lambda picture: picture) != resizing_digest(lambda picture: picture // 2)


def test_center_crop_of_a_tall_image_is_the_filter_width_first() -> None:
    image = noise_image(40, 120)
    pixels = np.asarray(image).astype(np.float64)
    wide = resize_rows(pixels.transpose(1, 0, 2), 32).transpose(1, 0, 2)
    expected = resize_rows(wide, 96)[32:64].transpose(2, 0, 1)
    found = center_crop(image, 32)
    assert abs(found - expected).max() <= 1  # Pillow's weights are 22-bit integers
    assert (found == expected).mean() > 0.99


def test_crop_takes_the_centre() -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, 4:12] = 200
    assert (center_crop(Image.fromarray(pixels), 8) == 200).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    grey = np.full((9, 9), 128, dtype=np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    image = deep if mode == deep.mode else Image.fromarray(np.stack([grey] * 3, -1)).convert(mode)
    path = tmp_path / "image.tif"
    image.save(path)
    with Image.open(path) as stored:
        # Pillow below 13 has converted a YCbCr file when it opens it
        assert stored.mode == mode or (mode, stored.mode) == ("YCbCr", "RGB")
        assert to_rgb(stored).mode == "RGB"
    pixels = read_square(path, 4)
    assert pixels.shape == (3, 4, 4)
    if mode != "1":  # a dithered grey
        assert abs(pixels.astype(int) - 128).max() <= 2


def test_transparency_is_dropped_as_in_adm() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert to_rgb(image).getpixel((0, 0)) == (10, 20, 30)


# -- hostile files -----------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, format="png")
    return stream.getvalue()


@pytest.mark.parametrize("name", ["0.png", "0.jpg"])
def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pillow's reader of EPS files, whatever they are called, would run the `gs` that it finds."""
    ran, postscript = tmp_path / "ran", tmp_path / name
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    postscript.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for read in (lambda: read_square(postscript, 8), lambda: read_rgb(postscript)):
        with pytest.raises(UserError, match=rf"{name}.* is not an image that pixlat can read \(JPEG, PNG"):
            read()
    assert not ran.exists()


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        start = time.perf_counter()
        with pytest.raises(UserError, match=rf"{name} is not a regular file"):
            read_square(tmp_path / name, 8)
        assert time.perf_counter() - start < 5


def test_a_link_to_a_regular_image_is_read(tmp_path: Path) -> None:
    noise_image(12, 9).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "b.png"), np.asarray(noise_image(12, 9)))


def test_a_file_beyond_the_limit_is_never_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(10**12)  # sparse: takes no room
    with pytest.raises(
        UserError, match=r"huge\.png has 1,000,000,000,000 bytes, .* raise MAX_FILE_BYTES in common/images/crop\.py"
    ):
        read_square(tmp_path / "huge.png", 8)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (1, 20_000_000)])
def test_an_image_that_scaling_would_blow_up_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"x\.png .* With a shorter side of 256 it would have [\d,]+, but the limit is .*raise MAX_PIXELS "
            r"in common/images/crop\.py"
        ),
    ):
        decode_square(png_of(*size), 256, "x.png")
    assert crop.centre_square(crop.decode_resized(png_of(4, 4000), 8, "x.png"), 8).shape == (3, 8, 8)


def test_a_huge_image_names_our_limit_and_how_to_raise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    content, pillows = png_of(14_000, 14_000), Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError) as caught:
        decode_square(content, 8, "x.png")
    assert "has 196,000,000 pixels, but pixlat decodes at most 178,956,970." in str(caught.value)
    assert "raise MAX_PIXELS in common/images/crop.py" in str(caught.value) and ".." not in str(caught.value)
    monkeypatch.setattr(crop, "MAX_PIXELS", 200_000_000)
    assert decode_square(content, 8, "x.png").shape == (3, 8, 8)
    assert pillows is not None and pillows == Image.MAX_IMAGE_PIXELS


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folder_classes_are_sorted_and_images_cropped(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", {"dog": 8, "cat": 12})
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    data = load_data(folder_config(root))
    assert data.info.class_names == ("cat", "dog")
    assert (data.info.num_train, data.info.num_heldout) == (15, 5)
    assert not data.balanced
    assert isinstance(data.train, FolderImages)
    first = data.train.files[0]
    np.testing.assert_array_equal(data.train.fetch([0])[0], read_square(root / first, 8))
    assert first.startswith("cat/")


def test_folder_finds_images_at_any_depth(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"a": 2, "b/inner": 2, "b/other": 1})
    data = load_data(folder_config(root, holdout=0.0))
    assert np.bincount(data.train.labels).tolist() == [2, 3]
    assert len(data.heldout) == 0


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_folder_with_its_own_held_out_part(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path / "train", {"a": 3, "b": 3})
    make_folder(tmp_path / name, {"a": 1, "b": 2})
    data = load_data(folder_config(tmp_path))
    assert (data.info.num_train, data.info.num_heldout, data.info.class_names) == (6, 3, ("a", "b"))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    make_folder(tmp_path, {"boat": 4, "train": 4})
    assert load_data(folder_config(tmp_path)).info.class_names == ("boat", "train")


def test_folder_digest_follows_names_sizes_split_and_image_size(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"a": 4, "b": 4})
    digests = [load_data(folder_config(root)).info.digest, load_data(folder_config(root, image_size=16)).info.digest]
    digests.append(load_data(folder_config(root, holdout=0.5)).info.digest)
    assert load_data(folder_config(root)).info.digest == digests[0]
    (root / "a" / "000.png").rename(root / "a" / "renamed.png")
    digests.append(load_data(folder_config(root)).info.digest)
    noise_image(60, 60).save(root / "a" / "renamed.png")
    digests.append(load_data(folder_config(root)).info.digest)
    assert len(set(digests)) == len(digests)


def test_folder_digest_is_the_same_elsewhere(tmp_path: Path) -> None:
    here, there = (
        load_data(folder_config(make_folder(tmp_path / name, {"a": 4, "b": 4}))).train.digest
        for name in ("here", "there")
    )
    assert here == there


@pytest.mark.parametrize("fault", ["empty", "text", "truncated png", "truncated jpeg", "vanished"])
def test_an_unreadable_image_is_named(tmp_path: Path, fault: str) -> None:
    path = make_folder(tmp_path, {"a": 1}) / "a" / "000.png"
    if fault == "empty":
        path.write_bytes(b"")
    elif fault == "text":
        path.write_text("<html>not found</html>")
    elif fault == "vanished":
        pass
    else:
        noise_image(64, 64).save(path, format=fault.split()[1])
        path.write_bytes(path.read_bytes()[:2000])
    images = load_data(folder_config(tmp_path, holdout=0.0)).train
    if fault == "vanished":
        path.unlink()
    with pytest.raises(UserError, match=r"000\.png"):
        images.fetch([0])


def empty_class(root: Path) -> None:
    (make_folder(root, {"a": 2}) / "hollow").mkdir()


def other_classes(root: Path) -> None:
    make_folder(root / "train", {"a": 2, "b": 2})
    make_folder(root / "val", {"a": 2, "c": 2})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: None, "cannot be listed: No such file"),
        (lambda root: root.mkdir(), "has no sub-folders"),
        (lambda root: (root.mkdir(), noise_image(9, 9).save(root / "x.png")), "has no sub-folders"),
        (empty_class, "hollow holds no image"),
        (other_classes, "only one of them has: b, c"),
    ],
)
def test_folder_mistakes_are_explained(tmp_path: Path, build, message: str) -> None:  # type: ignore[no-untyped-def]
    build(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        load_data(folder_config(tmp_path / "set"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(name="emoji"), "Did you mean 'emoji32'"),
        (DataConfig(image_size=64), "emoji32 has 32x32"),
        (DataConfig(path="somewhere"), "Add data=folder"),
        (DataConfig(num_classes=1000), "has 10 classes"),
        (DataConfig(name="folder", image_size=8), r"needs data\.path"),
        (DataConfig(name="folder", path="x"), r"needs data\.image_size"),
        (DataConfig(name="synthetic", image_size=0), "not a size in pixels"),
        (DataConfig(name="synthetic", holdout=1.0), "not a fraction"),
    ],
)
def test_configuration_mistakes_are_explained(config: DataConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data(config)


# -- the kept listing --------------------------------------------------------------------------------------------------


@pytest.fixture
def kept_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose listing is kept, whatever its size and however young it is."""
    monkeypatch.setattr(listing, "KEEP_FROM", 1)
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**12))
    monkeypatch.setenv("PIXLAT_CACHE_DIR", str(tmp_path / "cache"))
    return make_folder(tmp_path / "set", {"a": 6, "b/inner": 5, "b/other": 3, "ü": 4})


def listed(root: Path) -> tuple[list[str], list[int], list[int], str]:
    found = listing.list_folder(root)
    return list(found.files), found.sizes.tolist(), found.labels.tolist(), found.digest()


def age(root: Path) -> None:
    """Every folder as if it had been made long ago, so that the next change shows, however coarse the clock."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        os.utime(folder, ns=(10**18, 10**18))


def test_a_kept_listing_is_the_listing_and_asks_for_no_file(kept_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, digest = listed(kept_root), load_data(folder_config(kept_root)).info.digest
    monkeypatch.setattr(listing, "_images_below", lambda *_: pytest.fail("the folder was listed again"))
    assert listed(kept_root) == first
    assert load_data(folder_config(kept_root)).info.digest == digest
    assert (
        first[0][:2] == ["a/000.png", "a/001.png"] and first[0][6] == "b/inner/000.png" and first[0][-1] == "ü/003.png"
    )


@pytest.mark.parametrize("change", ["add", "remove", "rename", "add deep", "remove class", "add class", "add folder"])
def test_a_changed_folder_is_listed_anew(kept_root: Path, change: str) -> None:
    age(kept_root)
    before = listed(kept_root)
    if change == "add":
        noise_image(9, 9).save(kept_root / "a" / "new.png")
    elif change == "remove":
        (kept_root / "a" / "000.png").unlink()
    elif change == "rename":
        (kept_root / "a" / "000.png").rename(kept_root / "a" / "x.png")
    elif change == "add deep":
        noise_image(9, 9).save(kept_root / "b" / "inner" / "new.png")
    elif change == "remove class":
        shutil.rmtree(kept_root / "a")
    else:
        make_folder(kept_root, {"c" if change == "add class" else "b/third": 1})
    after = listed(kept_root)
    assert after != before
    files = sorted(path.relative_to(kept_root).as_posix() for path in kept_root.rglob("*.png"))
    assert sorted(after[0]) == files and after == listed(kept_root)


def test_a_file_that_was_overwritten_in_place_is_noticed_when_it_is_read(kept_root: Path) -> None:
    load_data(folder_config(kept_root))
    noise_image(50, 50).save(kept_root / "a" / "003.png")
    train = load_data(folder_config(kept_root, holdout=0.0)).train
    with pytest.raises(
        UserError, match=r"a/003\.png has [\d,]+ bytes, but had [\d,]+ when pixlat listed its folder.*Run `touch "
    ):
        train.fetch([3])
    os.utime(kept_root / "a", ns=(10**18, 10**18))
    load_data(folder_config(kept_root, holdout=0.0)).train.fetch([3])


def test_a_damaged_listing_is_made_again(kept_root: Path, tmp_path: Path) -> None:
    first = listed(kept_root)
    (kept,) = (tmp_path / "cache").glob("listing-*.npz")
    whole = kept.read_bytes()
    for content in (b"", b"text", whole[:100], whole[: len(whole) // 2] + bytes(40) + whole[len(whole) // 2 + 40 :]):
        kept.write_bytes(content)
        assert listed(kept_root) == first
    np.savez(kept, format=np.array(listing.FORMAT))
    assert listed(kept_root) == first


def test_where_nothing_can_be_kept_the_folder_is_listed_each_time(
    kept_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIXLAT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert listed(kept_root) == listed(kept_root)


def test_small_or_young_folders_are_not_kept(kept_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "KEEP_FROM", 19)
    listed(kept_root)
    monkeypatch.setattr(listing, "KEEP_FROM", 18)
    monkeypatch.setattr(listing, "SETTLED_NS", 10**12)
    listed(kept_root)
    assert list((tmp_path / "cache").iterdir()) == []


def test_names_are_one_buffer(kept_root: Path) -> None:
    """What a forked loader process shares: arrays, and no string a file."""
    train = load_data(folder_config(kept_root)).train
    assert isinstance(train, FolderImages) and isinstance(train.files, Names)
    assert not any(isinstance(value, list | tuple | dict) and len(value) > 3 for value in vars(train).values())
    names = Names.of(["", "a", "ü/b", os.fsdecode(b"\xff.png")])
    assert list(names) == ["", "a", "ü/b", os.fsdecode(b"\xff.png")]
    assert list(names.chosen(np.array([2, 0]))) == ["ü/b", ""] and list(names[1:3]) == ["a", "ü/b"]
    assert list(Names.joined([names, names[:2]])) == [*names, "", "a"]


LIST_TOO = """
import sys
from pathlib import Path
from pixlat.common.images import listing

listing.KEEP_FROM, listing.SETTLED_NS = 1, -(10**12)
walk = listing._walk
listing._walk = lambda root: print("walked", flush=True) or walk(root)
listing.list_folder(Path(sys.argv[1]))
"""


def test_one_process_of_a_machine_lists_for_all(kept_root: Path) -> None:
    command = [sys.executable, "-c", LIST_TOO, str(kept_root)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) for _ in range(3)
    ]
    assert sorted(process.communicate(timeout=120)[0] for process in processes) == ["", "", "walked\n"]


# -- random crops ------------------------------------------------------------------------------------------------------


def test_random_crops_are_cut_of_the_resized_original_and_the_rest_stays_a_centre_crop(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 3}, size=(40, 24))
    make_folder(tmp_path / "val", {"a": 2}, size=(40, 24))
    plain, source = load_data(folder_config(tmp_path)), load_data(folder_config(tmp_path, crop="random", resize=12))
    assert isinstance(source.train, FolderImages)
    resized = np.asarray(crop.resize_shorter(to_rgb(Image.open(tmp_path / "train" / source.train.files[0])), 12))
    assert resized.shape == (12, 20, 3)
    cut = source.train.fetch([0], None, np.array([[0.99, 0.5]]))[0]
    np.testing.assert_array_equal(cut, resized[4:12, 6:14].transpose(2, 0, 1))
    for ours, theirs in ((source.train, plain.train), (source.heldout, plain.heldout)):
        np.testing.assert_array_equal(ours.fetch([0, 1]), theirs.fetch([0, 1]))
    assert source.info == plain.info


def test_data_without_larger_originals_are_scaled_up_before_they_are_cut() -> None:
    train = load_data(DataConfig(crop="random", resize=40)).train
    assert train.fetch([0, 5], None, np.array([[0.0, 0.0], [0.9, 0.9]])).shape == (2, 3, 32, 32)
    plain = load_data(DataConfig(crop="random")).train  # nothing to choose: the whole image
    np.testing.assert_array_equal(plain.fetch([7], None, np.array([[0.5, 0.9]])), plain.fetch([7]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data.resize": "40"}, r"data\.resize=40: it applies to random crops only"),
        ({"data.crop": "randon"}, r"Did you mean 'random'"),
        (
            {"data.crop": "random", "data.image_size": "32", "data.resize": "20"},
            r"data\.resize=20 is smaller than data\.image_size=32",
        ),
        ({"data.crop": "random", "data.latents": "x"}, r"data\.latents=x holds latents of the centre squares"),
        (
            {"data.crop": "random", "model.remember": "true"},
            r"model\.remember=true keeps the encoding of the first square",
        ),
    ],
)
def test_what_random_crops_do_not_go_with_is_refused(keys: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(get_spec("rae_decoder"), {"model.remember": "false", **keys})


def test_stage_1_of_rae_is_trained_on_the_crops_of_the_released_code_and_other_runs_keep_their_identity() -> None:
    spec = get_spec("rae_decoder")
    at_256, at_512 = (resolve(spec, {"preset": name}).data for name in ("imagenet256-xl", "imagenet512-xl"))
    assert (at_256.crop, at_256.resize, at_256.image_size, at_256.flip) == ("random", 384, 256, False)
    assert (at_512.crop, at_512.resize, at_512.image_size) == ("random", 768, 512)
    run = resolve(spec, {"seed": "0"})
    before = identity(run)
    run.data.crop = "random"
    assert identity(run) != before


# -- what is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "images", "path", "expected"),
    [
        (("photos", 10, 100), 500_000, "x", []),
        (("photos", 1, 100), 1000, "x", ["photos has only one class, so class guidance"]),
        (("photos", 10, 100), 768_700_200, "x", ["shows photos's 100 training images for 7,687,002 epochs:"]),
        (("imagenet", 1000, 1_281_167), 1_024_000_000, "x", []),
        (("folder", 1000, 0), 10**9, None, ["data.path is null"]),
    ],
)
def test_odd_data_are_told(data: tuple[str, int, int], images: int, path: str | None, expected: list[str]) -> None:
    name, classes, number = data
    notes = data_notes(DataSummary(name, classes, 32, number, 0, (), ""), images, path, on_disk=True)
    assert len(notes) == len(expected) and all(part in note for part, note in zip(expected, notes, strict=True))


def test_epochs_are_told_for_people() -> None:
    assert [epochs_text(*pair) for pair in ((50_000, 4599), (100, 400), (5, 0))] == ["11 epochs", "0.25 epochs", ""]


def test_a_start_tells_what_is_odd_of_the_data_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "set", {"all": 24})
    keys = {
        "data.name": "folder", "data.path": str(tmp_path / "set"), "data.image_size": "8", "train.images": "8",
        "train.batch": "4", "eval.num_images": "0",
        "train.preview_images": "0", "train.warmup_images": "0", "eval.grid_columns": "1",
        "out": str(tmp_path / "runs"), "sample.steps": "2",
        "model.depth": "1", "model.width": "16", "model.heads": "2", "model.patch": "4",
        "model.bottleneck": "8", "model.context_tokens": "0",
        "model.context_start": "0",
    }  # fmt: skip
    run_one(resolve(get_spec("jit"), keys))
    assert capfd.readouterr().err.count("has only one class") == 1


# -- synthetic ---------------------------------------------------------------------------------------------------------


def test_synthetic_images_depend_on_their_index_alone() -> None:
    data = load_data(DataConfig(name="synthetic", image_size=24))
    assert (data.info.num_classes, data.info.image_size) == (10, 24)
    np.testing.assert_array_equal(data.train.fetch([13, 4])[0], synthetic.draw(13, 24))
    np.testing.assert_array_equal(data.heldout.fetch([0])[0], synthetic.draw(len(data.train), 24))
    assert data.heldout.labels[:3].tolist() == [(len(data.train) + i) % 10 for i in range(3)]


def test_synthetic_classes_differ_in_shape() -> None:
    """Two colours an image, and the shape covers neither all nor nothing."""
    for index in range(40):
        image = synthetic.draw(index, 64).reshape(3, -1)
        inside = (image != image[:, :1]).any(0).mean() if (image[:, :1] != image).any() else 0.0
        assert 0.005 < inside < 0.95, (index, inside)
