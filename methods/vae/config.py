"""The KL autoencoder's settings. Torch-free, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pixlat.common.config.resolve import one_of, require
from pixlat.methods import MethodSpec

GROUP = 8  # channels that share a norm


@dataclass
class VaeConfig:
    """The two networks and the terms of the loss, each relative to the mean absolute error of a pixel in [-1, 1]."""

    #: channels of each level, fine to coarse; levels differ by a factor of 2
    widths: list[int] = field(default_factory=lambda: [64, 128])
    stem: int = 2  # pixels a side that the first level takes together
    depth: int = 2  # residual blocks a level, in the encoder and in the decoder
    latent_channels: int = 8
    kl: float = 1e-3  # weight of the nats, counted per number of the image
    perceptual: str = "embedded"  # none | embedded (EfficientNet-Lite0, in the package) | lpips | convnext
    perceptual_weight: float = 0.1
    perceptual_path: str | None = None  # file of the perceptual network's weights; none: the usual caches
    adversarial: float = 0.0  # share of the discriminator's pull on the last layer; 0: no discriminator
    adversarial_start: int = 0  # training images after which it is trained and part of the loss
    #: channels of its layers; each but the first halves the side
    discriminator_widths: list[int] = field(default_factory=lambda: [32, 64, 128])

    def __post_init__(self) -> None:
        require(len(self.widths) > 0, "model.widths", self.widths, "needs at least one level")
        for width in self.widths:
            require(
                width > 0 and width % GROUP == 0,
                "model.widths",
                self.widths,
                f"every width must be a multiple of {GROUP}",
            )
        for name in ("stem", "latent_channels"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        for name in ("depth", "kl", "perceptual_weight", "adversarial", "adversarial_start"):
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must be 0 or more")
        one_of("model.perceptual", self.perceptual, ("none", "embedded", "lpips", "convnext"))

    @property
    def factor(self) -> int:
        """Pixels a side of one latent position."""
        return self.stem * 2 ** (len(self.widths) - 1)


@dataclass
class VaeSample:
    """Nothing is sampled: images go through the encoder's mean and the decoder."""


SPEC = MethodSpec(
    name="vae",
    title="KL autoencoder: the tokenizer of sit, repa, reg and dit, trained on your own images",
    paper="Auto-Encoding Variational Bayes (arXiv 1312.6114)",
    implementation="pixlat.methods.vae.method:VaeMethod",
    config=VaeConfig,
    sample=VaeSample,
    presets=str(Path(__file__).with_name("presets.yaml")),
)
