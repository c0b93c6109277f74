"""pMF, figure 2: the toy data of jit_manifold, generated in one step.

A network that predicts x for an average velocity works where a network that predicts the velocity u fails.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pixlat.common.config.schema import TrainConfig
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
from pixlat.methods.pmf.config import PMFConfig, PMFSample
from pixlat.methods.pmf.method import PMFMethod
from pixlat.methods.pmf.network import Condition
from pixlat.methods.pmf.objective import draw

LOW, HIGH = 2, 512
UNITS = 256
BATCH = 256
PREDICTIONS = ("x", "u")


class Sample(NamedTuple):
    """The results of one trained model."""

    points: Tensor  # (POINTS, D)
    loss: float  # the loss of u per dimension, averaged over the last tenth of the training


class Trunk(nn.Module):
    """Replaces pMF's transformer: five layers on the image, the time and the step length, then two layers for u."""

    rope = None

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(mlp([dims + 2, *[UNITS] * 5]), nn.ReLU()), Head(dims)

    def embed(self, z: Tensor, condition: Condition) -> Tensor:
        """(B, D, 1, 1) to (B, D + 2).

        pMF's network does not get the time as an input, because a noisy image shows it. A point in few dimensions does
        not, so the toy network gets it.
        """
        assert condition.t is not None
        return torch.cat((z.flatten(1), condition.t[:, None], condition.h[:, None]), dim=1)

    def shared(self, tokens: Tensor) -> tuple[Tensor, None]:
        """The layers that u and v share. The second result, a tangent, is None."""
        return self.layers(tokens), None

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        """The output for u, which the sampler uses."""
        return self.head(self.shared(self.embed(z, condition))[0], None)[0]


class Head(nn.Module):
    """Two layers that follow the trunk."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.layers = mlp([UNITS, UNITS, dims])

    def forward(self, tokens: Tensor, rope: None) -> tuple[Tensor, None]:
        """(B, UNITS) to (B, D, 1, 1). The second result, a tangent, is None."""
        return self.layers(tokens)[:, :, None, None], None


def trained(prediction: str, dims: int, steps: int, seed: int, times: str = "plane") -> Sample:
    """One-step samples of a model that was trained with pMF's objective.

    times: the part of the plane r <= t from which training draws its times.
    """
    options = {
        "depth": 1,
        "head_depth": 1,
        "width": 8,
        "heads": 2,
        "patch": 1,
        "label_drop": 0.0,
        "uniform_share": 1.0,
        "optimizer": "adam",
        "jvp": "func",
    }
    config = PMFConfig(prediction=prediction, time_sampler=times, norm_power=0.0, **options)  # type: ignore[arg-type]
    method = PMFMethod(config, DataInfo("swiss roll", num_classes=1, image_size=1, num_train=0, channels=dims))
    torch.manual_seed(seed)
    method.network, method.v_head, projection = Trunk(dims), Head(dims), plane(dims, seed)  # type: ignore[assignment]
    errors: list[float] = []

    def loss(step: int) -> Tensor:
        x = lifted(roll(BATCH), projection)
        losses = method.objective(x, torch.zeros(BATCH, dtype=torch.int64), draw(config, x))
        errors.append(losses["loss_u"].item())
        return losses["loss"]

    fit(
        method,
        loss,
        TrainConfig(images=steps * BATCH, batch=BATCH, lr=1e-3, schedule="cosine", betas=[0.9, 0.999]),
        seed,
    )
    with torch.no_grad():
        drawn = method.sample(
            torch.zeros(POINTS, dtype=torch.int64), Noise(image_seeds(seed, range(POINTS))), PMFSample(guidance=1.0)
        )
    last = errors[-max(1, steps // 10) :]
    return Sample(drawn.flatten(1), sum(last) / len(last))


def measure(budget: Budget) -> Evidence:
    """Distance to the data, energy outside its plane and loss, for both predictions and every dimension."""
    dimensions = (HIGH,) if budget.quick else (LOW, 16, HIGH)
    found = defaultdict(list)
    figure, axes = panels(len(PREDICTIONS), len(dimensions), (2.2, 2.2))
    for column, dims in enumerate(dimensions):
        for row, prediction in enumerate(PREDICTIONS):
            for seed in budget.seeds:
                sample, projection = trained(prediction, dims, budget.choose(500, 4000), seed), plane(dims, seed)
                flat = sample.points @ projection
                torch.manual_seed(-1 - seed)
                found[prediction, dims].append(
                    (sliced_distance(flat, roll(POINTS)), off_plane(sample.points, projection), sample.loss)
                )
            axes[row][column].plot(*flat.T, ",", color=f"C{row}")
            axes[row][column].set(
                xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[], yticks=[], title=f"{prediction}-prediction, D = {dims}"
            )
    table = {key: [Estimate.over(column) for column in zip(*values, strict=True)] for key, values in found.items()}
    ratio = [u[2] / x[2] for x, u in zip(found["x", HIGH], found["u", HIGH], strict=True)]
    return Evidence(
        estimates={
            "x": table["x", HIGH][0],
            "x_off": table["x", HIGH][1],
            "u_off": table["u", HIGH][1],
            "loss": Estimate.over(ratio),
        },
        headers=["prediction", "D", "distance to the data", "energy outside the plane", "loss"],
        rows=[[prediction, str(dims), *map(str, columns)] for (prediction, dims), columns in table.items()],
        figure=figure,
    )


CLAIM = Claim(
    name="pmf-manifold",
    paper="pMF (arXiv 2601.22158), figure 2",
    statement=(
        "In one step, x-prediction generates data on a plane in any number of dimensions and has the lower loss; "
        "u-prediction fails in many dimensions."
    ),
    setting=(
        "The Swiss roll of jit-manifold; an MLP of seven layers and 256 units with a second end for v; "
        "pMF's objective (of one class, so guidance has no effect) and its one-step sampler. "
        "Not given in the paper: plain squared errors, Adam 1e-3, cosine, batch 256, 4000 steps, both times uniform, "
        "the time an input beside the step's length (quick: 500 steps and 512 dimensions only)."
    ),
    amended=(
        "A first full run of 2000 steps, with adaptive weights and without the time, which a point in few dimensions "
        "does not show, missed the first criterion (0.37) and learned no roll in any dimension. "
        "The toy was changed after it, and no bound."
    ),
    criteria=(
        Criterion("x", "in 512 dimensions, the distance of x-prediction", "at most", 0.25),
        Criterion("x_off", "in 512 dimensions, the energy of x-prediction outside the plane", "at most", 0.1),
        Criterion("u_off", "in 512 dimensions, the energy of u-prediction outside the plane", "at least", 0.4),
        Criterion("loss", "in 512 dimensions, the loss of u-prediction over that of x-prediction", "at least", 3.0),
    ),
    measure=measure,
    minutes=(1.5, 43.0),
)
