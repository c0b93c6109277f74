"""Frozen KL autoencoders with one interface: images to Gaussian moments, and latents to images.

embedded               our small one, trained on emoji32 and part of the package (common/data/autoencoder32.*)
sd-ft-ema, sd-ft-mse   Stable Diffusion's (diffusers' AutoencoderKL), from the Hugging Face cache or a given folder;
                       they differ only in the decoder
a run folder           an autoencoder that pixlat trained

Generators get normalised latents: (z - shift) * scale, per channel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from pixlat.common.errors import UserError, close_match
from pixlat.common.files import sha256_of
from pixlat.common.frozen.base import Frozen, skeleton
from pixlat.common.layers.autoencoder import LOG_VARIANCE, Decoder, Encoder
from pixlat.common.maths.float32 import without_autocast
from pixlat.common.weights.hub import hub_files
from pixlat.common.weights.runs import run_weights
from pixlat.common.weights.shipped import AUTOENCODERS
from pixlat.common.weights.tensors import load_strictly, read_tensors

CARD = Path(AUTOENCODERS["embedded"])
EMBEDDED = CARD.with_suffix(".safetensors")
TRAIN = "train"  # an autoencoder that is not trained yet; it will have the shape of the embedded one
SHAPE_KEYS = ("widths", "stem", "depth", "latent_channels")

SD_REPOSITORIES = {"sd-ft-ema": "stabilityai/sd-vae-ft-ema", "sd-ft-mse": "stabilityai/sd-vae-ft-mse"}
SD_FILE = "diffusion_pytorch_model.safetensors"
SD_SCALE = 0.18215
SD_CONFIG: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}
SD_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Tokenizer(Frozen):
    """A frozen encoder and decoder with the normalisation of their latents.

    It computes in float32 even under autocast.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str, encoder: nn.Module, decoder: nn.Module, channels: int, factor: int) -> None:
        """channels: channels of the latents; factor: side in pixels of one latent position."""
        super().__init__()
        self.name, self.channels, self.factor = name, channels, factor
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1))
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))
        self.eval()

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, S / f, S / f) of the posterior of images (B, 3, S, S) in [-1, 1].

        They are not normalised.
        """
        with without_autocast(images):
            mean, std = self.encoder(images.float())
        return mean.contiguous(), std.contiguous()

    def normalise(self, z: Tensor) -> Tensor:
        """Maps raw latents to the normalised latents that generators use."""
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, h) to images (B, 3, S, S), nominally in [-1, 1] and not clamped."""
        with without_autocast(latents):
            images: Tensor = self.decoder(latents.float() / self.scale + self.shift)
        return images.contiguous()

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self.encoder, "forward"), (self.decoder, "forward")]

    def fill(self, state: Mapping[str, Tensor], source: object, shift: Tensor, scale: Tensor) -> None:
        """Loads encoder, decoder and normalisation (C,); UserError if a tensor is missing or not expected."""
        constants = {"shift": shift.float().view(1, -1, 1, 1), "scale": scale.float().view(1, -1, 1, 1)}
        load_strictly(self, {**state, **constants}, source)


class OwnTokenizer(Tokenizer):
    """An autoencoder of `common/layers/autoencoder.py`: the one in the package, or one from a run folder."""

    def __init__(self, name: str, shape: Mapping[str, Any]) -> None:
        sizes = {key: shape[key] for key in SHAPE_KEYS}
        factor = shape["stem"] * 2 ** (len(shape["widths"]) - 1)
        super().__init__(
            name,
            skeleton(lambda: Encoder(**sizes)),
            skeleton(lambda: Decoder(**sizes)),
            shape["latent_channels"],
            factor,
        )

    def load(self) -> None:
        if self.name == "embedded":
            weights = read_embedded()
            self.fill(weights.state, EMBEDDED, weights.mean, 1 / weights.std)
            self.sha256 = weights.sha256
            return
        run = run_weights(Path(self.name))
        state = {key: tensor for key, tensor in run.state.items() if key.startswith(("encoder.", "decoder."))}
        mean, square = run.state["latent_mean"], run.state["latent_square"]
        self.fill(state, self.name, mean, (square - mean.square()).rsqrt())
        self.sha256 = run.sha256


@dataclass(frozen=True)
class EmbeddedWeights:
    """The content of the package's tokenizer."""

    state: dict[str, Tensor]
    mean: Tensor  # (C,) mean of samples from the posterior over the training images
    std: Tensor  # (C,) their standard deviation
    sha256: str


def read_autoencoder_card() -> dict[str, Any]:
    """The card of the embedded tokenizer: shape, recipe, scores, digest, moments of its latents."""
    card: dict[str, Any] = json.loads(CARD.read_text(encoding="utf-8"))
    return card


def read_embedded() -> EmbeddedWeights:
    """The package's weights as float32; UserError if the file does not have the expected digest."""
    card, digest = read_autoencoder_card(), sha256_of(EMBEDDED)
    if digest != card["sha256"]:
        raise UserError(f"{EMBEDDED} has sha256 {digest}, expected {card['sha256']}. Reinstall the package.")
    state = {key: tensor.float() for key, tensor in read_tensors(EMBEDDED).items()}
    return EmbeddedWeights(state, torch.tensor(card["latent_mean"]), torch.tensor(card["latent_std"]), digest)


class SdTokenizer(Tokenizer):
    """Stable Diffusion's autoencoder; one latent position is 8 pixels wide."""

    def __init__(self, name: str, path: str | None = None, config: Mapping[str, Any] = SD_CONFIG) -> None:
        from diffusers import AutoencoderKL

        network = skeleton(lambda: AutoencoderKL(**config))
        encoder, decoder = (
            _SdEncoder(network.encoder, network.quant_conv),
            nn.Sequential(network.post_quant_conv, network.decoder),
        )
        super().__init__(
            name, encoder, decoder, network.config.latent_channels, 2 ** (len(network.config.block_out_channels) - 1)
        )
        self.path = path

    def load(self) -> None:
        (file,) = hub_files(SD_REPOSITORIES[self.name], [SD_FILE], self.path, "model.tokenizer_path", "MIT")
        channel = torch.ones(self.channels)
        self.fill(
            {sd_name(key): tensor for key, tensor in read_tensors(file).items()}, file, 0 * channel, SD_SCALE * channel
        )
        self.sha256 = sha256_of(file)


class _SdEncoder(nn.Module):
    """diffusers' encoder, which ends in the mean and the standard deviation."""

    def __init__(self, encoder: nn.Module, quant_conv: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(encoder, quant_conv)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.network(images).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE))


def sd_name(key: str) -> str:
    """Our name of a tensor of AutoencoderKL; the released files still have the attention's names from before 2023."""
    key = re.sub(r"(?<=attentions\.\d\.)(query|key|value|proj_attn)\b", lambda match: SD_OLD_NAMES[match[1]], key)
    places = {
        "encoder.": "encoder.network.0.",
        "quant_conv.": "encoder.network.1.",
        "post_quant_conv.": "decoder.0.",
        "decoder.": "decoder.1.",
    }
    part = key.partition(".")[0] + "."
    return places.get(part, part) + key.removeprefix(part)


def build_tokenizer(name: str, path: str | None = None) -> Tokenizer:
    """Builds a tokenizer without its weights.

    name: "embedded", one of `SD_REPOSITORIES`, or the run folder of a trained autoencoder.
    path: folder or file of the SD weights; None for the Hugging Face cache.
    """
    if name in SD_REPOSITORIES:
        return SdTokenizer(name, path)
    if name in ("embedded", TRAIN):
        return OwnTokenizer(name, read_autoencoder_card()["model"])
    if (Path(name) / "config.yaml").is_file():
        return OwnTokenizer(name, run_shape(Path(name)))
    names: Sequence[str] = ("embedded", *SD_REPOSITORIES)
    raise UserError(
        f"tokenizer={name!r} is not known.{close_match(name, names)} Give {', '.join(names)}, "
        "or the run folder of a trained autoencoder."
    )


def run_shape(folder: Path) -> Mapping[str, Any]:
    """The sizes of the autoencoder that a run folder holds."""
    model = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")).get("model")  # type: ignore[union-attr]
    if not isinstance(model, dict) or not all(key in model for key in SHAPE_KEYS):
        raise UserError(
            f"{folder} is not the run folder of an autoencoder: "
            f"its config.yaml has no model.{', model.'.join(SHAPE_KEYS)}. Give the run folder of a trained autoencoder."
        )
    return model
