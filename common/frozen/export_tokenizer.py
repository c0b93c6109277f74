"""Exports a trained autoencoder as a tokenizer: two files that `model.tokenizer` takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from pixlat.common.config.schema import DataConfig
from pixlat.common.datasets.load import load_data
from pixlat.common.files import sha256_of, write_whole
from pixlat.common.frozen.tokenizer import OwnTokenizer, Tokenizer
from pixlat.common.images.image_set import ImageSet
from pixlat.common.weights.checkpoint import save_tensors
from pixlat.common.weights.runs import run_weights
from pixlat.common.weights.tensors import read_tensors


def export_tokenizer(folder: Path, file: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the autoencoder of a run folder as `file` (float16 weights) with a card beside it (.json).

    Returns the card. It holds the sizes, the recipe, the digest and two measurements of the stored weights on the
    run's data: the moments of the latents of all training images, and the mean PSNR of the held-out images.
    The training cost comes from the run's record: MACs, images, device seconds and pretrained networks.
    A generator that uses these weights lists that cost in its record.
    """
    run = run_weights(folder)
    names = ("encoder.", "decoder.")
    save_tensors({key: tensor.half().contiguous() for key, tensor in run.state.items() if key.startswith(names)}, file)
    tokenizer = OwnTokenizer(str(folder), run.config["model"])
    channel = torch.ones(tokenizer.channels)
    tokenizer.fill(read_tensors(file), file, 0 * channel, channel)
    source = load_data(OmegaConf.merge(OmegaConf.structured(DataConfig), run.config["data"]))
    mean, std = _latent_moments(tokenizer, source.train)
    card = {
        "model": run.config["model"],
        "train": run.config["train"],
        "data": {"name": source.info.name, "digest": source.info.digest},
        "seed": run.config["seed"],
        "bytes": file.stat().st_size,
        "sha256": sha256_of(file),
        "latent_mean": mean.tolist(),
        "latent_std": std.tolist(),
        "psnr_heldout": _mean_psnr(tokenizer, source.heldout),
        "row_id": record["row_id"],
        **{name: record["train"][name] for name in ("images_seen", "macs_total", "device_seconds")},
        "pretrained_components": record["pretrained_components"],
    }
    write_whole(file.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    return card


def _pixels(images: ImageSet, batch: int = 64) -> Iterator[Tensor]:
    for start in range(0, len(images), batch):
        yield torch.from_numpy(images.fetch(range(start, min(start + batch, len(images))))).float() / 127.5 - 1


def _latent_moments(tokenizer: Tokenizer, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of samples from the posterior, over all images and positions."""
    first, second = [], []
    for pixels in _pixels(images):
        mean, std = tokenizer.encode_moments(pixels)
        first.append(mean.double().mean(dim=(2, 3)))
        second.append((mean.double().square() + std.double().square()).mean(dim=(2, 3)))
    centre = torch.cat(first).mean(dim=0)
    return centre, (torch.cat(second).mean(dim=0) - centre.square()).sqrt()


def _mean_psnr(tokenizer: Tokenizer, images: ImageSet) -> float:
    """Mean PSNR over images in dB: -10 log10 of the mean squared error on the [0, 1] scale.

    The decoder gets the posterior's mean.
    """
    psnr = []
    for pixels in _pixels(images):
        rebuilt = tokenizer.decode(tokenizer.normalise(tokenizer.encode_moments(pixels)[0])).clamp(-1, 1)
        psnr.append(-10 * ((rebuilt - pixels) / 2).square().mean(dim=(1, 2, 3)).log10())
    return torch.cat(psnr).mean().item()
