"""Reads and writes the files of diffusers' AutoencoderRAE: config.json and diffusion_pytorch_model.safetensors.

That class differs from our implementation. If there are not 16 x 16 tokens, it scales its table of positions and
ignores the stored one. When it encodes, it adds 1e-5 to the latents' standard deviation a second time. With
transformers 5 it cannot build SigLIP2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.files import read_json, write_whole
from pixlat.common.frozen.encoders_transformers import HUB_ENCODERS, TransformersEncoder
from pixlat.common.frozen.representation import RepresentationEncoder
from pixlat.common.layers.transformer import sincos_table
from pixlat.common.weights.checkpoint import save_tensors
from pixlat.common.weights.tensors import read_tensors
from pixlat.methods.rae.reference import decoder_to_released
from pixlat.methods.rae.statistics import VARIANCE_EPS
from pixlat.methods.rae.vit import ViTDecoder

CLASS, WEIGHTS, CONFIG = "AutoencoderRAE", "diffusion_pytorch_model.safetensors", "config.json"
NAMES = (  # (name in the authors' files, name in diffusers)
    ("attention.attention.query.", "attention.to_q."),
    ("attention.attention.key.", "attention.to_k."),
    ("attention.attention.value.", "attention.to_v."),
    ("attention.output.dense.", "attention.to_out.0."),
)
ENCODER_TYPES = {"Dinov2WithRegisters": "dinov2", "SiglipVision": "siglip2", "ViTMAE": "mae"}
POSITIONS = "decoder_pos_embed"  # not in diffusers' files


def to_theirs(name: str) -> str:
    """diffusers' name of a parameter of a released decoder."""
    for released, theirs in NAMES:
        name = name.replace(released, theirs)
    return f"decoder.{name}"


def from_theirs(name: str) -> str:
    """The inverse of `to_theirs`."""
    for released, theirs in NAMES:
        name = name.replace(theirs, released)
    return name.removeprefix("decoder.")


def read_decoder(folder: Path) -> dict[str, Tensor]:
    """The decoder's tensors under the names of the authors' files."""
    config, tensors = _read(folder)
    state = {from_theirs(name): tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    table = sincos_table(config["encoder_input_size"] // config["encoder_patch_size"], config["decoder_hidden_size"])
    return state | {POSITIONS: torch.cat((torch.zeros_like(table[:1]), table))[None]}


def read_latent_statistics(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and variance, broadcastable to (C, h, h). The file holds sqrt(variance + 1e-5)."""
    _, tensors = _read(folder)
    return tensors["_latents_mean"], (tensors["_latents_std"].double().square() - VARIANCE_EPS).clamp(min=0).float()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = folder / CONFIG
    config = read_json(file) if file.is_file() else {}
    if not isinstance(config, dict) or config.get("_class_name") != CLASS:
        raise UserError(
            f"{folder} is neither a run folder (it has no config.yaml) nor one of diffusers' {CLASS} "
            "(its config.json does not say so)."
        )
    return config, read_tensors(folder / WEIGHTS)


def write(
    folder: Path, decoder: ViTDecoder, encoder: RepresentationEncoder, statistics: tuple[Tensor, Tensor] | None = None
) -> None:
    """Writes decoder and encoder to a folder that `AutoencoderRAE.from_pretrained` reads.

    encoder: a loaded `TransformersEncoder`. Its tensors keep the names of the installed transformers version, because
    diffusers does not translate between versions.
    statistics: mean and variance (C, h, h) of the latents; None for latents that are not normalised.
    """
    if not isinstance(encoder, TransformersEncoder):
        raise UserError(f"diffusers' {CLASS} has no encoder like {encoder.name}; it has {', '.join(HUB_ENCODERS)}.")
    if (folder / CONFIG).exists() or (folder / WEIGHTS).exists():
        raise UserError(f"{folder} already holds a model. Choose another folder.")
    mean, variance = (torch.zeros(1), torch.ones(1) - VARIANCE_EPS) if statistics is None else statistics
    tensors = {
        to_theirs(name): tensor
        for name, tensor in decoder_to_released(decoder.state_dict()).items()
        if name != POSITIONS
    }
    tensors |= {f"encoder.{name}": tensor for name, tensor in encoder.network.state_dict().items()}
    tensors |= {
        "encoder_mean": encoder.mean,
        "encoder_std": encoder.std,
        "_latents_mean": mean,
        "_latents_std": (variance + VARIANCE_EPS).sqrt(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = configuration(decoder, encoder) | {
        f"latents_{key}": None if statistics is None else tensors[f"_latents_{key}"].tolist() for key in ("mean", "std")
    }
    write_whole(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def configuration(decoder: ViTDecoder, encoder: TransformersEncoder) -> dict[str, Any]:
    """config.json without the latents' statistics."""
    shape = decoder.shape
    return {
        "_class_name": CLASS,
        "encoder_type": ENCODER_TYPES[encoder.spec.family],
        "encoder_hidden_size": encoder.channels,
        "encoder_patch_size": encoder.spec.patch,
        "encoder_num_hidden_layers": encoder.config.num_hidden_layers,
        "encoder_input_size": encoder.spec.patch * decoder.grid,
        "encoder_norm_mean": list(encoder.pixel_mean),
        "encoder_norm_std": list(encoder.pixel_std),
        "decoder_hidden_size": shape.width,
        "decoder_num_hidden_layers": shape.depth,
        "decoder_num_attention_heads": shape.heads,
        "decoder_intermediate_size": shape.hidden,
        "patch_size": decoder.patch,
        "image_size": decoder.patch * decoder.grid,
    }
