"""JiT's objective and sampler (arXiv 2511.13720, sections 3 and 4).

As everywhere in `common/`, t = 1 is noise. In the paper t = 1 is data, so the network receives 1 - t.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixlat.common.config.resolve import patches_a_side
from pixlat.common.layers.transformer import drop_labels
from pixlat.common.maths import flow
from pixlat.common.maths.guidance import classifier_free
from pixlat.common.maths.samplers import euler, heun, solver_evaluations
from pixlat.common.seeds import Noise
from pixlat.methods.base import Batch, DataInfo, Description, Method, ParamGroup, guidance_facts
from pixlat.methods.jit.config import JiTConfig, JiTSample
from pixlat.methods.jit.network import JiT
from pixlat.methods.jit.reference import from_released

EDM_DATA_STD = 0.5


class JiTMethod(Method):
    """Predicts x with a loss on v by default.

    `config.prediction` and `config.loss_space` select one of the paper's nine combinations.
    """

    def __init__(self, config: JiTConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        patches_a_side(data.image_size, config.patch)  # raises UserError before the network is built
        self.noise_scale = data.image_size / 256 if config.noise_scale is None else config.noise_scale
        self.network = JiT(config, data.image_size, data.channels, data.num_classes)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": self.objective(batch["image"], *self.draw(batch))}

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Draws (labels, t, noise) on the images' device: (B,) int64 with some labels dropped, (B,), (B, C, S, S)."""
        x, labels = batch["image"], batch["label"]
        labels = drop_labels(labels, self.config.label_drop, self.data.num_classes)
        t = flow.logit_normal(-self.config.time_mean, self.config.time_std, len(labels), device=x.device)
        return labels, t, self.noise_scale * torch.randn_like(x)

    def objective(self, x: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """mean || q(output) - q(target) ||^2, where q converts to the loss space with clipped denominators.

        noise: already multiplied by the noise scale.
        """
        z = flow.interpolate(x, noise, t)
        error = self.predict(z, t, labels) - flow.target(self.config.prediction, x, noise)
        gain = flow.error_gain(self.config.prediction, self.config.loss_space, t, self.config.clip)
        return (flow.match_dims(gain, error) * error).square().mean()

    def predict(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The prediction in the space `config.prediction`, (B, C, S, S); autocast's bf16 is cast back to z's type."""
        output = self.network(z, 1 - t, labels).to(z.dtype)
        if self.config.preconditioner == "none":
            return output
        noise, data = flow.match_dims(t, z), flow.match_dims(1 - t, z)
        if self.config.preconditioner == "linear":
            return data * z + noise * output
        # EDM's c_skip and c_out at sigma = t / (1 - t), rewritten so that there is no division by 0 at t = 1.
        variance = (data * EDM_DATA_STD) ** 2 + noise**2
        return data * EDM_DATA_STD**2 / variance * z + noise * EDM_DATA_STD / variance**0.5 * output

    def parameters_of(self, phase: str) -> list[ParamGroup]:
        """Vectors and biases get no weight decay, as in the authors' code."""
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, p in self.named_parameters():
            groups[p.ndim > 1 and not name.endswith(".bias")].append(p)
        return [ParamGroup(groups[False], weight_decay=0.0), ParamGroup(groups[True])]

    def blocks(self) -> list[nn.Module]:
        return list(self.network.blocks)

    def probe(self, images: Tensor, time: float) -> None:
        times = torch.full((len(images),), time, device=images.device)
        z = flow.interpolate(images, self.noise_scale * torch.randn_like(images), times)
        self.predict(z, times, torch.full((len(z),), self.data.num_classes, device=z.device))

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, labels: Tensor, noise: Noise, config: JiTSample) -> Tensor:
        z = self.noise_scale * noise.normal(self.data.channels, self.data.image_size, self.data.image_size)
        solve = heun if config.solver == "heun" else euler
        return solve(lambda z, t: self.velocity(z, t, labels, config), z, time_grid(config.steps))

    def velocity(self, z: Tensor, t: float, labels: Tensor, config: JiTSample) -> Tensor:
        """The guided velocity dz/dt.

        Guidance acts on the prediction; this is equivalent, because the velocity is an affine function of it.
        """

        def predict(z: Tensor, labels: Tensor) -> Tensor:
            return self.predict(z, torch.full((len(z),), t, device=z.device), labels)

        scale = config.guidance if in_interval(t, *config.interval) else 1.0
        prediction = classifier_free(predict, z, labels, self.data.num_classes, scale)
        clip = 0.0 if config.ending == "clean" and t < 0.5 else self.config.clip
        return flow.to_velocity(prediction, self.config.prediction, z, t, clip)

    def evaluations(self, config: JiTSample) -> int:
        return solver_evaluations(config.solver, config.steps)

    def sampling_networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def describe(self, config: JiTSample) -> Description:
        return Description(
            prediction=self.config.prediction,
            loss_space=self.config.loss_space,
            sampler=config.solver if config.ending == "official" else f"{config.solver}, clean ending",
            steps=config.steps,
            **guidance_facts(config),
            variant=None if self.config.preconditioner == "none" else f"{self.config.preconditioner} pre-conditioner",
        )

    # -- released weights ----------------------------------------------------------------------------------------------

    def from_reference(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_released(state, self.state_dict())


def time_grid(steps: int) -> list[float]:
    """The times of the sampler, from 1 to 0.

    The paper's grid is in float32 with 1 = data. We subtract its points from 1 in Python floats, so that 1 - t
    returns them exactly.
    """
    return [1.0 - tau for tau in torch.linspace(0, 1, steps + 1, dtype=torch.float32, device="cpu").tolist()]


def in_interval(t: float, low: float, high: float) -> bool:
    """Whether low < 1 - t < high, compared strictly in float32 like the released sampler.

    A lower end of 0 includes 1 - t = 0.
    """
    low32, high32 = torch.tensor((low, high), dtype=torch.float32, device="cpu").tolist()
    tau = 1.0 - t
    return (low == 0 or tau > low32) and tau < high32
