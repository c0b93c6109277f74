"""Frozen encoders with one interface. Methods generate their tokens (RAE) or align with them (REPA, REG, DSD).

embedded                   EfficientNet-Lite0 at 128 px, needs no download: 112 channels on 8 x 8 positions
dinov2-reg-s, -b, -l       DINOv2 with registers (transformers), as RAE uses them
siglip2-b, mae-b           SigLIP2 and MAE (transformers), as RAE uses them
timm-dinov2-s, -b, -l, -g  DINOv2 without registers (timm), as REPA and REG use them
timm-dinov3-s, -b, -l      DINOv3 (timm)

RAE's encoders end in a LayerNorm without weight and bias, so every token has mean 0 and variance 1 over channels.
The timm encoders keep the weight and bias of their last LayerNorm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.errors import UserError, close_match
from pixlat.common.frozen import efficientnet_lite0 as lite0
from pixlat.common.frozen.encoders_timm import TIMM_ENCODERS, TimmEncoder
from pixlat.common.frozen.encoders_transformers import HUB_ENCODERS, TransformersEncoder
from pixlat.common.frozen.representation import NORM_EPS, Representation, RepresentationEncoder
from pixlat.common.maths.float32 import without_autocast


class EmbeddedEncoder(RepresentationEncoder):
    """EfficientNet-Lite0 at 128 px, in float32. The tokens are its fifth stage.

    Like RAE's encoders it ends in a LayerNorm over channels without weight and bias (eps 1e-6).
    The pooled features are the mean of the last stage over positions (320 channels), not normalised.
    """

    def __init__(self, name: str = "embedded") -> None:
        super().__init__(name, channels=112)
        self.pooled_channels = lite0.POOLED_DIMS
        self.network = lite0.EfficientNetLite0(loaded=False)

    def load(self) -> None:
        self.network.load()
        self.sha256 = lite0.WEIGHTS_SHA256

    def grid(self, image_size: int) -> int:
        return lite0.INPUT_SIZE // 16

    @torch.no_grad()
    def represent(self, images: Tensor) -> Representation:
        stages = self._stages(images, len(lite0.BLOCKS_PER_STAGE))
        return Representation(self._normalised(stages[lite0.TEACHER_STAGE]), stages[-1].mean(dim=(2, 3)))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The tokens (B, 112, 8, 8); the later stages are not computed."""
        return self._normalised(self._stages(images, lite0.TEACHER_STAGE + 1)[-1])

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self.network, "stages")]

    def _stages(self, images: Tensor, count: int) -> list[Tensor]:
        with without_autocast(images):
            return self.network.stages(lite0.resize((images.float() + 1) * 127.5), count)

    def _normalised(self, stage: Tensor) -> Tensor:
        return F.layer_norm(stage.permute(0, 2, 3, 1), (self.channels,), eps=NORM_EPS).permute(0, 3, 1, 2).contiguous()


def encoder_names() -> list[str]:
    """The names that `build_encoder` accepts."""
    return ["embedded", *HUB_ENCODERS, *TIMM_ENCODERS]


def build_encoder(name: str, weights: str | None = None) -> RepresentationEncoder:
    """Builds a frozen encoder by name; it has no weights before `load`.

    weights: a file or folder to read instead of the Hugging Face cache.
    """
    if name == "embedded":
        return EmbeddedEncoder()
    if name in HUB_ENCODERS:
        return TransformersEncoder(name, HUB_ENCODERS[name], weights)
    if name in TIMM_ENCODERS:
        return TimmEncoder(name, TIMM_ENCODERS[name], weights)
    raise UserError(
        f"encoder={name!r} is not known.{close_match(name, encoder_names())} Encoders: {', '.join(encoder_names())}."
    )
