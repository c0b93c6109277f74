"""What frozen networks say of training images, kept: in memory for small sets, in files for large ones.

FeatureTable     in memory, filled as a run goes
LatentShards     a folder of arrays with the posterior's moments of every image and of its mirror image
ReleasedLatents  the folder of one .npy file an image that the released training code of REPA and REG reads

Moments are kept and not latents: the posterior is sampled anew at every read, as when images are encoded in the loop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from common import mapped
from common.errors import UserError
from common.files import hold_to, write_whole

if TYPE_CHECKING:
    from common.datasets import ImageSet
    from common.tokenizer import Tokenizer

CARD = "latents.json"
FORMAT = 1
SHARD_IMAGES = 16_384
DTYPES = ("float32", "float16")
LARGEST_BYTES = 8 * 2**30


# -- in memory ------------------------------------------------------------------------------------------------------------------


class FeatureTable:
    """A frozen network's outputs for training images; where they are remembered, it is asked once for each image and orientation.

    It is no part of a checkpoint. Images are computed one at a time before they are kept, so that what is kept does not depend on the batch
    in which an image came first, and a run that was stopped goes on bit for bit. What is kept is always computed without autocast, because
    `before_training` may fill rows outside of it, and a resumed run fills them within.
    """

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, ...]], num_images: int = 0) -> None:
        """compute: images (B, 3, S, S) to tensors (B, ...); num_images: of the training set whose outputs are remembered, 0 to ask every time."""
        self.compute = compute
        self.num_images = num_images
        self.tables: tuple[Tensor, ...] = ()  # each (N, ...), or (2 N, ...) where images are mirrored: the mirror images follow
        self.missing = torch.ones(0, dtype=torch.bool)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs for a training batch: "image", "index" and, where images may be mirrored, "mirrored" (B,) bool."""
        if not self.num_images or not has_numbers(batch["image"]):
            return self.compute(batch["image"])
        row = batch["index"] + self.num_images * batch["mirrored"] if "mirrored" in batch else batch["index"]
        if not self.tables:
            first = self._compute_exactly(batch["image"][:1])
            self._make_room(first, self.num_images * (2 if "mirrored" in batch else 1))
            self._keep(first, int(row[0]))
        if self.missing.any():  # on the host: once every image is known, nothing waits for the device
            self._fill(batch["image"], row.cpu())
        return tuple(table[row] for table in self.tables)

    def _make_room(self, example: tuple[Tensor, ...], count: int) -> None:
        size = sum(count * value[0].numel() * value.element_size() for value in example)
        if size > LARGEST_BYTES:
            raise UserError(
                f"model.remember=true would keep {size / 2**30:.1f} GiB for {count} images; at most {LARGEST_BYTES / 2**30:.0f} are allowed. "
                "Set model.remember=false, and prepare the latents in files (`python launch/prepare.py latents`)."
            )
        self.tables = tuple(torch.empty(count, *value.shape[1:], dtype=value.dtype, device=value.device) for value in example)
        self.missing = torch.ones(count, dtype=torch.bool, device="cpu")

    def _fill(self, images: Tensor, rows: Tensor) -> None:
        for i, row in enumerate(rows.tolist()):
            if self.missing[row]:
                self._keep(self._compute_exactly(images[i : i + 1]), row)

    def _compute_exactly(self, images: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(images.device.type, enabled=False):
            return self.compute(images)

    def _keep(self, values: tuple[Tensor, ...], row: int) -> None:
        for table, value in zip(self.tables, values, strict=True):
            table[row] = value[0]
        self.missing[row] = False


def has_numbers(tensor: Tensor) -> bool:
    """False for the tensors with which costs are counted (common/cost.py): there is nothing in them to remember."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


# -- in files -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentFacts:
    """What a method may know of stored moments before it is built."""

    shape: tuple[int, ...]  # (2 C, h, h)
    encoder_sha256: str | None  # None: the files do not say


class Latents(Protocol):
    """Stored moments of a training set."""

    @property
    def facts(self) -> LatentFacts: ...

    def moments(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> NDArray[np.float32]:
        """(B, 2 C, h, h): means, then standard deviations, not normalised; of the mirror image where `flips` is true."""


@dataclass(frozen=True)
class Card:
    """latents.json: what the shards hold and where they come from."""

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
    "format": mapped.whole(FORMAT, FORMAT), "tokenizer": mapped.text, "encoder_sha256": mapped.text, "data_digest": mapped.text,
    "images": mapped.whole(1), "shape": lambda found: isinstance(found, list) and len(found) == 3 and all(map(mapped.whole(1, 2**20), found)),
    "dtype": lambda found: found in DTYPES, "shard_images": mapped.whole(1), "shards": mapped.text_map,
}  # fmt: skip


def encoder_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 over the encoder's tensors. Two tokenizers that differ in the decoder only have the same."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tokenizer.encoder.state_dict().items()):
        hasher.update(f"{name} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def write_latents(folder: Path, images: ImageSet, tokenizer: Tokenizer, batch: int = 64, dtype: str = "float32", shard_images: int = SHARD_IMAGES) -> Card:
    """Encodes every image and its mirror image on the tokenizer's device. Shards that are whole are kept, so the command can be repeated.

    The card is written last: a folder without one is not finished, and one of other images or of another encoder is refused.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
    side = images.image_size // tokenizer.factor
    facts = {
        "format": FORMAT,
        "tokenizer": tokenizer.name,
        "encoder_sha256": encoder_digest(tokenizer),
        "data_digest": images.digest,
        "images": len(images),
        "shape": (2 * tokenizer.channels, side, side),
        "dtype": dtype,
        "shard_images": shard_images,
    }
    hold_to(folder / "plan.json", facts, "latents of other images, of another encoder or in another layout")
    digests = {}
    for number, positions in mapped.shard_ranges(len(images), shard_images):
        file = folder / shard_name(number)
        if not file.exists():
            _write_shard(file, images, tokenizer, np.array(positions), batch, dtype)
        digests[file.name] = mapped.sha256_of(file)
    mapped.keep_verified(folder, digests)
    card = Card(**facts, shards=digests)  # type: ignore[arg-type]
    write_whole(folder / CARD, json.dumps(asdict(card), indent=1) + "\n")
    return card


def _write_shard(file: Path, images: ImageSet, tokenizer: Tokenizer, indices: NDArray[np.int64], batch: int, dtype: str) -> None:
    """(images, 2, 2 C, h, h): axis 1 is the image and its mirror image."""
    side = images.image_size // tokenizer.factor
    with mapped.new_shard(file, (len(indices), 2, 2 * tokenizer.channels, side, side), dtype) as array:
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            array[start : start + len(part)] = _moments_of(images, tokenizer, part)


def _moments_of(images: ImageSet, tokenizer: Tokenizer, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    device = tokenizer.scale.device
    orientations = []
    for mirrored in (False, True):
        pixels = torch.from_numpy(images.fetch(indices, np.full(len(indices), mirrored))).to(device)
        mean, std = tokenizer.encode_moments(pixels.float() / 127.5 - 1)
        orientations.append(torch.cat((mean, std), dim=1))
    moments: NDArray[np.float32] = torch.stack(orientations, dim=1).cpu().numpy()
    return moments


class LatentShards:
    """The folder that `write_latents` made. What its card says is held against the files before memory is taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = card = read_card(folder)
        self.facts = LatentFacts(card.shape, card.encoder_sha256)
        files = [folder / name for name in card.shards]
        ranges = mapped.shard_ranges(card.images, card.shard_images)
        shapes = [(len(rows), 2, *card.shape) for _, rows in ranges]
        headers = [mapped.check_header(file, shape, [card.dtype], self.advice(file)) for file, shape in zip(files, shapes, strict=True)]
        self.shards = mapped.Shards(files, card.shape, card.dtype, [header.offset for header in headers])  # a row is one orientation

    def moments(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> NDArray[np.float32]:
        shard, image = np.divmod(indices, self.card.shard_images)
        rows = zip(shard.tolist(), (2 * image + flips).tolist(), strict=True)
        return np.stack([self.shards.read(number, row) for number, row in rows]).astype(np.float32)

    def check(self, images: ImageSet) -> None:
        """UserError unless the moments are those of these training images."""
        if self.card.data_digest != images.digest:
            raise UserError(
                f"{self.folder} holds the latents of {self.card.images} other images than the {len(images)} of this training set "
                f"(digest {self.card.data_digest[:12]} instead of {images.digest[:12]}). Prepare them again for these data settings."
            )

    def verify(self) -> None:
        """UserError if a shard does not have the digest of the card; it is read once for each size and time of change."""
        mapped.verify(self.folder, self.card.shards, self.advice("the damaged file"))

    def advice(self, file: object) -> str:
        """How damage is mended."""
        return f"Remove {self.folder / CARD} and {file}, and prepare the latents again."


def read_card(folder: Path) -> Card:
    """latents.json of a folder; a UserError if it is missing, damaged or of another format."""
    content = mapped.read_card(folder / CARD, FORMAT, "latents", CARD_RULES)
    count = mapped.shard_count(content["images"], content["shard_images"])
    if len(content["shards"]) != count or list(content["shards"]) != [shard_name(number) for number in range(count)]:
        told = f"{content['images']:,} images, {content['shard_images']:,} a file, are in {count:,} files, and it lists {len(content['shards']):,}"
        raise UserError(f"{folder / CARD} is damaged: {told}. Remove it, and prepare the latents again.")
    return Card(**{**content, "shape": tuple(content["shape"])})


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"moments-{number:05d}.npy"


class ReleasedLatents:
    """One float32 .npy (2 C, h, h) = [mean, std] an image, and dataset.json {"labels": [[file name, class], ...]}; no mirror images.

    The images are those of the training set in the sorted order of the file names, which is how the released code pairs them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            labels = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["labels"]
            entries = sorted((str(name), int(label)) for name, label in labels)
            self.labels = np.array([label for _, label in entries], dtype=np.int64)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f'{folder / "dataset.json"} cannot be read as {{"labels": [[file name, class], ...]}} ({error!r}).') from error
        if not entries:
            raise UserError(f"{folder / 'dataset.json'} lists no latents.")
        self.files = [name for name, _ in entries]

    @cached_property
    def facts(self) -> LatentFacts:
        """The shape is that of the first file."""
        header = mapped.read_header(self.folder / self.files[0])
        if len(header.shape) != 3 or header.shape[0] % 2 or header.dtype.kind != "f":
            raise UserError(f"{self.folder / self.files[0]} holds {header.shape} numbers of type {header.dtype}, and moments are (2 C, h, h) of floats.")
        return LatentFacts(header.shape, None)

    def moments(self, indices: NDArray[np.int64], flips: NDArray[np.bool_]) -> NDArray[np.float32]:
        assert not np.any(flips)
        return np.stack([self._read(self.files[i]) for i in indices])

    def _read(self, name: str) -> NDArray[np.float32]:
        mapped.check_header(self.folder / name, self.facts.shape, ["float16", "float32", "float64"], "All latents of a folder have one shape.")
        array: NDArray[np.float32] = np.load(self.folder / name).astype(np.float32)
        return array

    def check(self, images: ImageSet) -> None:
        """UserError unless number and classes are those of these training images; the files do not say more of their origin."""
        if not np.array_equal(self.labels, images.labels):
            raise UserError(
                f"{self.folder} lists {len(self.labels)} latents and the training set has {len(images)} images, or their classes differ. "
                "Use the folder of images from which these latents were made."
            )


def open_latents(folder: Path, images: ImageSet, mirrored: bool = False, verify: bool = True) -> LatentShards | ReleasedLatents:
    """Stored moments for a training set: our shards, or the released layout. A folder of other images is a UserError.

    verify: whether damaged shards are looked for, as before a training; the released layout has no digests.
    mirrored: whether those of mirror images are needed, too, which the released layout does not have.
    """
    if not folder.is_dir():
        raise UserError(f"data.latents={str(folder)!r} is not a folder. Make one with `python launch/prepare.py latents to={folder}`.")
    latents = ReleasedLatents(folder) if (folder / "dataset.json").exists() else LatentShards(folder)
    if mirrored and isinstance(latents, ReleasedLatents):
        raise UserError(f"data.latents={folder} holds no mirror images. Set data.flip=false, or prepare latents with `python launch/prepare.py latents`.")
    latents.check(images)
    if verify and isinstance(latents, LatentShards):
        latents.verify()
    return latents


def check_encoder(encoder_sha256: str | None, tokenizer: Tokenizer) -> None:
    """UserError unless moments of the encoder with this digest are this tokenizer's; None (files that do not say) is taken as it is."""
    if encoder_sha256 not in (None, encoder_digest(tokenizer)):
        raise UserError(f"The stored latents come from another encoder than model.tokenizer={tokenizer.name}. Prepare them again with this one.")
