"""An in-memory cache of a frozen network's outputs for the training images, filled during the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pixlat.common.errors import UserError

LARGEST_BYTES = 8 * 2**30


class FeatureTable:
    """Caches the outputs of a frozen network for each training image and its mirror image.

    Checkpoints do not contain the cache. The network computes cached outputs one image at a time, so they do not
    depend on the batch in which an image first appears, and a resumed run continues bit for bit.
    It computes them without autocast: `before_training` may fill rows outside autocast and a resumed run fills
    the same rows inside it, so both must give the same numbers.
    """

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, ...]], num_images: int = 0) -> None:
        """compute: the network, from images (B, 3, S, S) to tensors (B, ...).

        num_images: the size of the training set to cache; 0 switches the cache off and runs the network every time.
        """
        self.compute = compute
        self.num_images = num_images
        # one tensor (N, ...) per output; (2 N, ...) if training mirrors images: rows N to 2 N are the mirror images
        self.tables: tuple[Tensor, ...] = ()
        self.missing = torch.ones(0, dtype=torch.bool)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs for a training batch with "image", "index" and, if training mirrors images, "mirrored" (B,) bool.

        Without a cache only "image" is needed.
        """
        if not self.num_images or not has_numbers(batch["image"]):
            return self.compute(batch["image"])
        row = batch["index"] + self.num_images * batch["mirrored"] if "mirrored" in batch else batch["index"]
        if not self.tables:
            first = self._compute_exactly(batch["image"][:1])
            self._make_room(first, self.num_images * (2 if "mirrored" in batch else 1))
            self._keep(first, int(row[0]))
        if self.missing.any():  # a tensor on the CPU: once all rows are filled, no step waits for the GPU
            self._fill(batch["image"], row.cpu())
        return tuple(table[row] for table in self.tables)

    def _make_room(self, example: tuple[Tensor, ...], count: int) -> None:
        size = sum(count * value[0].numel() * value.element_size() for value in example)
        if size > LARGEST_BYTES:
            raise UserError(
                f"model.remember=true would keep {size / 2**30:.1f} GiB in memory for {count} images; "
                f"the limit is {LARGEST_BYTES / 2**30:.0f} GiB. Set model.remember=false, "
                "and prepare the latents in files (`pixlat prepare latents`)."
            )
        self.tables = tuple(
            torch.empty(count, *value.shape[1:], dtype=value.dtype, device=value.device) for value in example
        )
        self.missing = torch.ones(count, dtype=torch.bool, device="cpu")

    def _fill(self, images: Tensor, rows: Tensor) -> None:
        for i, row in enumerate(rows.tolist()):
            if self.missing[row]:
                self._keep(self._compute_exactly(images[i : i + 1]), row)

    def _compute_exactly(self, images: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(images.device.type, enabled=False):
            return self.compute(images)

    def _keep(self, values: tuple[Tensor, ...], row: int) -> None:
        for table, value in zip(self.tables, values, strict=True):
            table[row] = value[0]
        self.missing[row] = False


def has_numbers(tensor: Tensor) -> bool:
    """False for the meta and fake tensors with which common/accounting counts costs: they hold no values to cache."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)
