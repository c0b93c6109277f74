"""JiT's settings. presets.yaml holds the published sizes. No torch is imported here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pixlat.common.config.resolve import checked_interval, one_of, require
from pixlat.methods import MethodSpec

SPACES = ("x", "eps", "v")


@dataclass
class JiTConfig:
    """Settings of the network and its objective. Image size and class count come from the data."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    patch: int = 16  # pixels; the papers keep 16 x 16 tokens: patch = image size / 16
    mlp_ratio: float = 4.0  # SwiGLU's hidden width is 2/3 of width * mlp_ratio
    bottleneck: int = 128  # channels between the two linear maps of the patch embedding; 0: one linear map
    context_tokens: int = 32  # class tokens in front of the image tokens; 0: none
    context_start: int = 4  # index of the first block that gets the class tokens
    rope: bool = True
    qk_norm: bool = True
    #: dropout in the middle half of the blocks, after the attention projection and on SwiGLU's hidden vector
    dropout: float = 0.0
    attn_dropout: float = 0.0  # dropout on the attention weights, in the same blocks
    attention: str = "fused"  # fused | reference (logits and softmax in float32 under bf16; slower)
    prediction: str = "x"  # x | eps | v: what the network returns
    loss_space: str = "v"  # x | eps | v: the space in which the loss measures the squared error
    preconditioner: str = "none"  # none | edm | linear: x = c_skip z + c_out * output (ablation; needs prediction=x)
    noise_scale: float | None = None  # standard deviation of the noise; none: image size / 256
    time_mean: float = -0.8  # mean of the logit of the paper's time (1 = data)
    time_std: float = 0.8  # its standard deviation
    clip: float = 0.05  # smallest value of a denominator t or 1 - t
    label_drop: float = 0.1  # probability of training without the class

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        for name in ("bottleneck", "context_tokens"):
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must be 0 (off) or more")
        for name in ("dropout", "attn_dropout", "label_drop"):
            require(
                0 <= getattr(self, name) <= 1,
                f"model.{name}",
                getattr(self, name),
                "is a probability, so between 0 and 1",
            )
        for name in ("mlp_ratio", "time_std", "clip"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        require(
            self.noise_scale is None or self.noise_scale > 0, "model.noise_scale", self.noise_scale, "must be positive"
        )
        require(self.width % self.heads == 0, "model.heads", self.heads, f"must divide model.width={self.width}")
        require(self.width % 4 == 0, "model.width", self.width, "must be a multiple of 4 for the 2-D position table")
        head_dim = self.width // self.heads
        require(
            not self.rope or head_dim % 4 == 0,
            "model.heads",
            self.heads,
            f"gives heads of {head_dim} channels; RoPE needs a multiple of 4",
        )
        inside = 0 <= self.context_start < self.depth
        require(
            inside,
            "model.context_start",
            self.context_start,
            f"must be the index of one of the {self.depth} blocks, from 0",
        )
        one_of("model.attention", self.attention, ("fused", "reference"))
        one_of("model.prediction", self.prediction, SPACES)
        one_of("model.loss_space", self.loss_space, SPACES)
        one_of("model.preconditioner", self.preconditioner, ("none", "edm", "linear"))
        alone = self.preconditioner == "none" or self.prediction == "x"
        require(
            alone,
            "model.preconditioner",
            self.preconditioner,
            f"needs model.prediction=x, which is {self.prediction!r}",
        )


@dataclass
class JiTSample:
    """Settings of the sampler.

    The defaults are those of the released code, except the guidance scale, which depends on the size (presets.yaml).
    """

    steps: int = 50
    solver: str = "heun"  # heun (the last step is Euler's) | euler
    guidance: float = 3.0  # 1: off
    #: times at which guidance is on, in the paper's convention (1 = data), ends excluded; a lower end of 0 includes 0
    interval: tuple[float, float] = (0.1, 1.0)
    #: official: the clip leaves 1.7 % of the noise in the image | clean (ours): the last step lands on the prediction
    ending: str = "official"

    def __post_init__(self) -> None:
        require(self.steps >= 1, "sample.steps", self.steps, "must be at least 1")
        require(self.guidance >= 1, "sample.guidance", self.guidance, "must be 1 (off) or more")
        self.interval = checked_interval("sample.interval", self.interval)
        one_of("sample.solver", self.solver, ("heun", "euler"))
        one_of("sample.ending", self.ending, ("official", "clean"))


SPEC = MethodSpec(
    name="jit",
    title="JiT: a plain Transformer that predicts clean pixels, flow loss, Heun sampler",
    paper="Back to Basics: Let Denoising Generative Models Denoise (arXiv 2511.13720)",
    implementation="pixlat.methods.jit.method:JiTMethod",
    config=JiTConfig,
    sample=JiTSample,
    presets=str(Path(__file__).with_name("presets.yaml")),
    released="pixlat.methods.jit.reference:open_released",
)
