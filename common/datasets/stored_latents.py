"""Reads stored latents of training images, which a training uses instead of the images (`data.latents`). No torch.

LatentShards     our format: arrays with the posterior's moments of every image and of its mirror image
ReleasedLatents  the layout of REPA's and REG's released training code: one .npy file per image

The files hold moments (mean and standard deviation) instead of latents, because a training samples the posterior anew
each time it shows an image, just as it does when it encodes images itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixlat.common.datasets import npy_shards as mapped
from pixlat.common.errors import UserError
from pixlat.common.images.image_set import ImageSet, LatentFacts

CARD = "latents.json"
FORMAT = 1

DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class LatentCard:
    """latents.json: the content and the origin of the shards."""

    format: int
    tokenizer: str
    encoder_sha256: str
    data_digest: str  # of the training images
    images: int
    shape: tuple[int, int, int]  # (2 C, h, h)
    dtype: str
    shard_images: int
    shards: dict[str, str]  # file name -> sha256, in order


CARD_RULES: dict[str, mapped.Rule] = {
    "format": mapped.whole_number(FORMAT, FORMAT), "tokenizer": mapped.text,
    "encoder_sha256": mapped.text, "data_digest": mapped.text,
    "images": mapped.whole_number(1),
    "shape": lambda size: isinstance(size, list) and len(size) == 3 and all(map(mapped.whole_number(1, 2**20), size)),
    "dtype": lambda name: name in DTYPES, "shard_images": mapped.whole_number(1), "shards": mapped.text_map,
}  # fmt: skip


class LatentShards:
    """The folder that `write_latents` made. Compares its files with its card before it allocates memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = card = read_latent_card(folder)
        self.facts = LatentFacts(card.shape, card.encoder_sha256)
        files = [folder / name for name in card.shards]
        ranges = mapped.shard_ranges(card.images, card.shard_images)
        shapes = [(len(rows), 2, *card.shape) for _, rows in ranges]
        headers = [
            mapped.check_header(file, shape, [card.dtype], self.advice(file))
            for file, shape in zip(files, shapes, strict=True)
        ]
        # a row holds one orientation of an image: row 2 i is image i, row 2 i + 1 its mirror image
        self.shards = mapped.Shards(files, card.shape, card.dtype, [header.offset for header in headers])

    def moments(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> NDArray[np.float32]:
        shard, image = np.divmod(indices, self.card.shard_images)
        rows = zip(shard.tolist(), (2 * image + flips).tolist(), strict=True)
        return np.stack([self.shards.read(number, row) for number, row in rows]).astype(np.float32)

    def check(self, images: ImageSet) -> None:
        """Raises UserError unless the moments belong to these training images."""
        if self.card.data_digest != images.digest:
            raise UserError(
                f"{self.folder} holds the latents of {self.card.images} other images than the {len(images)} "
                f"of this training set (digest {self.card.data_digest[:12]} instead of {images.digest[:12]}). "
                "Prepare the latents again with the present data settings."
            )

    def verify(self) -> None:
        """Raises UserError if a shard does not have the SHA-256 of the card.

        Reads each shard once; later calls read it again only if its size or time of change differs.
        """
        mapped.verify(self.folder, self.card.shards, self.advice("the damaged file"))

    def advice(self, file: object) -> str:
        """The sentence with which messages about damage end."""
        return f"Remove {self.folder / CARD} and {file}, and prepare the latents again."


def read_latent_card(folder: Path) -> LatentCard:
    """Reads latents.json of a folder. UserError if it is missing, damaged or of another format."""
    content = mapped.read_card(folder / CARD, FORMAT, "latents", CARD_RULES)
    count = mapped.shard_count(content["images"], content["shard_images"])
    if len(content["shards"]) != count or list(content["shards"]) != [shard_name(number) for number in range(count)]:
        fault = (
            f"{content['images']:,} images with {content['shard_images']:,} per file need {count:,} files, "
            f"but it lists {len(content['shards']):,}"
        )
        raise UserError(f"{folder / CARD} is damaged: {fault}. Remove it, and prepare the latents again.")
    return LatentCard(**{**content, "shape": tuple(content["shape"])})


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"moments-{number:05d}.npy"


class ReleasedLatents:
    """One float32 .npy (2 C, h, h) = [mean, std] per image, and dataset.json {"labels": [[file name, class], ...]}.

    The layout has no mirror images. As in the released code, the i-th file name in sorted order belongs to
    the i-th training image.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            labels = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["labels"]
            entries = sorted((str(name), int(label)) for name, label in labels)
            self.labels = np.array([label for _, label in entries], dtype=np.int64)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(
                f'{folder / "dataset.json"} cannot be read as {{"labels": [[file name, class], ...]}} ({error!r}).'
            ) from error
        if not entries:
            raise UserError(f"{folder / 'dataset.json'} lists no latents.")
        self.files = [name for name, _ in entries]

    @cached_property
    def facts(self) -> LatentFacts:
        """The shape of the first file."""
        header = mapped.read_header(self.folder / self.files[0])
        if len(header.shape) != 3 or header.shape[0] % 2 or header.dtype.kind != "f":
            raise UserError(
                f"{self.folder / self.files[0]} holds {header.shape} numbers of type {header.dtype}, "
                "but moments are floats of shape (2 C, h, h)."
            )
        return LatentFacts(header.shape, None)

    def moments(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> NDArray[np.float32]:
        assert not np.any(flips)
        return np.stack([self._read(self.files[i]) for i in indices])

    def _read(self, name: str) -> NDArray[np.float32]:
        mapped.check_header(
            self.folder / name,
            self.facts.shape,
            ["float16", "float32", "float64"],
            "All latents of a folder must have the same shape.",
        )
        array: NDArray[np.float32] = np.load(self.folder / name).astype(np.float32)
        return array

    def check(self, images: ImageSet) -> None:
        """Raises UserError unless the number of latents and their classes are those of these training images.

        The files hold no other facts about their origin that could be checked.
        """
        if not np.array_equal(self.labels, images.labels):
            raise UserError(
                f"{self.folder} lists {len(self.labels)} latents and the training set has {len(images)} images, "
                "or their classes differ. Use the folder of images from which these latents were made."
            )


def open_latents(
    folder: Path, images: ImageSet, mirrored: bool = False, verify: bool = True
) -> LatentShards | ReleasedLatents:
    """Opens the stored moments of a training set: our shards, or the released layout.

    Raises UserError if they belong to other images.
    verify: whether to compare our shards with their digests, as before a training; the released layout has none.
    mirrored: whether the training also needs the moments of mirror images, which the released layout lacks.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.latents={str(folder)!r} is not a folder. Make one with `pixlat prepare latents to={folder}`."
        )
    latents = ReleasedLatents(folder) if (folder / "dataset.json").exists() else LatentShards(folder)
    if mirrored and isinstance(latents, ReleasedLatents):
        raise UserError(
            f"data.latents={folder} holds no mirror images. Set data.flip=false, "
            "or prepare latents with `pixlat prepare latents`."
        )
    latents.check(images)
    if verify and isinstance(latents, LatentShards):
        latents.verify()
    return latents
