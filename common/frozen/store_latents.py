"""Writes the latents of a data set to files: `pixlat prepare latents`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pixlat.common.datasets import npy_shards as mapped
from pixlat.common.datasets.stored_latents import CARD, DTYPES, FORMAT, LatentCard, shard_name
from pixlat.common.errors import UserError
from pixlat.common.files import write_or_compare, write_whole

if TYPE_CHECKING:
    from pixlat.common.frozen.tokenizer import Tokenizer
    from pixlat.common.images.image_set import ImageSet

SHARD_IMAGES = 16_384


def encoder_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of the encoder's tensors; two tokenizers that differ only in the decoder have the same digest."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tokenizer.encoder.state_dict().items()):
        hasher.update(f"{name} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def write_latents(
    folder: Path,
    images: ImageSet,
    tokenizer: Tokenizer,
    batch: int = 64,
    dtype: str = "float32",
    shard_images: int = SHARD_IMAGES,
) -> LatentCard:
    """Encodes every image and its mirror image on the tokenizer's device and writes the moments to shards.

    If the command was interrupted, it can be repeated: it keeps shards that are complete. It writes the card last,
    so a folder without a card is not finished. Raises UserError if the folder holds latents of other images or of
    another encoder.
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
    write_or_compare(folder / "plan.json", facts, "latents of other images, of another encoder or in another layout")
    digests = {}
    for number, positions in mapped.shard_ranges(len(images), shard_images):
        file = folder / shard_name(number)
        if not file.exists():
            _write_shard(file, images, tokenizer, np.array(positions), batch, dtype)
        digests[file.name] = mapped.sha256_of(file)
    mapped.keep_verified(folder, digests)
    card = LatentCard(**facts, shards=digests)  # type: ignore[arg-type]
    write_whole(folder / CARD, json.dumps(asdict(card), indent=1) + "\n")
    return card


def _write_shard(
    file: Path, images: ImageSet, tokenizer: Tokenizer, indices: NDArray[np.int64], batch: int, dtype: str
) -> None:
    """Writes one shard (images, 2, 2 C, h, h); axis 1 holds the image and its mirror image."""
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


def check_encoder(encoder_sha256: str | None, tokenizer: Tokenizer) -> None:
    """Raises UserError if stored moments with this digest come from another encoder than this tokenizer's.

    None (files without a digest) passes.
    """
    if encoder_sha256 not in (None, encoder_digest(tokenizer)):
        raise UserError(
            f"The stored latents come from another encoder than model.tokenizer={tokenizer.name}. "
            "Prepare them again with this one (`pixlat prepare latents`)."
        )
