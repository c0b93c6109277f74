"""The measures of `pixlat study hidden-states`.

Features of a generator's blocks, CKNNA between two sets of features, and a linear probe of the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.errors import UserError
from pixlat.common.seeds import derive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pixlat.common.images.image_set import ImageSet
    from pixlat.methods.base import Method

    Positions = NDArray[np.int64]  # of images in a set


NEIGHBOURS = 10
PROBE_EPOCHS, PROBE_BATCH, PROBE_LR = 90, 16_384, 1e-3


def cknna(x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Alignment of two sets of features (n, D) and (n, D') of the same n images, in [-1, 1]; 1 for equal sets.

    K, L: inner products of unit-length features. Align(K, L) = 1 / (n - 1)^2 sum_ij a_ij (K_ij - mean_j K_ij)
    (L_ij - mean_j L_ij), where a_ij is 1 if j is among the nearest neighbours of i in both, without i itself;
    CKNNA = Align(K, L) / sqrt(Align(K, K) Align(L, L)).
    """
    if not len(x) == len(y) > neighbours:
        raise UserError(
            f"CKNNA needs two sets of equal size with more than {neighbours} features (the number of neighbours); "
            f"there are {len(x)} and {len(y)}."
        )
    (k, near_x), (m, near_y) = (_kernel(features, neighbours) for features in (x, y))
    both = (k * m)[near_x & near_y].sum()
    return (both / (k.square()[near_x].sum() * m.square()[near_y].sum()).sqrt()).item()


def _kernel(features: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """(inner products minus their row means (n, n), whether a column is a near neighbour of the row (n, n) bool)."""
    unit = F.normalize(features.float(), dim=1)
    products = unit @ unit.T
    nearest = products.clone().fill_diagonal_(-torch.inf).topk(neighbours, dim=1).indices
    return products - products.mean(dim=1, keepdim=True), torch.zeros_like(products, dtype=torch.bool).scatter_(
        1, nearest, True
    )


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    epochs: int = PROBE_EPOCHS,
    seed: int = 0,
) -> float:
    """The test accuracy of a linear classifier on features (n, D) with classes (n,) int64.

    The training is that of REPA's probes: each feature is standardised with the mean and deviation of the training set
    (batch norm without parameters); Adam starts at 1e-3 and follows a cosine schedule.
    """
    mean, std = train[0].mean(dim=0), train[0].std(dim=0).clamp(min=1e-6)
    (x, labels), (x_test, labels_test) = (((features - mean) / std, classes) for features, classes in (train, test))
    generator = torch.Generator().manual_seed(derive("probe", seed))
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    batch = min(PROBE_BATCH, max(1, len(x) // 8))
    optimizer = torch.optim.Adam([weight, bias], lr=PROBE_LR)
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in torch.randperm(len(x), generator=generator).to(x.device).split(batch):
                optimizer.zero_grad()
                F.cross_entropy(x[chosen] @ weight.T + bias, labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return ((x_test @ weight.T + bias).argmax(dim=1) == labels_test).float().mean().item()


@contextmanager
def tapped(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the outputs of the modules in a list, in the order in which they run, while the `with` block runs.

    If a module returns a tuple, the list gets its first element.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def image_mean(tokens: Tensor) -> Tensor:
    """The mean (B, D) over the image tokens of tokens (B, N, D).

    The image tokens are the last ones, the largest square number of them; class and context tokens stand before them.
    """
    return tokens[:, -(int(tokens.shape[1] ** 0.5) ** 2) :].float().mean(dim=1)


@torch.no_grad()
def block_features(
    method: Method, images: ImageSet, positions: Positions, time: float, batch: int, device: torch.device
) -> list[Tensor]:
    """For each block of the method, the features (n, D) of the images at n positions, noised to `time`.

    The noise is the same for every method.
    """
    method.eval()
    parts: list[list[Tensor]] = []
    for start in range(0, len(positions), batch):
        torch.manual_seed(derive("hidden", start))
        with tapped(method.blocks()) as seen:
            method.probe(_pixels(images, positions[start : start + batch], device), time)
        parts.append([image_mean(tokens) for tokens in seen])
    return [torch.cat(features) for features in zip(*parts, strict=True)]


@torch.no_grad()
def encoder_features(encoder: Any, images: ImageSet, positions: Positions, batch: int, device: torch.device) -> Tensor:
    """(n, C): the encoder's tokens of the images at n positions, averaged over the tokens of each image."""
    parts = [
        encoder(_pixels(images, positions[start : start + batch], device)) for start in range(0, len(positions), batch)
    ]
    return torch.cat([part.mean(dim=(2, 3)) for part in parts])


def _pixels(images: ImageSet, indices: Positions, device: torch.device) -> Tensor:
    return torch.from_numpy(images.fetch(indices)).to(device).float() / 127.5 - 1
