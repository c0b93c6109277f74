"""DSD's objective and sampler (arXiv 2511.14716): diffusion as self-distillation of an online encoder from its average.

As everywhere in `common/`, t = 1 is noise. The paper counts the other way, so the network receives 1 - t and its
velocity points towards the data. README.md lists our decisions where the paper leaves a question open.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.config.resolve import patches_a_side, require
from pixlat.common.errors import UserError
from pixlat.common.frozen.encoders import build_encoder
from pixlat.common.frozen.perceptual import build_distance
from pixlat.common.frozen.remember import FeatureTable
from pixlat.common.frozen.representation import RepresentationEncoder
from pixlat.common.gan_phases import GanPhases
from pixlat.common.layers.discriminators import PatchDiscriminator, evaluating
from pixlat.common.layers.dit import projector
from pixlat.common.layers.transformer import drop_labels
from pixlat.common.maths import flow
from pixlat.common.maths.adversarial import augment, draw_augmentation, hinge_discriminator, hinge_generator, quantise
from pixlat.common.maths.guidance import classifier_free
from pixlat.common.maths.samplers import euler, euler_maruyama, heun, solver_evaluations
from pixlat.common.maths.spectrum import between_images, effective_rank, latent_health
from pixlat.common.seeds import Noise
from pixlat.methods.base import Batch, DataInfo, Description, Method, ParamGroup, Pretrained, guidance_facts
from pixlat.methods.dsd.config import DsdConfig, DsdSample
from pixlat.methods.dsd.network import DecodePass, Denoised, DsdNetwork, Encoded
from pixlat.methods.dsd.objective import (
    SPACES,
    Draws,
    decoder_input,
    diffusion_loss,
    disagreement,
    draw_hidden,
    noised,
    velocity_loss,
)

# A run warns of collapse below either bound; naive training falls below them.
LEAST_SPREAD = 0.15  # the latents' standard deviation between images, relative to their scale
LEAST_RANK = 0.2  # the latents' effective rank, as a share of the channels
LETTERS = {(20, 384): "S", (26, 576): "M", (25, 768): "B"}  # sizes by (depth, width); the names are ours


class DsdMethod(GanPhases, Method):
    """One network in three roles, the average of its encoder as the target, and the heads that only training needs."""

    space = "latent_self"

    def __init__(self, config: DsdConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.side = patches_a_side(data.image_size, config.patch)
        self.network = DsdNetwork(config, data.image_size, data.channels, data.num_classes)
        self.decoder = DecodePass(self.network)
        self.target_encoder = copy.deepcopy(self.network.encoder).requires_grad_(False) if config.ema else None
        self.predictor = mlp(config.width, config.projector_width, config.width) if config.self_weight else None
        self.classifier = nn.Linear(config.width, data.num_classes) if config.cls_weight else None
        self.teacher, self.projector = self.build_teacher()
        self.features_of = FeatureTable(
            lambda images: (self.teacher_targets(images),),
            data.num_train if config.remember and self.teacher is not None else 0,
        )
        self.perceptual = build_distance(config.perceptual, config.perceptual_path)
        self.discriminator = (
            PatchDiscriminator(data.channels, config.discriminator_widths) if config.gan_weight else None
        )
        # The terms of the loss determine which frozen networks there are.
        self.external = {
            name: Pretrained(name, "train") for name in ("teacher", "perceptual") if getattr(self, name) is not None
        }
        self.schedule_gan(self.discriminator is not None, config.gan_start, config.gan_start)

    def build_teacher(self) -> tuple[RepresentationEncoder | None, nn.Module | None]:
        """The frozen encoder for the alignment, without its weights, and the map of our features to its tokens."""
        config = self.config
        if config.align == "none" or not config.align_weight:
            return None, None
        teacher = build_encoder(config.align, config.align_path).requires_grad_(False)
        grid = teacher.grid(self.data.image_size)
        fits = (
            f"gives {self.side} x {self.side} tokens, which must divide the {grid} x {grid} "
            f"of the encoder model.align={config.align}"
        )
        require(grid % self.side == 0, "model.patch", config.patch, fits)
        self.pool = grid // self.side  # one of our tokens covers pool x pool of the teacher's
        return teacher, projector(config.width, config.projector_width, teacher.channels)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        images, draws = batch["image"], self.draw(batch)
        if phase == "discriminator":
            return self.discriminator_loss(images, draws)
        taught = self.features_of(batch)[0] if self.teacher is not None else None
        return self.objective(images, batch["label"], draws, taught, step % self.config.health_every == 0)

    def draw(self, batch: Batch) -> Draws:
        """Draws everything random of a step for each image of a batch."""
        config, images = self.config, batch["image"]
        count, device, shape = len(images), images.device, (len(images), self.side**2, self.config.latent_channels)
        labels = drop_labels(batch["label"], config.label_drop, self.data.num_classes)
        tau = config.noise_max * torch.rand(count, device=device)
        return Draws(
            hidden=draw_hidden(config.mask_ratio, count, self.side**2, device) if config.mask else None,
            labels=labels,
            t=torch.rand(count, device=device)
            if config.time == "uniform"
            else flow.logit_normal(0.0, 1.0, count, device=device),
            noise=torch.randn(shape, device=device),
            tau=tau.masked_fill(torch.rand(count, device=device) < config.clean_share, 0.0),
            decode_noise=torch.randn(shape, device=device),
            augmentation=draw_augmentation(count, self.data.image_size, device)
            if self.discriminator is not None
            else None,
        )

    def objective(
        self, images: Tensor, classes: Tensor, draws: Draws, taught: Tensor | None, measure: bool = False
    ) -> dict[str, Tensor]:
        """The weighted sum of all terms, and each term.

        images (B, 3, S, S), classes (B,), taught: the teacher's tokens (B, N, C'). measure: also rank and spread of the
        latents.
        """
        online = self.network.encoder(images, draws.hidden)
        clean = self.target_of(images, online)
        denoised = self.denoise(noised(self.config, online.z, draws.noise, draws.t), draws.t, draws.labels)
        terms = {
            "diffusion": diffusion_loss(self.config, denoised.output, clean.z, draws.noise),
            "velocity": velocity_loss(denoised.velocity, clean.z, draws.noise),
            **self.reconstruction_terms(images, online.z, draws),
            **self.feature_terms(classes, online, denoised, clean, taught),
        }
        loss = torch.stack([self.weight_of(name) * term for name, term in terms.items()]).sum()
        out = {"loss": loss, **{name: term.detach() for name, term in terms.items()}}
        if measure and len(images) > 1:  # differences between images need two of them
            rank = effective_rank(between_images(denoised.output.detach()))
            out |= latent_health(clean.z.detach()) | {"erank_predicted": rank.float()}
        return out

    def target_of(self, images: Tensor, online: Encoded) -> Encoded:
        """The target's encoding of the images without mask: by the average or, without one, by the online encoder."""
        if self.target_encoder is None and not self.config.mask:
            return online
        with torch.set_grad_enabled(self.config.target == "live"):
            encoded: Encoded = (self.target_encoder or self.network.encoder)(images)
        return encoded

    def denoise(self, z: Tensor, t: Tensor, labels: Tensor) -> Denoised:
        """The outputs of both heads in our convention: t = 1 is noise, and velocities point towards the noise."""
        heads = self.network.denoise(z, 1 - t, labels)
        output = -heads.output if self.config.predict == "v" else heads.output
        return heads._replace(output=output, velocity=-heads.velocity)

    def reconstruction_terms(self, images: Tensor, z1: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Squared error, perceptual distance and adversarial term of images decoded from noisy latents.

        The latents z1 are those of the masked images.
        """
        rebuilt = self.network.decode(decoder_input(self.config, z1, draws.tau, draws.decode_noise))
        terms = {"reconstruction": (rebuilt - images).square().mean()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(rebuilt, images).mean()
        if self.adversarial_active:
            assert self.discriminator is not None and draws.augmentation is not None
            with evaluating(self.discriminator):
                terms["gan"] = hinge_generator(self.discriminator(augment(rebuilt, draws.augmentation)))
        return terms

    def feature_terms(
        self, classes: Tensor, online: Encoded, denoised: Denoised, clean: Encoded, taught: Tensor | None
    ) -> dict[str, Tensor]:
        """Alignment of shallow features, self-distillation of last features, and classification.

        The first two are means over the encoder's pass and the denoiser's pass.
        """
        terms = {}
        passes = (online.features, denoised.features)
        if self.projector is not None and taught is not None:
            terms["align"] = torch.stack(
                [disagreement(self.projector(features.shallow), taught) for features in passes]
            ).mean()
        if self.predictor is not None:
            terms["self"] = torch.stack(
                [disagreement(self.predictor(features.last), clean.features.last) for features in passes]
            ).mean()
        if self.classifier is not None:
            logits = self.classifier(online.features.last.mean(dim=1))
            terms["cls"] = F.cross_entropy(logits, classes, label_smoothing=self.config.label_smoothing)
        return terms

    def weight_of(self, term: str) -> float:
        """The weight of a term in the loss."""
        config = self.config
        weights = {
            "diffusion": 1.0,
            "velocity": config.velocity_weight,
            "reconstruction": config.rec_weight,
            "align": config.align_weight,
        }
        weights |= {
            "perceptual": config.rec_weight * config.perceptual_weight,
            "gan": config.rec_weight * config.gan_weight,
        }
        weights |= {"self": config.self_weight, "cls": config.cls_weight}
        return weights[term]

    def discriminator_loss(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The discriminator's hinge loss on images and on their reconstructions from noisy latents.

        Reconstructions are rounded to 8 bits, and both get the same augmentation.
        """
        assert self.discriminator is not None and draws.augmentation is not None
        with torch.no_grad():
            z1 = self.network.encoder(images, draws.hidden).z
            rebuilt = quantise(self.network.decode(decoder_input(self.config, z1, draws.tau, draws.decode_noise)))
        real, fake = (self.discriminator(augment(x, draws.augmentation)) for x in (images, rebuilt))
        return {"loss": hinge_discriminator(real, fake), "real": real.mean().detach(), "fake": fake.mean().detach()}

    @torch.no_grad()
    def teacher_targets(self, images: Tensor) -> Tensor:
        """The teacher's tokens, averaged to our grid, (B, N, C')."""
        assert self.teacher is not None
        return F.avg_pool2d(self.teacher(images), self.pool).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Moves the target's encoder towards the online one.

        This average is part of the loss. The averages for sampling belong to the trainer.
        """
        if self.target_encoder is None:
            return
        averages, values = (tuple(encoder.parameters()) for encoder in (self.target_encoder, self.network.encoder))
        torch._foreach_lerp_(averages, values, 1 - momentum(self.config, step))

    def alarms(self, means: Mapping[str, float]) -> dict[str, str]:
        health = {name.rpartition("/")[2]: value for name, value in means.items()}
        if "erank" not in health:
            return {}
        if health["std_between"] >= LEAST_SPREAD * health["latent_rms"] and health["erank_share"] >= LEAST_RANK:
            return {}
        facts = (
            f"effective rank {health['erank']:.2f} of {self.config.latent_channels}, "
            f"std between images {health['std_between']:.3f} of {health['latent_rms']:.3f}"
        )
        cure = "Keep model.target=stopgrad, model.predict=z and model.ema=true, or raise model.rec_weight"
        return {"collapse": f"the latents are collapsing: {facts}. {cure}."}

    def parameters_of(self, phase: str) -> list[ParamGroup]:
        if phase == "discriminator":
            assert self.discriminator is not None
            return [
                ParamGroup(list(self.discriminator.parameters()), lr_scale=self.config.gan_lr_scale, betas=(0.5, 0.9))
            ]
        outside = ("discriminator.", *(f"{name}." for name in self.external))
        return [
            ParamGroup([p for name, p in self.named_parameters() if p.requires_grad and not name.startswith(outside)])
        ]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        return {f"network.{name}": p for name, p in self.network.named_parameters()}

    def blocks(self) -> list[nn.Module]:
        network = self.network
        return [*network.encoder.trunk.blocks, *network.diffusion_head.blocks, *network.velocity_head.blocks]

    def frozen_blocks(self) -> list[nn.Module]:
        return [] if self.target_encoder is None else list(self.target_encoder.trunk.blocks)

    def probe(self, images: Tensor, time: float) -> None:
        """One denoising pass of trunk and heads without classes, for callers with hooks on the blocks.

        The hooks do not run while the trunk encodes the clean images.
        """
        z = self.network.encoder(images, with_hooks=False).z
        t = torch.full((len(z),), time, device=z.device)
        self.denoise(
            flow.interpolate(z, torch.randn_like(z), t),
            t,
            torch.full((len(z),), self.data.num_classes, device=z.device),
        )

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, labels: Tensor, noise: Noise, config: DsdSample) -> Tensor:
        z = noise.normal(self.side**2, self.config.latent_channels)
        times = [1 - step / config.steps for step in range(config.steps + 1)]

        def velocity(z: Tensor, t: float) -> Tensor:
            return self.velocity(z, t, labels, config)

        # v - w score / 2 with w = diffusion t and score = -((1 - t) v + z) / t
        def drift(z: Tensor, t: float) -> Tensor:
            v = velocity(z, t)
            return v if t == times[-2] else v + config.diffusion / 2 * ((1 - t) * v + z)

        if config.solver == "sde":
            z = euler_maruyama(drift, lambda t: config.diffusion * t, z, times, noise)
        else:
            z = (heun if config.solver == "heun" else euler)(velocity, z, times)
        return self.decoder(z)

    def velocity(self, z: Tensor, t: float, labels: Tensor, config: DsdSample) -> Tensor:
        """The guided velocity dz/dt. Guidance acts on the head's output, and the velocity is affine in that output."""

        def predict(z: Tensor, labels: Tensor) -> Tensor:
            return self.network(z, torch.full((len(z),), 1 - t, device=z.device), labels, config.head)

        guided = config.interval[0] <= 1 - t <= config.interval[1]
        output = classifier_free(predict, z, labels, self.data.num_classes, config.guidance if guided else 1.0)
        if config.head == "velocity" or self.config.predict == "v":
            return -output
        return flow.to_velocity(output, SPACES["z"], z, t, config.clip)

    def evaluations(self, config: DsdSample) -> int:
        return solver_evaluations(config.solver, config.steps)

    def sampling_networks(self) -> dict[str, nn.Module]:
        return {"network": self.network, "decoder": self.decoder}

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images (B, 3, S, S) to latents (B, C, S / p, S / p).

        It uses the network's own encoder, as sampling does; the target's encoder is for training alone.
        """
        return self.network.encoder(images).z.transpose(1, 2).unflatten(2, (self.side, self.side))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents.flatten(2).transpose(1, 2))

    def describe(self, config: DsdSample) -> Description:
        letter = LETTERS.get((self.config.depth, self.config.width))
        return Description(
            prediction=SPACES[self.config.predict],
            loss_space=SPACES[self.config.predict],
            sampler=f"{config.solver}, {config.head} head",
            steps=config.steps,
            **guidance_facts(config),
            size=f"{letter}/{self.config.patch}" if letter else None,
            variant=variant(self.config),
            pretrained=self.components(),
        )

    def from_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise UserError("no released weights of DSD are known. Give run= or checkpoint= of a run of this suite.")


def mlp(width: int, hidden: int, outputs: int) -> nn.Sequential:
    """The predictor of self-distillation: two layers."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def momentum(config: DsdConfig, step: int) -> float:
    """The momentum of the target's average at a step: a half cosine from `ema_momentum` to `ema_momentum_end`."""
    if not config.ema_steps:
        return config.ema_momentum
    progress = min(1.0, step / config.ema_steps)
    return config.ema_momentum_end - (config.ema_momentum_end - config.ema_momentum) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def variant(config: DsdConfig) -> str | None:
    """The ablation switches that differ from the full method, as text; None if none differs."""
    full = DsdConfig()
    names = ("target", "predict", "ema", "mask", "input_grad", "latent_norm", "velocity_head_detach", "velocity_latent")
    changed = [f"{name}={getattr(config, name)}" for name in names if getattr(config, name) != getattr(full, name)]
    return ", ".join(changed) or None
