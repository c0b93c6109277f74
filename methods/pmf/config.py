"""pMF's settings. Here and in the paper, time 1 is noise.

This module does not import torch, so that `--help` is quick. presets.yaml holds the published sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pixlat.common.config.resolve import checked_interval, one_of, require
from pixlat.methods import MethodSpec

PREDICTIONS = ("x", "u")
PRECONDITIONERS = ("none", "linear", "edm", "scm")
TIME_SAMPLERS = ("plane", "diagonal", "zero", "edges")
PERCEPTUAL = ("none", "embedded", "lpips+convnext")
OPTIMIZERS = ("muon", "torch_muon", "adam")


@dataclass
class PMFConfig:
    """Settings of the network and its objective. Image size and class count come from the data."""

    depth: int = 16  # blocks that compute the average velocity: shared blocks plus the blocks of its head
    head_depth: int = 8  # blocks of each head; the head of the instantaneous velocity is used in training only
    width: int = 768
    heads: int = 12
    mlp_hidden: int | None = None  # SwiGLU's hidden width; none: 8/3 of the width, rounded down
    patch: int = 16  # pixels; the paper keeps 16 x 16 tokens: patch = image size / 16
    bottleneck: int = 128  # channels between the two linear maps of the patch embedding; 0: one linear map
    class_tokens: int = 8  # prefix tokens that carry the class
    guidance_tokens: int = 4  # prefix tokens that carry the guidance scale
    interval_tokens: int = 2  # prefix tokens for each end of the guidance interval
    time_tokens: int = 4  # prefix tokens that carry the step length t - r
    prediction: str = "x"  # x | u: what the network returns
    #: none | linear | edm | scm: x = c_skip z + c_out * output (ablation; needs prediction=x)
    preconditioner: str = "none"
    clip: float = 0.05  # smallest value of a denominator t
    noise_scale: float = 1.0  # standard deviation of the noise
    time_sampler: str = "plane"  # plane | diagonal (r = t only) | zero (r = 0 only) | edges (r = t or 0)
    time_mean: float = 0.8  # mean of the logit of both times
    time_std: float = 0.8  # standard deviation of the logit of both times
    uniform_share: float = 0.0  # share of samples whose times are uniform instead
    #: share of the samples with r < t whose r is set to 0: their step ends at the image
    zero_share: float = 0.0
    #: share of a micro-batch with r = t (flow matching), its first samples; must be a whole number of samples
    flow_share: float = 0.5
    label_drop: float = 0.1  # mean share of a micro-batch that is trained without the class, its first samples
    guidance_max: float = 8.0  # guidance scales are drawn from [1, guidance_max]
    guidance_beta: float = 1.0  # the density of guidance scales is proportional to scale^-beta
    norm_eps: float = 0.01  # adaptive weight: every summed error is divided by (itself + norm_eps)^norm_power
    norm_power: float = 1.0
    perceptual: str = "none"  # none | embedded (EfficientNet-Lite0, needs no download) | lpips+convnext (as published)
    perceptual_max_t: float = 0.8  # perceptual terms apply to samples with t below this
    perceptual_size: int = 224  # pixels of the crops that the perceptual networks see
    lambda1: float = 0.4  # weight of LPIPS, or of the embedded features
    lambda2: float = 0.1  # weight of ConvNeXt; a weight of 0 leaves ConvNeXt (lambda2) or LPIPS (lambda1) out
    lpips_weights: str | None = None  # file or folder of the VGG16 weights; none: the usual caches
    convnext_weights: str | None = None  # file or folder of the ConvNeXt weights; none: the usual caches
    #: muon | torch_muon | adam: optimizer of the matrices; with the first two, Nesterov Adam trains the rest
    optimizer: str = "muon"
    #: learning rate of the embeddings of guidance scale, interval and step length, relative to all others
    scalar_lr: float = 1.0
    #: fused (layers compute tangents in the forward pass, without a graph) | func (torch.func.jvp; not with
    #: train.compile)
    jvp: str = "fused"

    def flow_matching_samples(self, count: int) -> float:
        """How many of `count` samples have r = t; the loss is the published one only if this is a whole number."""
        share = {"plane": self.flow_share, "diagonal": 1.0, "zero": 0.0, "edges": self.flow_share}[self.time_sampler]
        return round(count * share, 9)

    def __post_init__(self) -> None:
        for name in (
            "depth",
            "head_depth",
            "width",
            "heads",
            "patch",
            "class_tokens",
            "guidance_tokens",
            "interval_tokens",
            "time_tokens",
        ):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        for name in ("bottleneck", "lambda1", "lambda2", "norm_power", "guidance_beta"):
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must be 0 or more")
        for name in ("uniform_share", "zero_share", "flow_share", "label_drop"):
            require(
                0 <= getattr(self, name) <= 1, f"model.{name}", getattr(self, name), "is a share, so between 0 and 1"
            )
        for name in ("clip", "noise_scale", "time_std", "norm_eps", "scalar_lr"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        require(
            self.head_depth <= self.depth,
            "model.head_depth",
            self.head_depth,
            f"is part of model.depth={self.depth}, so at most that",
        )
        require(self.width % self.heads == 0, "model.heads", self.heads, f"must divide model.width={self.width}")
        head_dim = self.width // self.heads
        require(
            head_dim % 4 == 0,
            "model.heads",
            self.heads,
            f"gives heads of {head_dim} channels; RoPE needs a multiple of 4",
        )
        require(
            self.mlp_hidden is None or self.mlp_hidden >= 1, "model.mlp_hidden", self.mlp_hidden, "must be at least 1"
        )
        require(self.guidance_max > 1, "model.guidance_max", self.guidance_max, "must be above 1")
        fits = self.perceptual_size >= 32 and self.perceptual_size % 16 == 0
        require(fits, "model.perceptual_size", self.perceptual_size, "must be a multiple of 16 pixels, at least 32")
        one_of("model.prediction", self.prediction, PREDICTIONS)
        one_of("model.preconditioner", self.preconditioner, PRECONDITIONERS)
        one_of("model.time_sampler", self.time_sampler, TIME_SAMPLERS)
        one_of("model.perceptual", self.perceptual, PERCEPTUAL)
        one_of("model.optimizer", self.optimizer, OPTIMIZERS)
        one_of("model.jvp", self.jvp, ("fused", "func"))
        alone = self.preconditioner == "none" or self.prediction == "x"
        require(
            alone,
            "model.preconditioner",
            self.preconditioner,
            f"needs model.prediction=x, which is {self.prediction!r}",
        )

    @property
    def prefix(self) -> int:
        """The number of prefix tokens before the image tokens."""
        return self.class_tokens + self.guidance_tokens + 2 * self.interval_tokens + self.time_tokens


@dataclass
class PMFSample:
    """Settings of the sampler. Guidance is an input of the network, so a step is one evaluation."""

    steps: int = 1
    guidance: float = 7.0  # omega; 1: off
    interval: tuple[float, float] = (0.1, 0.7)  # times at which guidance is on; an input of the network, as in training

    def __post_init__(self) -> None:
        require(self.steps >= 1, "sample.steps", self.steps, "must be at least 1")
        require(self.guidance >= 1, "sample.guidance", self.guidance, "must be 1 (off) or more")
        self.interval = checked_interval("sample.interval", self.interval)


SPEC = MethodSpec(
    name="pmf",
    title="pMF: pixel mean flows, a Transformer that generates pixels in one evaluation",
    paper="One-step Latent-free Image Generation with Pixel Mean Flows (arXiv 2601.22158)",
    implementation="pixlat.methods.pmf.method:PMFMethod",
    config=PMFConfig,
    sample=PMFSample,
    presets=str(Path(__file__).with_name("presets.yaml")),
    released="pixlat.methods.pmf.reference:open_released",
)
