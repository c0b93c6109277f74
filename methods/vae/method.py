"""The autoencoder's training: L1, perceptual distance, KL to a standard normal and, as an option, a discriminator.

loss = mean |y - x| + w_p d(y, x) + w_kl KL(N(mean, std^2) || N(0, 1)) / (numbers of the image)
       + w_a * adaptive weight * (-mean D(y))
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pixlat.common.config.resolve import require
from pixlat.common.frozen.perceptual import build_distance
from pixlat.common.gan_phases import GanPhases
from pixlat.common.layers.autoencoder import Decoder, Encoder
from pixlat.common.layers.discriminators import PatchDiscriminator, evaluating
from pixlat.common.maths.adversarial import (
    Augmentation,
    adaptive_weight,
    augment,
    draw_augmentation,
    hinge_discriminator,
    hinge_generator,
    quantise,
)
from pixlat.common.maths.float32 import without_autocast
from pixlat.methods.base import Batch, DataInfo, Description, Method, ParamGroup, Pretrained
from pixlat.methods.vae.config import VaeConfig, VaeSample

STATISTICS_RATE = 0.005  # rate of the latents' running moments, which so cover the last few hundred steps
MEASURED_IMAGES = 10_000  # most images for the measurement of the latents' moments after training


class VaeMethod(GanPhases, Method):
    """Encoder and decoder, trained on single draws from the posterior.

    Training keeps running moments of the latents, as batch norm does. After training the method measures the moments
    again, with the averaged weights that are evaluated.
    """

    phases: tuple[str, ...] = ("autoencoder", "discriminator")
    task = "reconstruction"
    space = "latent_vae"
    latent_mean: Tensor
    latent_square: Tensor

    def __init__(self, config: VaeConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        require(
            data.image_size % config.factor == 0,
            "data.image_size",
            data.image_size,
            f"must be a multiple of the model's {config.factor} pixels",
        )
        sizes = (config.widths, config.stem, config.depth, config.latent_channels, data.channels)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_square", torch.ones(config.latent_channels))
        self.perceptual = build_distance(config.perceptual, config.perceptual_path)
        # The terms of the loss determine which frozen networks there are.
        self.external = (
            {"perceptual": Pretrained("perceptual loss", "train", config.perceptual)} if self.perceptual else {}
        )
        self.discriminator = (
            PatchDiscriminator(data.channels, config.discriminator_widths) if config.adversarial else None
        )
        self.schedule_gan(self.discriminator is not None, config.adversarial_start, config.adversarial_start)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        x = batch["image"]
        if phase == "discriminator":
            with torch.no_grad():
                _, _, z, augmentation = self.draw(x)
                y = quantise(self.decoder(z))
            return {"loss": self.discriminator_loss(x, y, augmentation)}
        mean, std, z, augmentation = self.draw(x)
        if self.training:
            self.follow(mean, std)
        return self.objective(x, z, mean, std, augmentation)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Augmentation]:
        """Mean and std of the posterior of images x (B, 3, S, S), one draw z from it, and the augmentation.

        mean, std and z are (B, C, h, h).
        """
        mean, std = self.encoder(x)
        z = mean + std * torch.randn_like(mean)
        return mean, std, z, draw_augmentation(len(x), x.shape[-1], x.device)

    def objective(
        self, x: Tensor, z: Tensor, mean: Tensor, std: Tensor, augmentation: Augmentation
    ) -> dict[str, Tensor]:
        """The autoencoder's loss and its active terms, for images x (B, 3, S, S) and draws z (B, C, h, h)."""
        y = self.decoder(z)
        terms = {"l1": (y - x).abs().mean(), "kl": gaussian_kl(mean, std).sum() / x.numel()}
        loss = terms["l1"] + self.config.kl * terms["kl"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(y, x).mean()
            loss = loss + self.config.perceptual_weight * terms["perceptual"]
        if self.adversarial_active:
            assert self.discriminator is not None
            with evaluating(self.discriminator):
                terms["adversarial"] = hinge_generator(self.discriminator(augment(y, augmentation)))
            weight = adaptive_weight(loss, terms["adversarial"], self.decoder.last.weight)
            loss = loss + self.config.adversarial * weight * terms["adversarial"]
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def discriminator_loss(self, x: Tensor, y: Tensor, augmentation: Augmentation) -> Tensor:
        """The discriminator's hinge loss on real and reconstructed images, which get the same augmentation."""
        assert self.discriminator is not None
        return hinge_discriminator(
            self.discriminator(augment(x, augmentation)), self.discriminator(augment(y, augmentation))
        )

    @torch.no_grad()
    def follow(self, mean: Tensor, std: Tensor) -> None:
        """Moves the running first and second moments of each latent channel towards those of the batch.

        They are the moments of draws from the posterior.
        """
        self.latent_mean.lerp_(mean.mean(dim=(0, 2, 3)), STATISTICS_RATE)
        self.latent_square.lerp_((mean.square() + std.square()).mean(dim=(0, 2, 3)), STATISTICS_RATE)

    @torch.no_grad()
    def after_training(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """The moments with which a tokenizer will normalise latents.

        They are measured as the tokenizer computes: with the averaged weights that are evaluated, in float32.
        """
        wanted, seen = min(self.data.num_train, MEASURED_IMAGES), 0
        sums = torch.zeros(2, len(self.latent_mean), dtype=torch.float64, device="cpu")
        while seen < wanted:
            images = next(batches)["image"][: wanted - seen]
            with without_autocast(images):
                mean, std = self.encoder(images)
            moments = torch.stack((mean, mean.square() + std.square())).mean(dim=(3, 4))
            sums += moments.cpu().double().sum(dim=1)
            seen += len(images)
        return dict(zip(("latent_mean", "latent_square"), sums / wanted, strict=True))

    def parameters_of(self, phase: str) -> list[ParamGroup]:
        names = ("discriminator.",) if phase == "discriminator" else ("encoder.", "decoder.")
        return [ParamGroup([p for name, p in self.named_parameters() if name.startswith(names)])]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name.startswith(("encoder.", "decoder."))}

    # -- use -----------------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean, not normalised."""
        mean: Tensor = self.encoder(images)[0]
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.decoder(latents)
        return images

    def sampling_networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def evaluations(self, config: VaeSample) -> int:
        return 0

    def describe(self, config: VaeSample) -> Description:
        return Description(prediction="x", loss_space="x", sampler="none", steps=0, pretrained=self.components())


def gaussian_kl(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) in nats for each number; tensors of any shape."""
    return 0.5 * (mean.square() + std.square() - 1) - std.log()
