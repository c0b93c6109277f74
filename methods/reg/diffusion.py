"""DiT: Gaussian diffusion over 1000 discrete times with a learned variance (arXiv 2212.09748).

The objective and the selection of fewer times for sampling come from arXiv 2102.09672. Here times are integers, and 0
is next to the data. beta is linear from 1e-4 to 0.02, abar_i = prod (1 - beta),
z_i = sqrt(abar_i) x + sqrt(1 - abar_i) n.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pixlat.common.maths.samplers import ancestral
from pixlat.common.seeds import Noise
from pixlat.methods.base import Batch, DataInfo, Description, guidance_facts
from pixlat.methods.reg.config import DitConfig, DitSample
from pixlat.methods.reg.latent import LatentMethod
from pixlat.methods.reg.network import Shape

TIMES = 1000
BETAS = (1e-4, 0.02)
BIN = 1 / 255  # half the width of a grey level in [-1, 1]; at time 0 the bound is the likelihood of a level
EDGE = 0.999  # values beyond it belong to the outermost levels
SMALLEST = 1e-12  # floor of a likelihood


class Schedule(NamedTuple):
    """The coefficients (n,) at n of the 1000 times, computed in float64 and stored in float32."""

    original: Tensor  # int64, the time among the 1000, which the network receives
    data: Tensor  # sqrt(abar)
    noise: Tensor  # sqrt(1 - abar)
    mean_data: Tensor  # the posterior's mean is mean_data * x + mean_state * z
    mean_state: Tensor
    log_posterior: Tensor  # log of the posterior's variance; at time 0, where that is 0, the value of time 1
    log_beta: Tensor

    def at(self, times: Tensor) -> Schedule:
        """The coefficients at times (B,): `original` (B,), the others (B, 1, 1, 1)."""
        original, *rest = (coefficient[times] for coefficient in self)
        return Schedule(original, *(coefficient.view(-1, 1, 1, 1) for coefficient in rest))


def schedule(steps: int) -> Schedule:
    """The coefficients at `steps` evenly spaced times of the 1000: round(i 999 / (steps - 1)).

    Each beta covers the jump from one selected time to the next.
    """
    abar = (1 - torch.linspace(*BETAS, TIMES, dtype=torch.float64)).cumprod(dim=0)
    original = torch.linspace(0, TIMES - 1, steps, dtype=torch.float64).round().long()
    abar = abar[original]
    before = torch.cat((torch.ones_like(abar[:1]), abar[:-1]))
    beta = 1 - abar / before
    posterior = beta * (1 - before) / (1 - abar)
    clipped = torch.cat((posterior[1:2], posterior[1:])) if steps > 1 else beta
    coefficients = (
        abar.sqrt(),
        (1 - abar).sqrt(),
        beta * before.sqrt() / (1 - abar),
        (1 - before) * (1 - beta).sqrt() / (1 - abar),
        clipped.log(),
        beta.log(),
    )
    return Schedule(original, *(coefficient.float() for coefficient in coefficients))


class Gaussian(NamedTuple):
    """The distribution of a step back: mean and log of the variance, (B, C, S, S) or broadcastable to it."""

    mean: Tensor
    log_variance: Tensor


def posterior(x: Tensor, z: Tensor, s: Schedule) -> Gaussian:
    """q(z_{i-1} | z_i, x)."""
    return Gaussian(s.mean_data * x + s.mean_state * z, s.log_posterior)


def predicted(noise: Tensor, fraction: Tensor, z: Tensor, s: Schedule) -> Gaussian:
    """p(z_{i-1} | z_i): the posterior of the predicted data; fraction in [-1, 1] interpolates its log-variance
    from the posterior's to beta.
    """
    x = (z - s.noise * noise) / s.data
    weight = (fraction + 1) / 2
    return Gaussian(posterior(x, z, s).mean, weight * s.log_beta + (1 - weight) * s.log_posterior)


def kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) in nats for each number."""
    ratio = torch.exp(q.log_variance - p.log_variance)
    return 0.5 * (p.log_variance - q.log_variance - 1 + ratio + (q.mean - p.mean).square() * torch.exp(-p.log_variance))


def level_surprise(x: Tensor, p: Gaussian) -> Tensor:
    """-log of the probability under p of the grey level around x, in nats for each number."""
    centred, rate = x - p.mean, torch.exp(-0.5 * p.log_variance)
    above, below = torch.special.ndtr((centred + BIN) * rate), torch.special.ndtr((centred - BIN) * rate)
    inside = torch.where(x > EDGE, 1 - below, above - below)
    return -torch.where(x < -EDGE, above, inside).clamp(min=SMALLEST).log()


class Draws(NamedTuple):
    """The random draws of a training step, besides the latents' draws from their posterior."""

    labels: Tensor  # (B,) after some are replaced by "no class"
    times: Tensor  # (B,) int64
    noise: Tensor  # (B, C, S, S)


class DitMethod(LatentMethod):
    """DiT predicts noise and variance: squared error of the noise, plus the variational bound, whose gradient reaches
    the variance alone.
    """

    coefficients: Tensor

    def __init__(self, config: DitConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.register_buffer("coefficients", torch.stack(schedule(TIMES)[1:]), persistent=False)

    def shape(self) -> Shape:
        return replace(super().shape(), outputs=2 * self.tokenizer.channels)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        x = self.latents(batch)
        labels = self.drop_labels(batch["label"])
        return self.objective(x, Draws(labels, torch.randint(TIMES, (len(x),), device=x.device), torch.randn_like(x)))

    def objective(self, x: Tensor, draws: Draws) -> dict[str, Tensor]:
        """mean (noise' - noise)^2 + bound in bits, for normalised latents (B, C, S, S)."""
        s = self.training_schedule(x.device).at(draws.times)
        z = s.data * x + s.noise * draws.noise
        noise, fraction = self.predict(z, s.original, draws.labels)
        simple = (noise - draws.noise).square().mean()
        p = predicted(noise.detach(), fraction, z, s)
        bits = torch.where(
            draws.times.view(-1, 1, 1, 1) > 0, kl(posterior(x, z, s), p), level_surprise(x, p)
        ) / math.log(2)
        return {"loss": simple + bits.mean(), "noise": simple.detach(), "bound": bits.mean().detach()}

    def training_schedule(self, device: torch.device) -> Schedule:
        """The coefficients of all 1000 times."""
        return Schedule(torch.arange(TIMES, device=device), *self.coefficients)

    def predict(self, z: Tensor, times: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted noise and the fraction of the log-variance, each (B, C, S, S) float32, at times (B,)."""
        noise, fraction = self.network(z, times.float(), labels).image.float().chunk(2, dim=1)
        return noise, fraction

    def probe_latents(self, x: Tensor, images: Tensor, time: float, labels: Tensor) -> None:
        times = torch.full((len(x),), round(time * (TIMES - 1)), device=x.device)
        s = self.training_schedule(x.device).at(times)
        self.predict(s.data * x + s.noise * torch.randn_like(x), s.original, labels)

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, labels: Tensor, noise: Noise, config: DitSample) -> Tensor:
        steps = [coefficient.to(labels.device) for coefficient in schedule(config.steps)]
        scale = self.channel_scale(config.guidance, config.guided_channels).to(labels.device)

        def step_back(z: Tensor, i: int) -> tuple[Tensor, Tensor]:
            s = Schedule(*(coefficient[i] for coefficient in steps))
            p = predicted(*self.guided(z, s.original, labels, scale if config.guidance > 1 else None), z, s)
            return p.mean, torch.exp(0.5 * p.log_variance)

        return self.decode(ancestral(step_back, noise.normal(*self.latent_shape()), config.steps, noise))

    def guided(self, z: Tensor, time: Tensor, labels: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Guided noise u + scale (c - u), and the variance's fraction with the class. scale None: no guidance.

        time: one time for all images.
        """
        if scale is None:
            return self.predict(z, time.expand(len(z)), labels)
        noise, fraction = self.predict(torch.cat((z, z)), time.expand(2 * len(z)), self.with_null(labels))
        conditional, unconditional = noise.chunk(2)
        return unconditional + scale * (conditional - unconditional), fraction[: len(z)]

    def evaluations(self, config: DitSample) -> int:
        return config.steps

    def describe(self, config: DitSample) -> Description:
        return Description(
            prediction="eps",
            loss_space="eps",
            sampler="ancestral",
            steps=config.steps,
            **guidance_facts(config),
            size=self.size(),
            variant="learned variance",
            pretrained=self.components(),
        )
