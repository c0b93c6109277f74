"""DSD's settings. README.md says which values are the paper's and which are ours.

The module does not import torch, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pixlat.common.config.resolve import checked_interval, one_of, require
from pixlat.methods import MethodSpec


@dataclass
class DsdConfig:
    """The network, its objective and the switches of the ablations. The data give image size and class count."""

    depth: int = 25  # blocks of the trunk
    width: int = 768
    heads: int = 12
    patch: int = 16  # side of a token in pixels; one token of the image is one token of the latents
    latent_channels: int = 32  # channels of a token's latent
    head_depth: int = 1  # blocks of the diffusion head, and of the velocity head
    #: norm of the latents: ln (each token over its channels, no affine) | bn (each channel over the batch) | none
    latent_norm: str = "ln"
    label_drop: float = 0.1  # probability that training replaces a label by "no class"
    time: str = "uniform"  # distribution of training times: uniform | logit_normal, which is logit_normal(0, 1)
    # Self-distillation, and the switches of the ablations.
    target: str = "stopgrad"  # gradient of the target's latent: stopgrad (none) | live (gradients flow into it)
    predict: str = "z"  # output of the diffusion head and space of its loss: z (clean latent) | v (velocity)
    ema: bool = True  # an average of the encoder makes the target
    ema_momentum: float = 0.996  # momentum of that average in each step
    ema_momentum_end: float = 1.0  # momentum at the end of a half cosine
    ema_steps: int = 0  # length of that half cosine; 0: the momentum stays ema_momentum
    mask: bool = True  # hide patches from the online encoder; the target's encoder sees all patches
    #: the hidden share of an image is uniform between these numbers; a negative share hides nothing
    mask_ratio: tuple[float, float] = (-0.1, 0.7)
    input_grad: bool = True  # gradients of the diffusion loss reach the encoder through the noisy latent
    velocity_head_detach: bool = True  # gradients of the velocity head's loss do not reach the trunk
    #: the velocity head gets the noisy latent beside the trunk's features, which may have lost the noise
    velocity_latent: bool = False
    # Reconstruction.
    rec_weight: float = 1.0  # common factor of all three terms
    clean_share: float = 0.5  # share of latents that the decoder gets without noise
    noise_max: float = 0.5  # the decoder gets the others as (1 - tau) z + tau noise_scale n, tau uniform up to this
    noise_scale: float = 1.0  # scale of that noise
    perceptual: str = "lpips"  # lpips | embedded (EfficientNet-Lite0, needs no download) | none
    perceptual_weight: float = 1.0
    perceptual_path: str | None = None  # file of the perceptual network's weights; none: the library's cache
    gan_weight: float = 0.1  # weight of the adversarial term; 0: no discriminator
    gan_start: int = 0  # training images after which the discriminator trains and the loss has the adversarial term
    gan_lr_scale: float = 1.0  # the discriminator's learning rate relative to train.lr
    #: channels of the discriminator's layers; each layer but the first halves the side
    discriminator_widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    # Other terms; a weight of 0 leaves the term and its layers out.
    velocity_weight: float = 1.0
    #: frozen encoder, the teacher, with whose tokens shallow features are aligned (common/frozen); none: off
    align: str = "timm-dinov3-b"
    align_path: str | None = None  # file or folder of the teacher's weights; none: the usual caches
    align_weight: float = 0.5
    align_after: int | None = None  # number of the aligned block, counted from 1; none: a third of the depth
    self_weight: float = 0.5  # weight of the alignment of the last features with those of the target's encoder
    cls_weight: float = 0.1  # weight of the classification of the encoder's mean feature
    label_smoothing: float = 0.1
    projector_width: int = 2048
    #: cache the teacher's tokens for each training image in memory, so that the teacher runs once for each
    remember: bool = False
    health_every: int = 50  # steps between measurements of the latents' rank and spread

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch", "head_depth", "projector_width", "health_every"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        require(self.latent_channels >= 2, "model.latent_channels", self.latent_channels, "must be at least 2")
        for name in ("label_drop", "ema_momentum", "ema_momentum_end", "clean_share", "noise_max", "label_smoothing"):
            require(0 <= getattr(self, name) <= 1, f"model.{name}", getattr(self, name), "must lie between 0 and 1")
        for name in (
            "ema_steps",
            "rec_weight",
            "noise_scale",
            "perceptual_weight",
            "gan_weight",
            "gan_start",
            "align_weight",
            "self_weight",
            "cls_weight",
        ):
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must be 0 or more")
        for name in ("velocity_weight", "gan_lr_scale"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        require(self.width % self.heads == 0, "model.heads", self.heads, f"must divide model.width={self.width}")
        require(self.width % 4 == 0, "model.width", self.width, "must be a multiple of 4 for the 2-D position table")
        one_of("model.latent_norm", self.latent_norm, ("ln", "bn", "none"))
        one_of("model.time", self.time, ("uniform", "logit_normal"))
        one_of("model.target", self.target, ("stopgrad", "live"))
        one_of("model.predict", self.predict, ("z", "v"))
        one_of("model.perceptual", self.perceptual, ("lpips", "embedded", "none"))
        alive = self.target == "stopgrad" or not self.ema
        require(alive, "model.target", self.target, "needs model.ema=false: no gradient flows into an average")
        low, high = self.mask_ratio
        require(low <= high <= 1, "model.mask_ratio", (low, high), "must be two numbers in order, the second at most 1")
        inside = 1 <= self.aligned_block <= self.depth
        require(
            inside,
            "model.align_after",
            self.align_after,
            f"must be the number of one of the {self.depth} blocks, from 1",
        )

    @property
    def aligned_block(self) -> int:
        """Number of the block whose output is aligned, counted from 1."""
        return max(1, round(self.depth / 3)) if self.align_after is None else self.align_after


@dataclass
class DsdSample:
    """The sampler. Its times are the paper's: 1 is data."""

    steps: int = 250
    solver: str = "euler"  # euler | heun (the last step is Euler's) | sde (Euler-Maruyama; the last step is the ODE's)
    #: velocity (the velocity head) | latent (the velocity that follows from the diffusion head's clean latent)
    head: str = "velocity"
    diffusion: float = 1.0  # sde: the noise has variance rate diffusion * (1 - time)
    clip: float = 0.05  # head=latent: smallest 1 - time by which the sampler divides
    guidance: float = 1.0  # 1: off
    interval: tuple[float, float] = (0.0, 1.0)  # times at which guidance is on, ends included

    def __post_init__(self) -> None:
        require(self.steps >= 1, "sample.steps", self.steps, "must be at least 1")
        require(self.diffusion >= 0, "sample.diffusion", self.diffusion, "must be 0 or more")
        require(self.clip > 0, "sample.clip", self.clip, "must be positive")
        require(self.guidance >= 1, "sample.guidance", self.guidance, "must be 1 (off) or more")
        self.interval = checked_interval("sample.interval", self.interval)
        one_of("sample.solver", self.solver, ("euler", "heun", "sde"))
        one_of("sample.head", self.head, ("velocity", "latent"))


SPEC = MethodSpec(
    name="dsd",
    title="DSD: one transformer that encodes, denoises and decodes, trained end to end as self-distillation",
    paper="Diffusion As Self-Distillation: End-to-End Latent Diffusion In One Model (arXiv 2511.14716)",
    implementation="pixlat.methods.dsd.method:DsdMethod",
    config=DsdConfig,
    sample=DsdSample,
    presets=str(Path(__file__).with_name("presets.yaml")),
)
