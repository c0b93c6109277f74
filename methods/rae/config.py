"""Settings of both stages.

This module does not import torch, so that `--help` is quick. presets_decoder.yaml and presets.yaml hold the published
recipes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pixlat.common.config.resolve import checked_interval, one_of, require
from pixlat.methods import MethodSpec, Stage


class DecoderShape(NamedTuple):
    """Sizes of a ViT decoder; the image and the encoder's grid determine its patch size."""

    width: int
    depth: int
    heads: int
    hidden: int  # hidden width of the MLPs


DECODERS = {
    "b": DecoderShape(768, 12, 12, 3072),
    "l": DecoderShape(1024, 24, 16, 4096),
    "xl": DecoderShape(1152, 28, 16, 4096),  # not 4 * 1152
    "demo": DecoderShape(192, 4, 3, 768),
}


class NetworkShape(NamedTuple):
    """Sizes of a DiT-DH; without a head (head_depth 0) it is a LightningDiT."""

    width: int
    depth: int
    heads: int
    head_width: int
    head_depth: int
    head_heads: int


# -- stage 1 -----------------------------------------------------------------------------------------------------------


@dataclass
class DecoderConfig:
    """Settings of the decoder of a frozen encoder's latents, and of its losses."""

    encoder: str = "dinov2-reg-b"  # frozen encoder; common/frozen/encoders.py lists the names
    encoder_weights: str | None = None  # folder or file of the encoder's weights; none: the library's cache
    size: str = "xl"  # size of the decoder: b | l | xl | demo
    #: largest (uniform) or typical (halfnormal) standard deviation of the noise on the latents in training; 0: none
    noise: float = 0.8
    #: distribution of the noise's standard deviation over images: uniform (released code) | halfnormal (paper)
    noise_distribution: str = "uniform"
    perceptual: str = "lpips"  # lpips | embedded | none
    perceptual_weights: str | None = None  # file of the perceptual network's weights; none: the library's cache
    perceptual_scale: float = 1.0  # weight of the perceptual loss
    discriminator: str = "dino"  # dino (heads on a frozen DINO ViT-S/8) | light (a small convolutional network) | none
    discriminator_weights: str | None = None  # folder of the DINO weights; none: the library's cache
    gan_scale: float = 0.75  # factor of the adversarial loss, in addition to its adaptive weight
    gan_start: int = 0  # images seen after which the decoder's loss includes the adversarial term
    discriminator_start: int = 0  # images seen after which the discriminator is trained; at most gan_start
    remember: bool = False  # cache the latents of every training image in memory, so that each is encoded once

    def __post_init__(self) -> None:
        one_of("model.size", self.size, tuple(DECODERS))
        one_of("model.noise_distribution", self.noise_distribution, ("uniform", "halfnormal"))
        one_of("model.perceptual", self.perceptual, ("lpips", "embedded", "none"))
        one_of("model.discriminator", self.discriminator, ("dino", "light", "none"))
        for name in ("noise", "perceptual_scale", "gan_scale", "gan_start", "discriminator_start"):
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must be 0 or more")
        ordered = self.discriminator_start <= self.gan_start
        require(
            ordered,
            "model.discriminator_start",
            self.discriminator_start,
            f"must not be after model.gan_start={self.gan_start}",
        )


@dataclass
class DecoderSample:
    """This stage samples nothing; its evaluation reconstructs held-out images."""


DECODER_SPEC = MethodSpec(
    name="rae_decoder",
    title="RAE, stage 1: a ViT decoder of a frozen representation encoder's tokens",
    paper="Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690)",
    implementation="pixlat.methods.rae.decoder:DecoderMethod",
    config=DecoderConfig,
    sample=DecoderSample,
    presets=str(Path(__file__).with_name("presets_decoder.yaml")),
)


# -- stage 2 -----------------------------------------------------------------------------------------------------------


@dataclass
class RaeConfig:
    """Settings of the latents, the network and its objective. Image size and class count come from the data."""

    #: run folder of method=rae_decoder | released model.pt | folder of diffusers' AutoencoderRAE
    #: | train: train it first
    decoder: str = "train"
    decoder_size: str = "xl"  # b | l | xl | demo
    encoder: str = "dinov2-reg-b"  # the encoder that the decoder was trained for
    encoder_weights: str | None = None  # folder or file of the encoder's weights; none: the library's cache
    #: latent statistics: exact | momentum (the authors' script), both measured before training | a released stat.pt
    statistics: str = "exact"
    stat_images: int = 50_000  # training images over which the statistics are measured
    width: int = 1152  # width of the backbone
    depth: int = 28
    heads: int = 16
    head_width: int = 2048  # should be at least the number of latent channels, see README.md
    head_depth: int = 2  # blocks of the wide head; 0: none, a plain LightningDiT
    head_heads: int = 16
    init: str = "official"  # official (as in the released code) | xavier (a DiT-DH initialised as a LightningDiT)
    #: run folder or released file of a weaker model for autoguidance; none: guidance is classifier-free
    guide: str | None = None
    guide_width: int = 384  # width of the weaker model; its head is the same as here
    guide_depth: int = 12  # depth of the weaker model
    guide_heads: int = 6  # attention heads of the weaker model
    shift_base: int = 4096  # number of values in a latent at which times are not shifted; 0: never shift
    time: str = "logit_normal"  # before the shift: logit_normal (released GPU code) | uniform (earlier releases)
    label_drop: float = 0.1  # probability of training without the class
    remember: bool = False  # cache the latents of every training image in memory, so that each is encoded once

    def __post_init__(self) -> None:
        for name in (
            "width",
            "depth",
            "heads",
            "head_width",
            "head_heads",
            "guide_width",
            "guide_depth",
            "guide_heads",
            "stat_images",
        ):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        for name in ("head_depth", "shift_base"):
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must be 0 (off) or more")
        require(0 <= self.label_drop <= 1, "model.label_drop", self.label_drop, "is a probability, so between 0 and 1")
        require(
            self.guide != "train",
            "model.guide",
            self.guide,
            "must be a run folder or a released file; train the weaker model as a run of its own",
        )
        one_of("model.decoder_size", self.decoder_size, tuple(DECODERS))
        one_of("model.init", self.init, ("official", "xavier"))
        one_of("model.time", self.time, ("logit_normal", "uniform"))
        for stack in ("", "head_", "guide_"):
            width, heads = getattr(self, f"{stack}width"), getattr(self, f"{stack}heads")
            rule = f"must divide model.{stack}width={width} into heads of a multiple of 4 channels, for RoPE"
            require(width % heads == 0 and width // heads % 4 == 0, f"model.{stack}heads", heads, rule)

    @property
    def shape(self) -> NetworkShape:
        """The sizes of the network."""
        return NetworkShape(self.width, self.depth, self.heads, self.head_width, self.head_depth, self.head_heads)

    @property
    def guide_shape(self) -> NetworkShape:
        """The sizes of the weaker model."""
        return NetworkShape(
            self.guide_width, self.guide_depth, self.guide_heads, self.head_width, self.head_depth, self.head_heads
        )


@dataclass
class RaeSample:
    """Settings of the Euler sampler. The defaults are those of the released code, without guidance."""

    steps: int = 49  # network evaluations
    ending: str = "official"  # official: the unshifted times go from 1 to 0.001 | clean: to 0
    guidance: float = 1.0  # 1: off
    interval: tuple[float, float] = (0.0, 1.0)  # shifted times (1 = noise) at which guidance is on, ends included

    def __post_init__(self) -> None:
        require(self.steps >= 1, "sample.steps", self.steps, "must be at least 1")
        require(self.guidance >= 1, "sample.guidance", self.guidance, "must be 1 (off) or more")
        self.interval = checked_interval("sample.interval", self.interval)
        one_of("sample.ending", self.ending, ("official", "clean"))


SPEC = MethodSpec(
    name="rae",
    title="RAE + DiT-DH: flow matching in the tokens of a frozen representation encoder",
    paper="Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690)",
    implementation="pixlat.methods.rae.method:RaeMethod",
    config=RaeConfig,
    sample=RaeSample,
    presets=str(Path(__file__).with_name("presets.yaml")),
    stages=(Stage("decoder", "rae_decoder"), Stage("guide", "rae")),
    released="pixlat.methods.rae.reference:open_released",
)
