"""Outputs of a frozen network for the training images, kept in memory as a run goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pixlat.common.errors import UserError

LARGEST_BYTES = 8 * 2**30


class FeatureTable:
    """A frozen network's outputs for training images; where they are remembered,
    it is asked once for each image and orientation.

    It is no part of a checkpoint. Images are computed one at a time before they are kept, so that what is kept
    does not depend on the batch in which an image came first, and a run that was stopped goes on bit for bit.
    What is kept is always computed without autocast, because `before_training` may fill rows outside of it,
    and a resumed run fills them within.
    """

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, ...]], num_images: int = 0) -> None:
        """compute: images (B, 3, S, S) to tensors (B, ...); num_images:
        of the training set whose outputs are remembered, 0 to ask every time.
        """
        self.compute = compute
        self.num_images = num_images
        # each (N, ...), or (2 N, ...) where images are mirrored: the mirror images follow
        self.tables: tuple[Tensor, ...] = ()
        self.missing = torch.ones(0, dtype=torch.bool)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs for a training batch: "image", "index" and, where images may be mirrored,
        "mirrored" (B,) bool.
        """
        if not self.num_images or not has_numbers(batch["image"]):
            return self.compute(batch["image"])
        row = batch["index"] + self.num_images * batch["mirrored"] if "mirrored" in batch else batch["index"]
        if not self.tables:
            first = self._compute_exactly(batch["image"][:1])
            self._make_room(first, self.num_images * (2 if "mirrored" in batch else 1))
            self._keep(first, int(row[0]))
        if self.missing.any():  # on the host: once every image is known, nothing waits for the device
            self._fill(batch["image"], row.cpu())
        return tuple(table[row] for table in self.tables)

    def _make_room(self, example: tuple[Tensor, ...], count: int) -> None:
        size = sum(count * value[0].numel() * value.element_size() for value in example)
        if size > LARGEST_BYTES:
            raise UserError(
                f"model.remember=true would keep {size / 2**30:.1f} GiB for {count} images; "
                f"at most {LARGEST_BYTES / 2**30:.0f} are allowed. Set model.remember=false, "
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
    """False for the tensors with which costs are counted (common/accounting/macs.py):
    there is nothing in them to remember.
    """
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)
