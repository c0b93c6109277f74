"""A judge as an extractor of features."""

from __future__ import annotations

import torch
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.evaluation.features.extractor import Features, NetworkExtractor
from pixlat.evaluation.judges.networks import IMAGE_SIZE, NUM_CLASSES, SCALING, JudgeNetwork


class JudgeExtractor(NetworkExtractor):
    """A trained judge: normalised features, and logits of emoji32's ten classes in their order."""

    layer = "mean over positions of the last layer, shifted and scaled by constants of the file"
    resize = "none"
    scaling = SCALING
    num_classes = NUM_CLASSES
    network: JudgeNetwork

    def __init__(self, name: str, sha256: str, network: JudgeNetwork, device: torch.device | str = "cpu") -> None:
        """name: the judge's id. sha256: of the file of its weights."""
        super().__init__(network.eval().requires_grad_(False), device)
        self.id, self.sha256, self.dims = name, sha256, network.dims

    def __call__(self, images: Tensor) -> Features:
        """The features of images (B, 3, 32, 32) uint8. UserError for images of another size."""
        if images.ndim == 4 and images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            height, width = images.shape[2:]
            raise UserError(
                f"the judge {self.id} was trained on images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, and these have "
                f"{width} x {height}. It judges emoji32 only; leave it out of eval.judges for other data."
            )
        return super().__call__(images)

    def extract(self, images: Tensor) -> Features:
        pooled = self.network.pooled(images.to(self.device).float())
        return Features(self.network.normalised(pooled), self.network.classes(pooled))
