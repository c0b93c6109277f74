"""RAE, section 4.1: a diffusion transformer must be as wide as its tokens.

More depth does not replace width, but a wide and shallow head does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixlat.common.config.schema import TrainConfig
from pixlat.evaluation.studies.claim_tools.framework import Budget, Claim, Criterion, Estimate, Evidence
from pixlat.evaluation.studies.claim_tools.training import fit, panels
from pixlat.methods.base import DataInfo
from pixlat.methods.rae.config import NetworkShape, RaeConfig
from pixlat.methods.rae.method import RaeMethod
from pixlat.methods.rae.network import LatentDiT

CHANNELS, GRID = 32, 4  # the size of the single latent that the networks memorise
NARROW = 16
BATCH = 32
HEAD = (48, 2, 4)  # width, blocks, attention heads


def plain(width: int, depth: int = 4) -> NetworkShape:
    """A LightningDiT, without a head."""
    return NetworkShape(width, depth, 2, head_width=0, head_depth=0, head_heads=1)


NETWORKS = {
    "width 8": plain(8),
    "width 16": plain(NARROW),
    "width 16, twice as deep": plain(NARROW, depth=8),
    "width 24": plain(24),
    "width 32 = tokens": plain(CHANNELS),
    "width 48": plain(48),
    "width 16 + head of width 48": NetworkShape(NARROW, 4, 2, *HEAD),
}
QUICK = ("width 16", "width 16, twice as deep", "width 32 = tokens", "width 16 + head of width 48")


def latent_of(seed: int) -> Tensor:
    """The latent (1, C, h, h) of a seed."""
    return torch.randn(1, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(seed))


def bound(shape: NetworkShape, latent: Tensor) -> float:
    """The smallest loss per channel that a last layer of width d allows.

    It is the sum of all but the d largest eigenvalues of the covariance of the tokens' velocities.
    """
    width = shape.head_width or shape.width
    covariance = torch.eye(CHANNELS) + torch.cov(latent[0].flatten(1), correction=0)
    return torch.linalg.eigvalsh(covariance).flip(0)[width:].sum().item() / CHANNELS


def final_loss(shape: NetworkShape, steps: int, seed: int) -> float:
    """RAE's loss on one latent, averaged over the last seventh of the training. Times are uniform and not shifted."""
    method = RaeMethod(
        RaeConfig(encoder="embedded", decoder_size="demo", width=8, depth=1, heads=2, head_depth=0),
        DataInfo("latent", 1, 32, 1),
    )
    latent = latent_of(seed)
    torch.manual_seed(seed)
    method.network = LatentDiT(shape, CHANNELS, GRID, 1)
    labels = torch.zeros(BATCH, dtype=torch.int64)

    def loss(step: int) -> Tensor:
        x = latent.expand(BATCH, -1, -1, -1)
        return method.objective(x, labels, torch.rand(BATCH), torch.randn_like(x))

    images = steps * BATCH
    settings = TrainConfig(
        images=images, batch=BATCH, lr=2e-3, warmup_images=images // 10, schedule="linear", betas=[0.9, 0.999]
    )
    losses = fit(method, loss, settings, seed)
    last = losses[-steps // 7 :]
    return sum(last) / len(last)


def measure(budget: Budget) -> Evidence:
    """Final losses of all networks beside their bounds."""
    names = QUICK if budget.quick else tuple(NETWORKS)
    losses = {
        name: [final_loss(NETWORKS[name], budget.choose(400, 1500), seed) for seed in budget.seeds] for name in names
    }
    bounds = {name: [bound(NETWORKS[name], latent_of(seed)) for seed in budget.seeds] for name in names}

    def over(name: str, divisors: list[float]) -> Estimate:
        return Estimate.over([loss / divisor for loss, divisor in zip(losses[name], divisors, strict=True)])

    figure, [[axes]] = panels(1, 1, (7.5, 3.4))
    places = range(len(names))
    axes.bar(
        places, [sum(losses[name]) / len(losses[name]) for name in names], color="C0", label="loss after the training"
    )
    axes.scatter(
        places,
        [sum(bounds[name]) / len(bounds[name]) for name in names],
        marker="_",
        s=900,
        color="C3",
        zorder=3,
        label="bound of the width",
    )
    axes.set_xticks(
        places, [name.replace(", ", ",\n").replace(" + ", " +\n").replace(" = ", " =\n") for name in names], fontsize=8
    )
    axes.set_ylabel("squared error of the velocity")
    axes.legend(frameon=False)
    narrow = "width 16"
    return Evidence(
        estimates={
            "bound": over(narrow, bounds[narrow]),
            "depth": over("width 16, twice as deep", losses[narrow]),
            "wide": over("width 32 = tokens", losses[narrow]),
            "head": over("width 16 + head of width 48", bounds[narrow]),
        },
        headers=["network", "loss", "bound"],
        rows=[
            [name, str(Estimate.over(losses[name])), f"{sum(bounds[name]) / len(bounds[name]):.4g}"] for name in names
        ],
        figure=figure,
    )


CLAIM = Claim(
    name="rae-width",
    paper="RAE (arXiv 2510.11690), section 4.1 and theorem 1",
    statement=(
        "A diffusion transformer narrower than its tokens cannot even learn one latent by heart; "
        "more depth does not help, a wide and shallow head does."
    ),
    setting=(
        "RAE's objective on one random latent of 32 channels and 4 x 4 tokens, networks of 4 blocks (the paper: "
        "one image's DINOv2 tokens of 768 channels, DiT-S and larger). Bound: the tail of the velocities' covariance "
        "that a last layer of that rank leaves. 1500 steps (quick: 400) of 32, Adam 2e-3."
    ),
    criteria=(
        Criterion("bound", "the loss at half the tokens' width over the bound", "at least", 1.0),
        Criterion(
            "depth", "the loss at half the width and twice the depth, over that of the shallow one,", "at least", 0.85
        ),
        Criterion("wide", "the loss at the tokens' width, over that at half of it,", "at most", 0.6),
        Criterion(
            "head", "the loss of the narrow network with a wide head, over the narrow one's bound,", "at most", 0.6
        ),
    ),
    measure=measure,
    minutes=(1.5, 7.0),
)
