"""Where every random number comes from.

Training is reseeded before every micro-batch from (seed, step, number of the micro-batch), so a resumed run needs no saved generator state,
evaluation cannot disturb training, and two processes with one micro-batch each draw what one process with two would.
Sampling has one generator per image, so an image depends on its own seed and on nothing else: not on the batch size, not on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit seed from the parts, the same on every machine (SHA-256, not Python's salted hash)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_step(seed: int, step: int, draw: int) -> None:
    """Reseeds torch's global generators (CPU and accelerators) for one micro-batch of one phase of a training step, the `draw`-th of the step."""
    torch.manual_seed(derive("train", seed, step, draw))


class Noise:
    """Standard normal draws for a batch of images, one CPU generator an image.

    A sampler may draw as often as it likes (initial noise, then noise at each step of an SDE): draw k of image i depends on the seeds and on k only.
    On the meta device (cost counting) nothing is drawn.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32 standard normal noise on the device."""
        if self.device.type == "meta":
            return torch.empty(len(self), *shape, device="meta")
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators]).to(self.device)


def image_seeds(seed: int, indices: Sequence[int]) -> list[int]:
    """One seed an image from the sampling seed and the image's index in the whole set."""
    return [derive("image", seed, index) for index in indices]
