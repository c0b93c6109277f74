"""The validation of a judge: it must see that degraded images are worse, and the stronger, the worse.

Every row degrades the held-out images in one way at a few strengths. Its value is the Fréchet distance from the
degraded images to the training images as a multiple of the distance of the intact held-out images, so 1 means
"no worse than real images that nobody has seen". All classes weigh alike on both sides. No judge was trained on any of
these degradations. All draws are fixed, so the same weights give the same table.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from pixlat.common.seeds import derive
from pixlat.evaluation.features.extractor import Extractor
from pixlat.evaluation.features.feature_sets import class_weights
from pixlat.evaluation.features.moments import Gaussian, Moments
from pixlat.evaluation.judges.recipe import JudgeData
from pixlat.evaluation.metrics.frechet import Factored, factorise, frechet_distance

LEAST_AT_SECOND = 1.2  # the ratio that a judge must reach at the second strength of every row
PATCH = 8  # pixels, of a side
BATCH = 128  # images


@dataclass(frozen=True)
class Row:
    """One way to degrade images."""

    title: str
    strengths: tuple[float, ...]  # from weak to strong
    # (held-out images (N, 3, 32, 32) uint8, their classes (N,), strength, generator) -> images of the same shape
    degrade: Callable[[Tensor, Tensor, float, Generator], Tensor]


# -- pixels ------------------------------------------------------------------------------------------------------------


def to_uint8(pixels: Tensor) -> Tensor:
    """Rounds values to [0, 255]."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor, _: Tensor, sigma: float, __: Generator) -> Tensor:
    """Convolves with a Gaussian of `sigma` pixels."""
    radius = int(4 * sigma) + 1
    line = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * sigma**2))
    line = (line / line.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images.float(), [radius] * 4, mode="replicate")
    return to_uint8(F.conv2d(F.conv2d(padded, line, groups=3), line.transpose(2, 3), groups=3))


def noise(images: Tensor, _: Tensor, levels: float, generator: Generator) -> Tensor:
    """Adds Gaussian noise with a standard deviation of `levels` grey levels."""
    return to_uint8(images + levels * torch.randn(images.shape, generator=generator))


def jpeg(images: Tensor, _: Tensor, quality: float, __: Generator) -> Tensor:
    """Compresses each image with Pillow's JPEG."""

    def through_jpeg(image: Tensor) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=int(quality))
        return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)

    return torch.stack([through_jpeg(image) for image in images])


def hue(images: Tensor, _: Tensor, degrees: float, __: Generator) -> Tensor:
    """Rotates colours about the grey axis; grey and white stay."""
    angle = torch.tensor(degrees).deg2rad()
    even, odd = (1 - angle.cos()) / 3, angle.sin() / 3**0.5
    turn = angle.cos() * torch.eye(3) + even + odd * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return to_uint8(torch.einsum("ij,bjhw->bihw", turn, images.float()))


def hatching(images: Tensor, _: Tensor, levels: float, __: Generator) -> Tensor:
    """Adds a checkerboard of single pixels, `levels` grey levels up and down, as upsampling decoders draw it."""
    rows, columns = torch.meshgrid(torch.arange(images.shape[2]), torch.arange(images.shape[3]), indexing="ij")
    return to_uint8(images + levels * (1 - 2 * ((rows + columns) % 2)))


# -- arrangement -------------------------------------------------------------------------------------------------------


def patches_of(images: Tensor) -> Tensor:
    """(B, 16, 3, 8, 8): the patches of images (B, 3, 32, 32), row by row."""
    split = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, 3, 4, 4, 8, 8)
    return split.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def from_patches(patches: Tensor) -> Tensor:
    """The inverse of `patches_of`."""
    side = round(patches.shape[1] ** 0.5)
    return patches.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def shuffled_patches(images: Tensor, _: Tensor, count: float, generator: Generator) -> Tensor:
    """Exchanges `count` of the 16 patches of 8 x 8 pixels of each image among each other."""
    patches = patches_of(images)
    chosen = torch.rand(patches.shape[:2], generator=generator).argsort(1)[:, : int(count)]
    order = torch.arange(patches.shape[1]).repeat(len(images), 1)
    order.scatter_(1, chosen, chosen.roll(1, dims=1))
    return from_patches(patches.gather(1, order[:, :, None, None, None].expand_as(patches)))


def holes(images: Tensor, _: Tensor, count: float, generator: Generator) -> Tensor:
    """Makes `count` of the four patches in the middle of each image white."""
    patches = patches_of(images).clone()
    middle = torch.tensor([5, 6, 9, 10])
    chosen = middle[torch.rand(len(images), 4, generator=generator).argsort(1)[:, : int(count)]]
    patches.scatter_(1, chosen[:, :, None, None, None].expand(-1, -1, *patches.shape[2:]), 255)
    return from_patches(patches)


# -- sets of images ----------------------------------------------------------------------------------------------------


def class_swaps(images: Tensor, classes: Tensor, percent: float, generator: Generator) -> Tensor:
    """Exchanges `percent` of the images with images of other classes, so that they have wrong labels.

    The set of images stays the same; only their weights change, because a class has the weight of its label.
    """
    drawn = torch.randperm(len(images), generator=generator)[: round(len(images) * percent / 100)]
    drawn = drawn[classes[drawn].argsort(stable=True)]
    largest = int(torch.bincount(classes[drawn]).max())  # so many places on, the class is another one
    result = images.clone()
    result[drawn] = images[drawn.roll(largest)]
    return result


def repeats(images: Tensor, classes: Tensor, distinct: float, generator: Generator) -> Tensor:
    """Leaves `distinct` different images, equally many of each class, which take the places of the others."""
    result = images.clone()
    for number in classes.unique().tolist():
        own = (classes == number).nonzero().flatten()
        each = int(distinct) // len(classes.unique())
        kept = own[torch.randperm(len(own), generator=generator)[:each]]
        result[own] = images[kept[torch.arange(len(own)) % len(kept)]]
    return result


def lost_classes(images: Tensor, classes: Tensor, lost: float, generator: Generator) -> Tensor:
    """Replaces all images of `lost` classes by images of the other ones, drawn with equal shares of classes."""
    gone = torch.isin(classes, torch.randperm(int(classes.max()) + 1, generator=generator)[: int(lost)])
    left = (~gone).nonzero().flatten()
    weights = class_weights(classes[left])
    drawn = torch.multinomial(weights, int(gone.sum()), replacement=True, generator=generator)
    result = images.clone()
    result[gone] = images[left[drawn]]
    return result


ROWS: dict[str, Row] = {
    "blur": Row("blur of 0.5, 1, 2 pixels", (0.5, 1, 2), blur),
    "noise": Row("noise of 8, 25, 60 grey levels", (8, 25, 60), noise),
    "jpeg": Row("JPEG of quality 60, 30, 10", (60, 30, 10), jpeg),
    "hue": Row("colours turned by 10, 30, 90 degrees", (10, 30, 90), hue),
    "hatching": Row("checkerboard of 4, 12, 30 grey levels", (4, 12, 30), hatching),
    "shuffle": Row("4, 8, 16 of 16 patches shuffled", (4, 8, 16), shuffled_patches),
    "holes": Row("1, 2, 4 white squares of 8 x 8 pixels", (1, 2, 4), holes),
    "swaps": Row("25, 50, 100 % of images under another class's label", (25, 50, 100), class_swaps),
    "repeats": Row("200, 50, 10 different images, repeated", (200, 50, 10), repeats),
    "lost": Row("1, 2, 5 of ten classes missing", (1, 2, 5), lost_classes),
}
COPIES = "as many training images"


# -- the table ---------------------------------------------------------------------------------------------------------


class Validation:
    """Ratios of one extractor. Extracts the training and the held-out images once."""

    def __init__(self, extractor: Extractor, data: JudgeData) -> None:
        self.extractor, self.data = extractor, data
        self.train_features = self._features(data.train.images)
        self.reference: Factored = factorise(weighted_gaussian(self.train_features, data.train.classes))
        self.floor = self._distance(self._features(data.heldout.images))

    def ratio(self, images: Tensor) -> float:
        """The ratio of images that stand in the places of the held-out ones, under their labels."""
        return self._distance(self._features(images)) / self.floor

    def row(self, name: str, strengths: Sequence[float] | None = None) -> list[float]:
        """The ratios of one row of ROWS, from its weakest to its strongest degradation."""
        row, heldout = ROWS[name], self.data.heldout
        return [
            self.ratio(row.degrade(heldout.images, heldout.classes, strength, seeded(name, strength)))
            for strength in (row.strengths if strengths is None else strengths)
        ]

    def copies(self) -> float:
        """The ratio of training images in the numbers in which the classes are held out."""
        chosen = like_heldout(self.data)
        return self._distance(self.train_features[chosen]) / self.floor

    def table(self) -> dict[str, list[float]]:
        """All rows by name, and COPIES."""
        return {name: self.row(name) for name in ROWS} | {COPIES: [self.copies()]}

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.extractor(batch).pooled.cpu() for batch in images.split(BATCH)])

    def _distance(self, features: Tensor) -> float:
        return frechet_distance(weighted_gaussian(features, self.data.heldout.classes), self.reference)


def seeded(name: str, strength: float) -> Generator:
    """The generator of one cell of the table."""
    return torch.Generator().manual_seed(derive("degradation", name, f"{strength:g}"))


def weighted_gaussian(features: Tensor, classes: Tensor) -> Gaussian:
    """Mean and covariance of features (N, D) with the same weight for every class."""
    moments = Moments.zeros(features.shape[1], groups=1)
    moments.add(features, torch.arange(len(features)), class_weights(classes))
    return moments.total()


def like_heldout(data: JudgeData) -> Tensor:
    """(N,) positions of training images whose classes are those of the held-out images, in their order."""
    generator = seeded(COPIES, 0)
    positions = torch.empty(len(data.heldout), dtype=torch.int64)
    for number in data.heldout.classes.unique().tolist():
        own = (data.train.classes == number).nonzero().flatten()
        places = data.heldout.classes == number
        positions[places] = own[torch.randperm(len(own), generator=generator)[: int(places.sum())]]
    return positions


def faults_of(table: dict[str, list[float]]) -> list[str]:
    """Why a judge with this table may not be shipped, one line each; none if it sees every degradation."""
    faults = []
    for name, row in ROWS.items():
        values = table[name]
        shown = ", ".join(f"{value:.3f}" for value in values)
        if sorted(values) != values:
            faults.append(f"{row.title}: {shown} do not rise with the strength")
        if values[1] < LEAST_AT_SECOND:
            faults.append(f"{row.title}: {shown}; the second is below {LEAST_AT_SECOND}")
    return faults
