"""Settings of SiT, REPA, REG and DiT; presets-*.yaml hold the published sizes.

REPA adds keys of its alignment to SiT's keys, and REG adds keys of its class token to REPA's. DiT has another
objective and another sampler. The module does not import torch, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pixlat.common.config.resolve import checked_interval, one_of, require
from pixlat.common.weights.shipped import AUTOENCODERS
from pixlat.methods import MethodSpec, Stage


@dataclass
class LatentConfig:
    """The network and the tokenizer, which all four methods share. The data give image size and class count."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    patch: int = 2  # side of a token in latent positions
    qk_norm: bool = False
    attention: str = "fused"  # fused | reference (logits and softmax in float32 under bf16; slower)
    label_drop: float = 0.1  # probability that training replaces a label by "no class"
    tokenizer: str = "embedded"  # embedded | sd-ft-ema | sd-ft-mse | run folder of an autoencoder | train
    tokenizer_path: str | None = None  # folder or file of the sd- weights; none: the Hugging Face cache
    #: cache the frozen networks' outputs for each training image in memory, so that they run once for each
    remember: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        require(0 <= self.label_drop <= 1, "model.label_drop", self.label_drop, "is a probability, so between 0 and 1")
        require(self.width % self.heads == 0, "model.heads", self.heads, f"must divide model.width={self.width}")
        require(self.width % 4 == 0, "model.width", self.width, "must be a multiple of 4 for the 2-D position table")
        one_of("model.attention", self.attention, ("fused", "reference"))


@dataclass
class DitConfig(LatentConfig):
    """DiT: the network predicts noise and variance at 1000 discrete times."""


@dataclass
class SitConfig(LatentConfig):
    """SiT: the network predicts the velocity at continuous times."""

    path: str = "linear"  # linear | cosine: the interpolant between data and noise
    time: str = "uniform"  # uniform | lognormal: the distribution of training times

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("model.path", self.path, ("linear", "cosine"))
        one_of("model.time", self.time, ("uniform", "lognormal"))


@dataclass
class RepaConfig(SitConfig):
    """REPA: a loss aligns the tokens of one block with the tokens of a frozen encoder, the teacher."""

    #: embedded | timm-dinov2-b | timm-dinov2-l | timm-dinov2-g | another encoder of common/frozen
    teacher: str = "embedded"
    teacher_path: str | None = None  # file or folder of the teacher's weights; none: the usual caches
    align_after: int = 4  # number of the aligned block, counted from 1
    align_weight: float = 0.5  # lambda
    projector_width: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.align_after <= self.depth,
            "model.align_after",
            self.align_after,
            f"must be the number of one of the {self.depth} blocks, from 1",
        )
        require(self.align_weight >= 0, "model.align_weight", self.align_weight, "must be 0 or more")
        require(self.projector_width >= 1, "model.projector_width", self.projector_width, "must be at least 1")


@dataclass
class RegConfig(RepaConfig):
    """REG: the network denoises the teacher's class token beside the image."""

    class_token: str = "pooled"  # pooled (the teacher's class token, if it has one) | mean (of its patch tokens)
    class_weight: float = 0.03  # beta
    #: scale each channel of the class token to mean 0 and variance 1, measured before training; released code: false
    standardise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("model.class_token", self.class_token, ("pooled", "mean"))
        require(self.class_weight >= 0, "model.class_weight", self.class_weight, "must be 0 or more")


@dataclass
class DitSample:
    """DiT's sampler: ancestral steps at evenly spaced times of the 1000."""

    steps: int = 250
    guidance: float = 1.0  # 1: off
    guided_channels: int | None = 3  # how many latent channels are guided, from the first on; none: all

    def __post_init__(self) -> None:
        require(1 <= self.steps <= 1000, "sample.steps", self.steps, "must be between 1 and the 1000 training times")
        check_guidance(self.guidance, self.guided_channels)


@dataclass
class SitSample:
    """The sampler of SiT, REPA and REG. Time 1 is noise."""

    steps: int = 250
    solver: str = "sde"  # sde (Euler-Maruyama) | euler | heun (the last step is Euler's)
    diffusion: float = 2.0  # sde: the noise has variance rate diffusion * t; the papers write 1, their code has 2
    last_step: float = 0.04  # sde: time at which the last step starts; that step adds no noise
    guidance: float = 1.0  # 1: off
    interval: tuple[float, float] = (0.0, 1.0)  # times at which guidance is on, ends included
    #: how many latent channels are guided, from the first on; none: all. SiT's released sampler guides 3 of 4
    guided_channels: int | None = None

    def __post_init__(self) -> None:
        least = 2 if self.solver == "sde" else 1
        require(self.steps >= least, "sample.steps", self.steps, f"must be at least {least}")
        require(self.diffusion >= 0, "sample.diffusion", self.diffusion, "must be 0 or more")
        require(0 < self.last_step < 1, "sample.last_step", self.last_step, "must lie between 0 and 1")
        self.interval = checked_interval("sample.interval", self.interval)
        one_of("sample.solver", self.solver, ("sde", "euler", "heun"))
        check_guidance(self.guidance, self.guided_channels)


@dataclass
class RegSample(SitSample):
    """REG's sampler, which denoises image and class token together."""

    class_guidance: float = 0.0  # guidance scale of the class token at times when the image is guided; 0: conditional

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.class_guidance >= 0, "sample.class_guidance", self.class_guidance, "must be 0 (conditional) or more"
        )


def check_guidance(guidance: float, channels: int | None) -> None:
    """UserError for guidance scales below 1 and channel counts below 1."""
    require(guidance >= 1, "sample.guidance", guidance, "must be 1 (off) or more")
    require(
        channels is None or channels >= 1, "sample.guided_channels", channels, "must be at least 1, or none for all"
    )


def _presets(name: str) -> str:
    return str(Path(__file__).with_name(f"presets-{name}.yaml"))


TOKENIZER = Stage(key="tokenizer", method="vae", shipped=AUTOENCODERS)

DIT = MethodSpec(
    name="dit",
    title="DiT: a transformer on autoencoder latents, discrete diffusion with learned variance, ancestral sampler",
    paper="Scalable Diffusion Models with Transformers (arXiv 2212.09748)",
    implementation="pixlat.methods.reg.diffusion:DitMethod",
    config=DitConfig,
    sample=DitSample,
    presets=_presets("dit"),
    stages=(TOKENIZER,),
    released="pixlat.methods.reg.reference:open_dit",
)
SIT = MethodSpec(
    name="sit",
    title="SiT: DiT's network with a flow loss, Euler-Maruyama sampler",
    paper=(
        "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant "
        "Transformers (arXiv 2401.08740)"
    ),
    implementation="pixlat.methods.reg.method:SitMethod",
    config=SitConfig,
    sample=SitSample,
    presets=_presets("sit"),
    stages=(TOKENIZER,),
    released="pixlat.methods.reg.reference:open_sit",
)
REPA = MethodSpec(
    name="repa",
    title="REPA: SiT whose tokens are aligned with a frozen encoder's",
    paper="Representation Alignment for Generation (arXiv 2410.06940)",
    implementation="pixlat.methods.reg.method:RepaMethod",
    config=RepaConfig,
    sample=SitSample,
    presets=_presets("repa"),
    stages=(TOKENIZER,),
    released="pixlat.methods.reg.reference:open_repa",
)
REG = MethodSpec(
    name="reg",
    title="REG: REPA that denoises the encoder's class token beside the image",
    paper="Representation Entanglement for Generation (arXiv 2507.01467)",
    implementation="pixlat.methods.reg.method:RegMethod",
    config=RegConfig,
    sample=RegSample,
    presets=_presets("reg"),
    stages=(TOKENIZER,),
    released="pixlat.methods.reg.reference:open_reg",
)
