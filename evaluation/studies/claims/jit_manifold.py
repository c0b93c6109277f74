"""JiT, figure 2: in many dimensions a small network can predict data on a plane, but neither noise nor velocity."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from pixlat.common.config.schema import TrainConfig
from pixlat.common.maths.flow import SPACES
from pixlat.common.seeds import Noise, image_seeds
from pixlat.evaluation.studies.claim_tools.framework import Budget, Claim, Criterion, Estimate, Evidence
from pixlat.evaluation.studies.claim_tools.swiss_roll import (
    POINTS,
    lifted,
    mlp,
    off_plane,
    plane,
    roll,
    sliced_distance,
)
from pixlat.evaluation.studies.claim_tools.training import fit, panels
from pixlat.methods.base import DataInfo
from pixlat.methods.jit.config import JiTConfig, JiTSample
from pixlat.methods.jit.method import JiTMethod

LOW, HIGH = 2, 512
UNITS = 256
BATCH = 256
FAR = 1e4  # the limit for coordinates, also for NaN, so that the distance of a diverged sampler is large but finite
SAMPLER = JiTSample(steps=50, solver="euler", guidance=1.0)


class Mlp(nn.Module):
    """Replaces JiT's transformer: five linear layers on the image and the time."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.layers = mlp([dims + 1, *[UNITS] * 4, dims])

    def forward(self, z: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Maps z (B, D, 1, 1) and time (B,) to (B, D, 1, 1)."""
        return self.layers(torch.cat((z.flatten(1), time[:, None]), dim=1))[:, :, None, None]


def samples(prediction: str, dims: int, steps: int, seed: int) -> Tensor:
    """(POINTS, D) samples of a model that was trained with v-loss. Uses JiT's objective and sampler."""
    config = JiTConfig(
        depth=1,
        width=8,
        heads=2,
        patch=1,
        context_tokens=0,
        context_start=0,
        prediction=prediction,
        loss_space="v",
        noise_scale=1.0,
    )
    method = JiTMethod(config, DataInfo("swiss roll", num_classes=1, image_size=1, num_train=0, channels=dims))
    torch.manual_seed(seed)
    method.network, projection = Mlp(dims), plane(dims, seed)  # type: ignore[assignment]

    def loss(step: int) -> Tensor:
        x, labels, t = lifted(roll(BATCH), projection), torch.zeros(BATCH, dtype=torch.int64), torch.rand(BATCH)
        return method.objective(x, labels, t, torch.randn_like(x))

    fit(
        method,
        loss,
        TrainConfig(images=steps * BATCH, batch=BATCH, lr=1e-3, schedule="cosine", betas=[0.9, 0.999]),
        seed,
    )
    with torch.no_grad():
        drawn = method.sample(torch.zeros(POINTS, dtype=torch.int64), Noise(image_seeds(seed, range(POINTS))), SAMPLER)
    return drawn.flatten(1).nan_to_num(FAR).clamp(-FAR, FAR)


def measure(budget: Budget) -> Evidence:
    """Distance to the data and energy outside its plane, for every prediction and dimension."""
    dimensions = (LOW, HIGH) if budget.quick else (LOW, 8, 16, HIGH)
    distances, energies = defaultdict(list), defaultdict(list)
    figure, axes = panels(len(SPACES), len(dimensions), (2.2, 2.2))
    for column, dims in enumerate(dimensions):
        for row, prediction in enumerate(SPACES):
            for seed in budget.seeds:
                drawn, projection = samples(prediction, dims, budget.choose(400, 1500), seed), plane(dims, seed)
                torch.manual_seed(-1 - seed)
                distances[prediction, dims].append(sliced_distance(drawn @ projection, roll(POINTS)))
                energies[prediction, dims].append(off_plane(drawn, projection))
            axes[row][column].plot(*(drawn @ projection).T, ",", color=f"C{row}")
            axes[row][column].set(
                xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[], yticks=[], title=f"{prediction}-prediction, D = {dims}"
            )
    distance, energy = (
        {key: Estimate.over(values) for key, values in found.items()} for found in (distances, energies)
    )
    return Evidence(
        estimates={
            "low": max((distance[prediction, LOW] for prediction in SPACES), key=lambda estimate: estimate.value),
            "x": distance["x", HIGH],
            "x_off": energy["x", HIGH],
            "eps": distance["eps", HIGH],
            "v_off": energy["v", HIGH],
        },
        headers=["prediction", "D", "distance to the data", "energy outside the plane"],
        rows=[
            [prediction, str(dims), str(distance[prediction, dims]), str(energy[prediction, dims])]
            for prediction, dims in distance
        ],
        figure=figure,
        remarks=[f"Fresh data are {floor():.3f} away from other fresh data."],
    )


def floor() -> float:
    """The distance between two sets of points of the data."""
    torch.manual_seed(-100)
    return sliced_distance(roll(POINTS), roll(POINTS))


CLAIM = Claim(
    name="jit-manifold",
    paper="JiT (arXiv 2511.13720), section 3.3 and figure 2",
    statement=(
        "Where data lie on a plane in more dimensions than the network has units, x-prediction still generates them; "
        "eps- and v-prediction collapse."
    ),
    setting=(
        "A Swiss roll through a random orthonormal map into D dimensions; an MLP of five layers and 256 units; v-loss; "
        "JiT's objective and its sampler (50 Euler steps). The paper names neither the curve nor the optimizer: "
        "Adam 1e-3, cosine, batch 256, 1500 steps (quick: 400), times uniform. Distance: "
        "sliced Wasserstein-1 in the plane. Energy: root mean square of what lies outside the plane, a dimension."
    ),
    criteria=(
        Criterion("low", "in 2 dimensions, the largest distance of the three predictions", "at most", 0.2),
        Criterion("x", "in 512 dimensions, the distance of x-prediction", "at most", 0.2),
        Criterion("x_off", "in 512 dimensions, the energy of x-prediction outside the plane", "at most", 0.1),
        Criterion("eps", "in 512 dimensions, the distance of eps-prediction", "at least", 1.0),
        Criterion("v_off", "in 512 dimensions, the energy of v-prediction outside the plane", "at least", 0.4),
    ),
    measure=measure,
    minutes=(2.0, 7.0),
)
