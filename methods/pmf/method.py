"""pMF's training objective and sampler (arXiv 2601.22158, sections 3 and 4). As in the paper, t = 1 is noise."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pixlat.common.config.resolve import patches_a_side
from pixlat.common.errors import UserError
from pixlat.common.frozen import perceptual
from pixlat.common.maths.crops import paired_crop
from pixlat.common.maths.flow import interpolate, match_dims
from pixlat.common.seeds import Noise
from pixlat.methods.base import Batch, DataInfo, Description, Method, ParamGroup, Pretrained, guidance_facts
from pixlat.methods.pmf.config import PMFConfig, PMFSample
from pixlat.methods.pmf.network import Condition, Head, PmfDiT, initialize, last_samples
from pixlat.methods.pmf.objective import (
    Draws,
    adaptive,
    draw,
    effective_scale,
    squared_error,
    to_velocity,
    velocity_of_data,
)
from pixlat.methods.pmf.reference import from_released


class Fields(NamedTuple):
    """The tensors that the loss compares, each (B, C, S, S)."""

    z: Tensor  # noisy image
    u: Tensor  # average velocity between r and t
    u_at_t: Tensor  # u + (t - r) stopgrad(du/dt), the instantaneous velocity that u implies (MeanFlow identity)
    v: Tensor  # instantaneous velocity
    target: Tensor  # the guided velocity to regress on, without gradient


class PMFMethod(Method):
    """One network that predicts average velocities for all step lengths, guidance scales and guidance intervals.

    Fields of `config` switch to the paper's ablations.
    """

    def __init__(self, config: PMFConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        patches_a_side(data.image_size, config.patch)  # before anything is built
        self.network = PmfDiT(config, data.image_size, data.channels, data.num_classes)
        self.v_head = Head(config, data.channels)  # only the loss uses it
        initialize(self.network, self.v_head)
        self.perceptual = build_distances(config)
        self.external = {f"perceptual.{name}": Pretrained("perceptual loss", "train", name) for name in self.perceptual}

    # -- training ------------------------------------------------------------------------------------------------------

    def check_micro_batch(self, images: int) -> None:
        samples = self.config.flow_matching_samples(images)
        if samples != int(samples):
            raise UserError(
                f"train.micro_batch={images} (or train.batch divided by the processes) does not fit "
                f"model.flow_share={self.config.flow_share}: pMF trains this share of every micro-batch by flow "
                f"matching, here {samples:g} samples, and would round down to {int(samples)} of {images}. "
                "Choose a micro-batch for which the share is a whole number of samples."
            )

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.objective(batch["image"], batch["label"], draw(self.config, batch["image"]))

    def objective(self, x: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The loss: a sum of adaptively weighted terms, each averaged over the batch.

        The terms are the squared errors of u and v, summed over pixels, and the perceptual distances.
        """
        fields = self.fields(x, labels, draws)
        error_u, error_v = squared_error(fields.u_at_t, fields.target), squared_error(fields.v, fields.target)
        loss = (adaptive(error_u, self.config) + adaptive(error_v, self.config)).mean()
        logged = {"loss_u": error_u.detach().mean() / x[0].numel(), "loss_v": error_v.detach().mean() / x[0].numel()}
        for name, distance in self.distances(fields, x, draws).items():
            weight = self.config.lambda2 if name == "convnext" else self.config.lambda1
            loss = loss + weight * adaptive(distance, self.config).mean()
            logged[name] = distance.detach().mean()
        return {"loss": loss, **logged}

    def fields(self, x: Tensor, labels: Tensor, draws: Draws) -> Fields:
        """The predicted velocities and their guided target.

        The target needs v with the class and v without it. For a flow-matching sample the training forward returns
        v with the class anyway, and du/dt is multiplied by t - r = 0. So only the other samples compute v with the
        class in an extra forward first. (The released code always runs three forwards.)
        """
        t, first = draws.t, draws.flow_matching
        z, scale = interpolate(x, draws.noise, t), effective_scale(draws)
        null = torch.full_like(labels, self.data.num_classes)
        with torch.no_grad():
            v_class, v_null = self.instantaneous(
                z=torch.cat((z[first:], z)),
                t=torch.cat((t[first:], t)),
                omega=torch.cat((scale[first:], torch.ones_like(scale))),
                labels=torch.cat((labels[first:], null)),  # the velocity used as tangent always sees the class
            ).split((len(x) - first, len(x)))
        # Older PyTorch caches the weights that autocast converted under no_grad. Without this line
        # it would reuse them in the next forward, which needs their gradients.
        torch.clear_autocast_cache()

        condition = Condition(
            t - draws.r, draws.omega, draws.t_min, draws.t_max, torch.where(draws.dropped, null, labels), t
        )
        u, du, v = self.velocities(z, t, condition, dz=v_class)
        u_at_t = torch.cat((u[:first], u[first:] + match_dims(condition.h[first:], du) * du))

        guidance = match_dims(1 - 1 / scale, z) * (torch.cat((v.detach()[:first], v_class)) - v_null)
        guidance = guidance.masked_fill(match_dims(draws.dropped, z), 0.0)
        return Fields(z, u, u_at_t, v, target=velocity_of_data(x, z, t, self.config.clip) + guidance)

    def instantaneous(self, z: Tensor, t: Tensor, omega: Tensor, labels: Tensor) -> Tensor:
        """v(z, t) guided with scale omega: the v-head at step length h = 0, with guidance at all times (0, 1)."""
        condition = Condition(torch.zeros_like(t), omega, torch.zeros_like(t), torch.ones_like(t), labels, t)
        tokens, _ = self.network.shared(self.network.embed(z, condition))
        return to_velocity(self.config, self.v_head(tokens, self.network.rope)[0], z, t)

    def velocities(self, z: Tensor, t: Tensor, condition: Condition, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (u, du/dt, v).

        du/dt is the derivative of u along (dz, dt = 1, dr = 0), for the last len(dz) samples, without a graph.
        """
        if self.config.jvp == "func":
            return self._velocities_by_func(z, t, condition, dz)
        network = self.network
        tokens, dtokens = network.shared(network.embed(z, condition), network.embed_tangent(condition.h, dz))
        output, doutput = network.head(tokens, network.rope, dtokens)
        v_output, _ = self.v_head(tokens, network.rope)
        with torch.no_grad():
            inputs = last_samples(output, dz), last_samples(z, dz), last_samples(t, dz)
            du = torch.func.jvp(
                lambda *values: to_velocity(self.config, *values), inputs, (doutput, dz, torch.ones_like(inputs[2]))
            )[1]
        return to_velocity(self.config, output, z, t), du, to_velocity(self.config, v_output, z, t)

    def _velocities_by_func(
        self, z: Tensor, t: Tensor, condition: Condition, dz: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same as `velocities`, computed by PyTorch's forward-mode differentiation.

        It serves for checks, and for modified networks whose layers return no tangents.
        """

        def run(z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            tokens, _ = self.network.shared(self.network.embed(z, condition._replace(h=h, t=t)))
            outputs = self.network.head(tokens, self.network.rope)[0], self.v_head(tokens, self.network.rope)[0]
            u, v = (to_velocity(self.config, output, z, t) for output in outputs)
            return u, v

        moves = torch.cat((torch.zeros_like(z[len(dz) :]), dz)), torch.ones_like(t), torch.ones_like(t)
        u, du, v = cast("tuple[Tensor, Tensor, Tensor]", torch.func.jvp(run, (z, t, condition.h), moves, has_aux=True))
        return u, last_samples(du, dz), v

    def distances(self, fields: Fields, x: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Perceptual distances (B,) between crops of the image that u predicts and the same crops of the true image.

        At high noise (t >= perceptual_max_t) the distance is set to 0.
        """
        if draws.crops is None:
            return {}
        # The gradient flows through u, not through du/dt.
        denoised = fields.z - match_dims(draws.t, fields.z) * fields.u
        pair, boxes, times = [denoised, x], draws.crops, draws.t
        if draws.compared is not None:
            pair, boxes, times = (
                [images.index_select(0, draws.compared) for images in pair],
                boxes.at(draws.compared),
                times[draws.compared],
            )
        crops = paired_crop(pair, boxes, self.config.perceptual_size)
        active = times < self.config.perceptual_max_t
        distances = {name: torch.where(active, network(*crops), 0.0) for name, network in self.perceptual.items()}
        if draws.compared is None:
            return distances
        return {
            name: values.new_zeros(len(x)).index_copy(0, draws.compared, values) for name, values in distances.items()
        }

    def parameters_of(self, phase: str) -> list[ParamGroup]:
        """Muon trains the matrices of the blocks, of the scalar embeddings and of both final maps.

        Adam trains the patch embedding, the class table and all vectors.
        """
        excluded = set(self.network.patch_embed.modules())
        matrices = {
            id(module.weight) for module in self.modules() if isinstance(module, nn.Linear) and module not in excluded
        }
        scalar = {id(p) for embed in self.network.scalar_embeds() for p in embed.parameters()}
        kinds = ("adamw", "adamw") if self.config.optimizer == "adam" else (self.config.optimizer, "nesterov_adam")
        groups: dict[tuple[str, float], list[nn.Parameter]] = {(kind, 1.0): [] for kind in kinds}
        for p in (p for p in self.parameters() if p.requires_grad):
            lr_scale = self.config.scalar_lr if id(p) in scalar else 1.0
            groups.setdefault((kinds[id(p) not in matrices], lr_scale), []).append(p)
        return [ParamGroup(params, kind=kind, lr_scale=lr_scale) for (kind, lr_scale), params in groups.items()]

    def blocks(self) -> list[nn.Module]:
        return [*self.network.blocks, *self.network.head.blocks, *self.v_head.blocks]

    def probe(self, images: Tensor, time: float) -> None:
        times, ones = (
            torch.full((len(images),), time, device=images.device),
            torch.ones(len(images), device=images.device),
        )
        z = interpolate(images, self.config.noise_scale * torch.randn_like(images), times)
        null = torch.full((len(z),), self.data.num_classes, device=z.device)
        tokens, _ = self.network.shared(self.network.embed(z, Condition(0 * ones, ones, 0 * ones, ones, null)))
        for head in (self.network.head, self.v_head):
            head(tokens, self.network.rope)

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, labels: Tensor, noise: Noise, config: PMFSample) -> Tensor:
        z = self.config.noise_scale * noise.normal(self.data.channels, self.data.image_size, self.data.image_size)

        def full(value: float) -> Tensor:
            return torch.full((len(z),), value, device=z.device)

        omega, t_min, t_max = (full(value) for value in (config.guidance, *config.interval))
        for t, r in pairwise(torch.linspace(1, 0, config.steps + 1, device="cpu").tolist()):
            output = self.network(z, Condition(full(t - r), omega, t_min, t_max, labels, full(t))).to(z.dtype)
            z = z - (t - r) * to_velocity(self.config, output, z, full(t))
        return z

    def evaluations(self, config: PMFSample) -> int:
        return config.steps

    def sampling_networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def describe(self, config: PMFSample) -> Description:
        return Description(
            prediction=self.config.prediction,
            loss_space="v",
            sampler="average velocity",
            steps=config.steps,
            **guidance_facts(config, "cfg, as an input"),
            variant=self._variant(),
            pretrained=self.components(),
        )

    def _variant(self) -> str | None:
        parts = [] if self.config.preconditioner == "none" else [f"{self.config.preconditioner} pre-conditioner"]
        parts += [] if self.config.time_sampler == "plane" else [f"times on the {self.config.time_sampler}"]
        parts += [] if self.config.optimizer == "muon" else [f"optimizer {self.config.optimizer}"]
        return ", ".join(parts) or None

    # -- released weights ----------------------------------------------------------------------------------------------

    def from_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_released(state, self)


def build_distances(config: PMFConfig) -> nn.ModuleDict:
    """The frozen perceptual networks by name; a network whose weight in the loss is 0 is not built."""
    if config.perceptual == "none":
        return nn.ModuleDict()
    if config.perceptual == "embedded":
        return nn.ModuleDict({"embedded": perceptual.EmbeddedDistance(config.perceptual_size)})
    built: dict[str, nn.Module] = {}
    if config.lambda1:
        built["lpips"] = perceptual.Lpips(config.lpips_weights)
    if config.lambda2:
        built["convnext"] = perceptual.ConvNeXtDistance(config.convnext_weights)
    return nn.ModuleDict(built)
