"""Frozen encoders from the package timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pixlat.common.files import sha256_of
from pixlat.common.frozen.base import skeleton
from pixlat.common.frozen.representation import (
    Representation,
    RepresentationEncoder,
    as_map,
    grid_of_16,
    resize_bicubic,
)
from pixlat.common.weights.hub import hub_file
from pixlat.common.weights.tensors import load_strictly, read_tensors


@dataclass(frozen=True)
class TimmEncoderSpec:
    """A vision transformer of timm."""

    architecture: str
    repository: str
    licence: str
    patch: int
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the architecture

    def make(self, **options: Any) -> nn.Module:
        """The network with random weights, for images of any size."""
        import timm

        network: nn.Module = timm.create_model(
            self.architecture, num_classes=0, dynamic_img_size=True, **self.options | options
        )
        return network


def _timm(size: str, version: int) -> TimmEncoderSpec:
    patch, data, licence = (14, "lvd142m", "Apache-2.0") if version == 2 else (16, "lvd1689m", "DINOv3 License")
    architecture = f"vit_{size}_patch{patch}_dinov{version}"
    return TimmEncoderSpec(architecture, f"timm/{architecture}.{data}", licence, patch)


TIMM_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
TIMM_ENCODERS = {f"timm-dinov2-{letter}": _timm(size, 2) for letter, size in TIMM_SIZES.items()} | {
    f"timm-dinov3-{letter}": _timm(size, 3) for letter, size in TIMM_SIZES.items() if letter != "g"
}


class TimmEncoder(RepresentationEncoder):
    """An encoder that is used as in REPA: normalise the image, resize it, keep the affine of the final LayerNorm.

    The resize is bicubic without antialiasing, to `patch` pixels for every 16 pixels of the image.
    Position tables are resampled from the trained grid, bicubically with antialiasing, without the prefix tokens.
    """

    def __init__(self, name: str, spec: TimmEncoderSpec, weights: str | None = None) -> None:
        """weights: a folder or file of `spec.repository`, or the authors' dinov2_vit*14_pretrain.pth;
        None for the Hugging Face cache.
        """
        network = skeleton(spec.make)
        super().__init__(name, network.embed_dim)
        self.spec = spec
        self.weights = weights
        self.network = network
        self.eval()

    def load(self) -> None:
        from timm.models import eva, vision_transformer

        file = hub_file(self.spec.repository, given=self.weights, licence=self.spec.licence)
        convert: Callable[..., dict[str, Tensor]] = (
            eva if isinstance(self.network, eva.Eva) else vision_transformer
        ).checkpoint_filter_fn
        load_strictly(self.network, convert(read_tensors(file), self.network), file)
        self._compute_tables()
        self.sha256 = sha256_of(file)

    def _compute_tables(self) -> None:
        """Fills the buffers that no file contains (DINOv3's rotary periods); a network of one block computes them."""
        if not any(buffer.is_meta for buffer in self.network.buffers()):
            return
        with torch.random.fork_rng(devices=[]):
            computed = self.spec.make(depth=1).named_buffers()
        for name, buffer in computed:
            owner, _, leaf = name.rpartition(".")
            setattr(self.network.get_submodule(owner), leaf, buffer)

    def grid(self, image_size: int) -> int:
        return grid_of_16(self.name, image_size)

    @torch.no_grad()
    def represent(self, images: Tensor) -> Representation:
        normalised = ((images + 1) / 2 - self.mean) / self.std
        tokens = self.network.forward_features(
            resize_bicubic(normalised, self.grid(images.shape[-1]) * self.spec.patch)
        )
        return Representation(as_map(tokens[:, self.network.num_prefix_tokens :]), tokens[:, 0].float())

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self.network, "forward_features")]
