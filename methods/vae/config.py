"""The KL autoencoder's settings. The module does not import torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pixlat.common.config.resolve import one_of, require
from pixlat.methods import MethodSpec

GROUP = 8  # channels that share a norm


@dataclass
class VaeConfig:
    """The two networks and the terms of the loss, each relative to the mean absolute error of a pixel in [-1, 1]."""

    #: channels of each level, from fine to coarse; each level halves the side of the one before
    widths: list[int] = field(default_factory=lambda: [64, 128])
    stem: int = 2  # side in pixels of the patches that the first level starts from
    depth: int = 2  # residual blocks of each level, in the encoder and in the decoder
    latent_channels: int = 8
    kl: float = 1e-3  # weight of the KL divergence, in nats for each number of the image
    perceptual: str = "embedded"  # none | embedded (EfficientNet-Lite0, in the package) | lpips | convnext
    perceptual_weight: float = 0.1
    perceptual_path: str | None = None  # file of the perceptual network's weights; none: the usual caches
    #: norm of the adversarial gradient at the last layer, relative to the other terms' gradient; 0: no discriminator
    adversarial: float = 0.0
    #: training images after which the discriminator trains and the loss has the adversarial term
    adversarial_start: int = 0
    #: channels of the discriminator's layers; each layer but the first halves the side
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
        """Side of a latent position in pixels."""
        return self.stem * 2 ** (len(self.widths) - 1)


@dataclass
class VaeSample:
    """No keys, because an autoencoder does not sample: it encodes images to the posterior's mean and decodes that."""


SPEC = MethodSpec(
    name="vae",
    title="KL autoencoder: the tokenizer of sit, repa, reg and dit, trained on your own images",
    paper="Auto-Encoding Variational Bayes (arXiv 1312.6114)",
    implementation="pixlat.methods.vae.method:VaeMethod",
    config=VaeConfig,
    sample=VaeSample,
    presets=str(Path(__file__).with_name("presets.yaml")),
)
