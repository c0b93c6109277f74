"""SiT, REPA and REG: objectives and samplers. REPA's class extends SiT's, and REG's extends REPA's.

As everywhere in `common/`, t = 1 is noise. The networks of REPA and REG receive t; SiT's network receives 1 - t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.config.resolve import require
from pixlat.common.frozen.encoders import build_encoder
from pixlat.common.frozen.remember import FeatureTable
from pixlat.common.layers.dit import projector
from pixlat.common.maths.samplers import euler, euler_maruyama, heun, solver_evaluations
from pixlat.common.seeds import Noise
from pixlat.methods.base import Batch, DataInfo, Description, Pretrained, guidance_facts
from pixlat.methods.reg.config import RegConfig, RegSample, RepaConfig, SitConfig, SitSample
from pixlat.methods.reg.latent import LatentMethod
from pixlat.methods.reg.network import Prediction, Shape
from pixlat.methods.reg.path import Mix, draw_times, drift, mix
from pixlat.methods.reg.reference import from_released

STATISTICS_BATCHES = 64  # batches that measure REG's class token for `standardise`
LEAST_STD = 1e-3  # floor of the measured std, so that an almost constant channel is not scaled up


class Draws(NamedTuple):
    """The random draws of a training step, besides the latents' draws from their posterior."""

    labels: Tensor  # (B,) after some are replaced by "no class"
    t: Tensor  # (B,)
    noise: Tensor  # (B, C, S, S)


class SitMethod(LatentMethod):
    """Flow matching on latents: || v(z, t) - dz/dt ||^2."""

    data_time: ClassVar[float] = 1.0  # the time of data in the network's input; noise has 1 - data_time
    config: SitConfig

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        x = self.latents(batch)
        return {"loss": self.objective(x, self.draw(x, batch["label"]))}

    def draw(self, x: Tensor, labels: Tensor) -> Draws:
        """Draws label drop, time and noise for each latent of a batch."""
        labels = self.drop_labels(labels)
        return Draws(labels, draw_times(self.config.path, self.config.time, len(x), x.device), torch.randn_like(x))

    def objective(self, x: Tensor, draws: Draws) -> Tensor:
        """Mean squared error of the velocity, for normalised latents (B, C, S, S)."""
        path = mix(self.config.path, draws.t)
        return self.velocity_error(self.predict(path.position(x, draws.noise), draws.t, draws.labels), path, x, draws)

    def velocity_error(self, predicted: Prediction, path: Mix, x: Tensor, draws: Draws) -> Tensor:
        """mean (v - (a' x + s' n))^2."""
        return (predicted.image - path.velocity(x, draws.noise)).square().mean()

    def predict(
        self, z: Tensor, t: Tensor, labels: Tensor, class_token: Tensor | None = None, hidden_after: int = 0
    ) -> Prediction:
        """The network's prediction for time t = 1 at noise, in float32 also under bf16 autocast."""
        towards_data = self.data_time == 1.0
        image, token, hidden = self.network(z, 1 - t if towards_data else t, labels, class_token, hidden_after)
        image = -image if towards_data else image
        return Prediction(image.float(), None if token is None else token.float(), hidden)

    def probe_latents(self, x: Tensor, images: Tensor, time: float, labels: Tensor) -> None:
        t = torch.full((len(x),), time, device=x.device)
        self.predict(mix(self.config.path, t).position(x, torch.randn_like(x)), t, labels)

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, labels: Tensor, noise: Noise, config: SitSample) -> Tensor:
        return self.decode(self.image_of(self.solve(labels, noise, config)))

    def solve(self, labels: Tensor, noise: Noise, config: SitSample) -> Tensor:
        """The sampler's state at t = 0, (B, ...)."""
        exact = (
            torch.float64 if labels.device.type != "mps" else torch.float32
        )  # of the state; the network gets float32
        z = self.start(noise).to(exact)
        scale = self.guidance_scale(config).to(z)

        def velocity(z: Tensor, t: float, decided_at: float) -> Tensor:
            return self.velocity(z, t, labels, scale if is_guided(decided_at, config) else None)

        if config.solver == "sde":
            z = euler_maruyama(
                lambda z, t: drift(self.config.path, velocity(z, t, t), z, t, config.diffusion),
                lambda t: config.diffusion * t,
                z,
                sde_times(config.steps, config.last_step),
                noise,
            )
        else:
            for step in pairwise(ode_times(config.steps)):
                # both evaluations of a Heun step use guidance, or neither does
                of_step = partial(velocity, decided_at=step[0])
                second_order = config.solver == "heun" and step[1] > 0
                z = heun(of_step, z, step, last_euler=False) if second_order else euler(of_step, z, step)
        return z

    def start(self, noise: Noise) -> Tensor:
        """The sampler's state at t = 1, (B, ...)."""
        return noise.normal(*self.latent_shape())

    def image_of(self, z: Tensor) -> Tensor:
        """The latents (B, C, S, S) in the sampler's state."""
        return z

    def guidance_scale(self, config: SitSample) -> Tensor:
        """The guidance scale of each number of the state, broadcastable to it."""
        return self.channel_scale(config.guidance, config.guided_channels)

    def velocity(self, z: Tensor, t: float, labels: Tensor, scale: Tensor | None) -> Tensor:
        """dz/dt of the state, with guidance u + scale (c - u) unless scale is None.

        The drift is affine in the velocity, so guiding the velocity guides the drift in the same way.
        """
        if scale is None:
            return self.state_velocity(z, t, labels)
        conditional, unconditional = self.state_velocity(torch.cat((z, z)), t, self.with_null(labels)).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def state_velocity(self, z: Tensor, t: float, labels: Tensor) -> Tensor:
        """The network's velocity for the state, in the state's dtype."""
        return self.predict(z.float(), torch.full((len(z),), t, device=z.device), labels).image.to(z.dtype)

    def evaluations(self, config: SitSample) -> int:
        return solver_evaluations(config.solver, config.steps)

    # -- records -------------------------------------------------------------------------------------------------------

    def describe(self, config: SitSample) -> Description:
        return Description(
            prediction="v",
            loss_space="v",
            sampler=f"Euler-Maruyama, w = {config.diffusion:g} t" if config.solver == "sde" else config.solver,
            steps=config.steps,
            **guidance_facts(config),
            size=self.size(),
            variant=None if self.config.path == "linear" else f"{self.config.path} path",
            pretrained=self.components(),
        )


class RepaMethod(SitMethod):
    """SiT with an alignment loss: an MLP maps one block's tokens, and the loss aligns them with a frozen encoder's."""

    external: Mapping[str, Pretrained] = {**LatentMethod.external, "teacher": Pretrained("teacher", "train")}
    data_time: ClassVar[float] = 0.0
    config: RepaConfig

    def __init__(self, config: RepaConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        grid, ours = self.teacher.grid(data.image_size), self.side // config.patch
        fits = f"gives {ours} x {ours} tokens, which must divide the {grid} x {grid} of the teacher {config.teacher}"
        require(grid % ours == 0, "model.patch", config.patch, fits)
        self.pool = grid // ours  # one of our tokens covers pool x pool of the teacher's
        self.projectors = nn.ModuleList([projector(config.width, config.projector_width, self.teacher.channels)])
        self.features_of = FeatureTable(self.teacher_targets, data.num_train if config.remember else 0)

    @classmethod
    def needs_images(cls, data: DataInfo) -> bool:
        return True  # the teacher needs the images even if latents are stored

    def build_frozen(self) -> None:
        super().build_frozen()
        self.teacher = build_encoder(self.config.teacher, self.config.teacher_path)
        self.teacher.requires_grad_(False)

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        x = self.latents(batch)
        (target,) = self.features_of(batch)
        return self.aligned_objective(x, self.draw(x, batch["label"]), target)

    @torch.no_grad()
    def teacher_targets(self, images: Tensor) -> tuple[Tensor, ...]:
        """The teacher's patch tokens (B, N, C) for images in [-1, 1], averaged if its grid is finer than ours."""
        return (self.on_our_grid(self.teacher(images)),)

    def on_our_grid(self, tokens: Tensor) -> Tensor:
        """Averages the teacher's tokens (B, C, h, w) to our grid, (B, N, C)."""
        return F.avg_pool2d(tokens, self.pool).flatten(2).transpose(1, 2)

    def aligned_objective(self, x: Tensor, draws: Draws, target: Tensor) -> dict[str, Tensor]:
        """SiT's loss + lambda * alignment with the target (B, N, C)."""
        path = mix(self.config.path, draws.t)
        predicted = self.predict(
            path.position(x, draws.noise), draws.t, draws.labels, hidden_after=self.config.align_after
        )
        velocity, alignment = self.velocity_error(predicted, path, x, draws), self.alignment(predicted, target)
        loss = velocity + self.config.align_weight * alignment
        return {"loss": loss, "velocity": velocity.detach(), "alignment": alignment.detach()}

    def alignment(self, predicted: Prediction, target: Tensor) -> Tensor:
        """-mean cos(projected tokens, target) over batch and tokens, in float32.

        If the target (B, N, C) has no class token, ours is left out.
        """
        assert predicted.hidden is not None
        projected = self.projectors[0](predicted.hidden[:, -target.shape[1] :])
        return -F.cosine_similarity(projected.float(), target.float(), dim=-1, eps=1e-12).mean()

    def from_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_released(state, self.own_tensors(), self.config.patch, self.config.align_after)


class RegMethod(RepaMethod):
    """REPA with one more token: the teacher's class token, noised at the image's time. It predicts its velocity too."""

    config: RegConfig
    class_mean: Tensor
    class_std: Tensor

    def __init__(self, config: RegConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        if config.standardise:
            self.register_buffer("class_mean", torch.zeros(self.token_width))
            self.register_buffer("class_std", torch.ones(self.token_width))

    @property
    def token_width(self) -> int:
        """T, the dimension of the class token."""
        return self.teacher.pooled_channels if self.config.class_token == "pooled" else self.teacher.channels

    def shape(self) -> Shape:
        return replace(super().shape(), class_token=self.token_width)

    # -- training ------------------------------------------------------------------------------------------------------

    def before_training(self, batches: Iterator[Batch]) -> None:
        if self.config.standardise:
            tokens = torch.cat([self.features_of(batch)[1].float() for batch in islice(batches, STATISTICS_BATCHES)])
            self.class_mean.copy_(tokens.mean(dim=0))
            self.class_std.copy_(tokens.std(dim=0).clamp(min=LEAST_STD))

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        x = self.latents(batch)
        target, token = self.features_of(batch)
        token = self.standardised(token)
        return self.entangled_objective(x, self.draw(x, batch["label"]), target, token, torch.randn_like(token))

    def standardised(self, token: Tensor) -> Tensor:
        """The class token (B, T) as the network denoises it: standardised if the setting is on."""
        return (token - self.class_mean) / self.class_std if self.config.standardise else token

    def probe_latents(self, x: Tensor, images: Tensor, time: float, labels: Tensor) -> None:
        t, token = torch.full((len(x),), time, device=x.device), self.standardised(self.teacher_targets(images)[1])
        path = mix(self.config.path, t)
        self.predict(path.position(x, torch.randn_like(x)), t, labels, path.position(token, torch.randn_like(token)))

    @torch.no_grad()
    def teacher_targets(self, images: Tensor) -> tuple[Tensor, ...]:
        """(targets of the alignment, class token (B, T)).

        The targets are the class token and the patch tokens, (B, 1 + N, C). They are the patch tokens alone, (B, N, C),
        if the class token is not as wide as a patch token.
        """
        if self.config.class_token == "pooled":
            tokens, token = self.teacher.represent(images)
            patches = self.on_our_grid(tokens)
        else:  # without pooled features the teacher may cost less
            patches = self.on_our_grid(self.teacher(images))
            token = patches.mean(dim=1)
        if token.shape[-1] == patches.shape[-1]:
            patches = torch.cat((token.unsqueeze(1), patches), dim=1)
        return patches, token

    def entangled_objective(
        self, x: Tensor, draws: Draws, target: Tensor, token: Tensor, token_noise: Tensor
    ) -> dict[str, Tensor]:
        """REPA's loss + beta * mean squared error of the class token's velocity. The token is (B, T)."""
        path = mix(self.config.path, draws.t)
        noisy = path.position(x, draws.noise), draws.t, draws.labels, path.position(token, token_noise)
        predicted = self.predict(*noisy, hidden_after=self.config.align_after)
        assert predicted.class_token is not None
        velocity, alignment = self.velocity_error(predicted, path, x, draws), self.alignment(predicted, target)
        entangled = (predicted.class_token - path.velocity(token, token_noise)).square().mean()
        loss = velocity + self.config.align_weight * alignment + self.config.class_weight * entangled
        return {
            "loss": loss,
            "velocity": velocity.detach(),
            "alignment": alignment.detach(),
            "class_token": entangled.detach(),
        }

    # -- sampling: a state is the latents and the class token in one row, (B, C S S + T) -------------------------------

    def start(self, noise: Noise) -> Tensor:
        latents = super().start(noise)
        return torch.cat((latents.flatten(1), noise.normal(self.token_width)), dim=1)

    def image_of(self, z: Tensor) -> Tensor:
        return z[:, : -self.token_width].unflatten(1, self.latent_shape())

    def guidance_scale(self, config: SitSample) -> Tensor:
        assert isinstance(config, RegSample)
        image = super().guidance_scale(config).expand(self.latent_shape()).flatten()
        return torch.cat((image, torch.full((self.token_width,), config.class_guidance or 1.0)))

    def state_velocity(self, z: Tensor, t: float, labels: Tensor) -> Tensor:
        token = z[:, -self.token_width :].float()
        predicted = self.predict(self.image_of(z).float(), torch.full((len(z),), t, device=z.device), labels, token)
        assert predicted.class_token is not None
        return torch.cat((predicted.image.flatten(1), predicted.class_token), dim=1).to(z.dtype)


def is_guided(t: float, config: SitSample) -> bool:
    """Whether guidance is on in a step that starts at t. The interval includes both ends."""
    return config.guidance > 1 and config.interval[0] <= t <= config.interval[1]


def sde_times(steps: int, last_step: float) -> list[float]:
    """`steps` evenly spaced times from 1 to `last_step`, then 0, so that there is one evaluation for each step."""
    return [*torch.linspace(1, last_step, steps, dtype=torch.float64, device="cpu").tolist(), 0.0]


def ode_times(steps: int) -> list[float]:
    """`steps` + 1 evenly spaced times from 1 to 0."""
    times: list[float] = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu").tolist()
    return times
