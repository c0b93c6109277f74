"""Stage 1 trains the decoder of a frozen encoder with L1, perceptual and adversarial losses (arXiv 2510.11690)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pixlat.common.config.resolve import require
from pixlat.common.frozen.encoders import build_encoder
from pixlat.common.frozen.perceptual import build_distance
from pixlat.common.frozen.remember import FeatureTable
from pixlat.common.frozen.representation import RepresentationEncoder
from pixlat.common.gan_phases import GanPhases
from pixlat.common.layers.discriminators import evaluating
from pixlat.common.maths.adversarial import (
    Augmentation,
    adaptive_weight,
    augment,
    draw_augmentation,
    hinge_discriminator,
    hinge_generator,
    quantise,
)
from pixlat.methods.base import Batch, DataInfo, Description, Method, ParamGroup, Pretrained
from pixlat.methods.rae.config import DECODERS, DecoderConfig, DecoderSample
from pixlat.methods.rae.discriminator import build_discriminator
from pixlat.methods.rae.reference import decoder_from_released
from pixlat.methods.rae.vit import ViTDecoder


def build_decoder(size: str, encoder: RepresentationEncoder, image_size: int) -> ViTDecoder:
    """Builds the decoder of an encoder's latents; image size and encoder determine its patch size."""
    grid = encoder.grid(image_size)
    require(
        image_size % grid == 0,
        "data.image_size",
        image_size,
        f"must be a multiple of {grid}, the number of tokens per side that the encoder returns",
    )
    return ViTDecoder(DECODERS[size], encoder.channels, grid, image_size // grid, encoder.pixel_mean, encoder.pixel_std)


class DecoderMethod(GanPhases, Method):
    """Trains a decoder D(E(x) + noise) against a discriminator that sees noise-free reconstructions."""

    task = "reconstruction"
    space = "latent_rae"

    def __init__(self, config: DecoderConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        # the losses decide which other frozen networks are needed
        external = {"encoder": Pretrained("encoder", "both")}
        self.encoder = build_encoder(config.encoder, config.encoder_weights)
        self.decoder = build_decoder(config.size, self.encoder, data.image_size)
        self.perceptual = build_distance(config.perceptual, config.perceptual_weights)
        if self.perceptual is not None:
            external["perceptual"] = Pretrained("perceptual", "train")
        self.discriminator: nn.Module | None = None
        if config.discriminator != "none":
            self.discriminator = build_discriminator(config.discriminator, config.discriminator_weights)
        if config.discriminator == "dino":
            external["discriminator.features"] = Pretrained("discriminator", "train")
        self.external = external
        # images of a micro-batch -> their latents; the generator's phase stores them for the discriminator's phase
        self.latents_of_step = WeakTensorKeyDictionary()
        self.schedule_gan(self.discriminator is not None, config.discriminator_start, config.gan_start)
        self.latents_of = FeatureTable(lambda images: (self.encoder(images),), data.num_train if config.remember else 0)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        images, latents = batch["image"], self.encoded_once(phase, batch)
        if phase == "generator":
            noisy = latents + self.draw_noise(latents)
            return self.generator_objective(images, noisy, self.draw_augmentation(images))
        return self.discriminator_objective(
            images, latents, self.draw_augmentation(images), self.draw_augmentation(images)
        )

    def encoded_once(self, phase: str, batch: Batch) -> Tensor:
        """The latents of a micro-batch.

        The encoder is frozen, so the discriminator's phase reuses the latents that the generator's phase computed in
        the same step.
        """
        images = batch["image"]
        if phase == "discriminator" and images in self.latents_of_step:
            return cast("Tensor", self.latents_of_step.pop(images))
        (latents,) = self.latents_of(batch)
        if phase == "generator" and self.discriminator_active:
            self.latents_of_step[images] = latents
        return latents

    def draw_noise(self, latents: Tensor) -> Tensor:
        """Draws sigma n with n ~ N(0, 1) and one sigma per image.

        sigma is tau U(0, 1) in the released code ("uniform") and |N(0, tau^2)| in the paper ("halfnormal").
        """
        draw = torch.rand if self.config.noise_distribution == "uniform" else torch.randn
        sigma = self.config.noise * draw(len(latents), 1, 1, 1, device=latents.device).abs()
        return sigma * torch.randn_like(latents)

    def draw_augmentation(self, images: Tensor) -> Augmentation:
        """Draws DiffAug's random numbers for these images."""
        return draw_augmentation(len(images), images.shape[-1], images.device)

    def generator_objective(self, images: Tensor, noisy: Tensor, augmentation: Augmentation) -> dict[str, Tensor]:
        """L1 on the [0, 1] scale + perceptual distance + (once active) adversarial loss with its adaptive weight."""
        rebuilt = self.decoder(noisy)
        l1 = 0.5 * (rebuilt - images).abs().mean()
        out = {"l1": l1.detach()}
        loss = l1
        if self.perceptual is not None:
            distance = self.perceptual(rebuilt, images).mean()
            out["perceptual"] = distance.detach()
            loss = loss + self.config.perceptual_scale * distance
        if self.adversarial_active:
            assert self.discriminator is not None
            with evaluating(self.discriminator):
                gan = hinge_generator(self.discriminator(augment(rebuilt, augmentation)))
            weight = adaptive_weight(loss, gan, self.decoder.out.weight)
            out |= {"gan": gan.detach(), "gan_weight": weight}
            loss = loss + self.config.gan_scale * weight * gan
        return {"loss": loss, **out}

    def discriminator_objective(
        self, images: Tensor, latents: Tensor, fakes: Augmentation, reals: Augmentation
    ) -> dict[str, Tensor]:
        """Hinge loss on images and their reconstructions.

        The current decoder reconstructs them from noise-free latents; the result is rounded to 8 bits.
        """
        assert self.discriminator is not None
        with torch.no_grad():
            rebuilt = quantise(self.decoder(latents))
        fake = self.discriminator(augment(rebuilt, fakes))
        real = self.discriminator(augment(images, reals))
        return {"loss": hinge_discriminator(real, fake), "real": real.mean().detach(), "fake": fake.mean().detach()}

    def begin_step(self, images_seen: int) -> None:
        super().begin_step(images_seen)
        self.latents_of_step.clear()

    def parameters_of(self, phase: str) -> list[ParamGroup]:
        network = self.decoder if phase == "generator" else self.discriminator
        assert network is not None
        return [ParamGroup([p for p in network.parameters() if p.requires_grad])]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        return {f"decoder.{name}": p for name, p in self.decoder.named_parameters()}

    def blocks(self) -> list[nn.Module]:
        return list(self.decoder.blocks)

    # -- reconstruction ------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def evaluations(self, config: DecoderSample) -> int:
        return 0

    def sampling_networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def describe(self, config: DecoderSample) -> Description:
        losses = [name for name in (self.config.perceptual, self.config.discriminator) if name != "none"]
        return Description(
            prediction="x",
            loss_space=f"pixels: {' + '.join(['l1', *losses])}",
            sampler="none",
            steps=0,
            size=self.config.size,
            pretrained=self.components(),
        )

    # -- released weights ----------------------------------------------------------------------------------------------

    def from_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames the tensors of a released decoder; the discriminator was not released and stays as it is."""
        outside = tuple(f"{name}." for name in (*self.external, "decoder"))
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(outside)}
        return own | {
            f"decoder.{name}": tensor
            for name, tensor in decoder_from_released(state, self.decoder.state_dict()).items()
        }
