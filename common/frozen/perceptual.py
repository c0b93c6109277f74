"""Perceptual distances between images, one number per pair.

Every distance is a frozen network with `load()`. It takes two image batches (B, 3, H, W) in [-1, 1], not clamped,
and returns (B,), differentiable in both. All distances compute in float32 even under autocast, because they subtract
nearly equal features. On GPUs, train.precision=tf32 turns their matrix products into TF32. Convolutions follow
cuDNN's own setting, which PyTorch leaves at TF32.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of
from pixlat.common.frozen.base import IMAGENET_MEAN, IMAGENET_STD, Frozen, channel_constants, skeleton
from pixlat.common.frozen.efficientnet_lite0 import WEIGHTS_SHA256, EfficientNetLite0
from pixlat.common.maths.float32 import without_autocast
from pixlat.common.weights.hub import hub_checkpoint_file, hub_file
from pixlat.common.weights.tensors import load_strictly, read_tensors


def unit_channels(features: Tensor) -> Tensor:
    """Scales the channel vector of each position of (B, C, H, W) to length 1.

    The gradient at a zero vector is zero, not NaN.
    """
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


VGG16_NAME, VGG16_URL = "vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_TAPS = (3, 8, 15, 22, 29)  # ReLU 1_2, 2_2, 3_3, 4_3, 5_3 in `features`
VGG16_CHANNELS = (64, 128, 256, 512, 512)
# in the package lpips; the same file (md5 d507d7349b931f0638a25a48a722f98a) as in taming-transformers
LPIPS_HEADS = "weights/v0.1/vgg.pth"


class Lpips(Frozen):
    """LPIPS v0.1 on VGG16 (arXiv 1801.03924).

    The weighted squared difference of unit-length features, averaged over positions and summed over five layers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | None = None) -> None:
        """weights: torchvision's VGG16 file or its folder; None for torch's hub cache."""
        from torchvision.models import vgg16

        super().__init__()
        self.weights = weights
        self.features = skeleton(lambda: vgg16().features[: VGG16_TAPS[-1] + 1])
        self.heads = skeleton(
            lambda: nn.ParameterList([nn.Parameter(torch.empty(1, channels, 1, 1)) for channels in VGG16_CHANNELS])
        )
        for module in self.features:
            if isinstance(module, nn.ReLU):
                module.inplace = False  # the features before it may be one of the five compared maps
        self.register_buffer("mean", 2 * channel_constants(IMAGENET_MEAN) - 1, persistent=False)
        self.register_buffer("std", 2 * channel_constants(IMAGENET_STD), persistent=False)
        self.eval()

    def load(self) -> None:
        file = hub_checkpoint_file(VGG16_NAME, VGG16_URL, self.weights, licence="BSD-3-Clause (torchvision)")
        heads = lpips_heads()
        state = {name: tensor for name, tensor in read_tensors(file).items() if not name.startswith("classifier.")}
        load_strictly(
            self, state | {f"heads.{k}": heads[f"lin{k}.model.1.weight"] for k in range(len(VGG16_TAPS))}, file
        )
        self.sha256 = sha256_of(file)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) for images (B, 3, H, W) of at least 16 pixels a side."""
        with without_autocast(x):
            pairs = zip(self.heads, self.maps(x.float()), self.maps(y.float()), strict=True)
            return torch.stack([(head * (a - b).square()).sum(dim=1).mean(dim=(1, 2)) for head, a, b in pairs]).sum(
                dim=0
            )

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self, "maps")]

    def maps(self, images: Tensor) -> list[Tensor]:
        """The unit-length features of the five layers."""
        x, maps = (images - self.mean) / self.std, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in VGG16_TAPS:
                maps.append(unit_channels(x))
        return maps


def lpips_heads() -> dict[str, Tensor]:
    """The learned layer weights from the files of the package lpips, without importing the package."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise UserError(
            "LPIPS needs the learned layer weights in the package lpips (BSD-2-Clause). Install it: pip install lpips"
        )
    return read_tensors(Path(spec.origin).parent / LPIPS_HEADS)


CONVNEXT_REPOSITORY = "facebook/convnextv2-base-22k-224"
CONVNEXT_DEPTHS, CONVNEXT_WIDTHS = (3, 3, 27, 3), (128, 256, 512, 1024)
# Hugging Face's names to timm's, applied in order.
CONVNEXT_RENAMES = (
    (r"^convnextv2\.", ""),
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"(blocks\.\d+)\.grn\.", r"\1.mlp.grn."),
    (r"^layernorm\.", "head.norm."),
    (r"(blocks\.\d+)\.layernorm\.", r"\1.norm."),
)


class ConvNeXtDistance(Frozen):
    """Sum of squared differences of ConvNeXt V2-B's pooled, normalised features (1024), as in pMF.

    As in pMF's code, the network gets the image in [-1, 1] directly, not normalised by ImageNet's mean and deviation.
    """

    def __init__(
        self,
        weights: str | None = None,
        depths: Sequence[int] = CONVNEXT_DEPTHS,
        widths: Sequence[int] = CONVNEXT_WIDTHS,
    ) -> None:
        """weights: a folder or file of facebook/convnextv2-base-22k-224 (or the same network in timm's names);
        None for the Hugging Face cache.
        """
        super().__init__()
        self.weights = weights
        self.network = skeleton(lambda: convnext_v2(depths, widths))
        self.eval()

    def load(self) -> None:
        file = hub_file(CONVNEXT_REPOSITORY, given=self.weights, licence="CC BY-NC 4.0 (the authors' repository)")
        load_strictly(self.network, rename_convnext(read_tensors(file)), file)
        self.sha256 = sha256_of(file)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) for images (B, 3, H, W) of at least 32 pixels a side; the network was trained at 224."""
        with without_autocast(x):
            return (self.network(x.float()) - self.network(y.float())).square().sum(dim=1)

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self.network, "forward")]


def convnext_v2(depths: Sequence[int], widths: Sequence[int]) -> nn.Module:
    """timm's ConvNeXt V2 without classifier: LayerNorms with eps 1e-6, exact GELU, mean pooling before the last norm.

    We replace its global response norm: the reference has sqrt(sum x^2 + 1e-6), the library sqrt(sum x^2).
    """
    from timm.models.convnext import ConvNeXt

    network: Any = ConvNeXt(num_classes=0, depths=tuple(depths), dims=tuple(widths), use_grn=True, ls_init_value=None)
    for stage in network.stages:
        for block in stage.blocks:
            block.mlp.grn = GlobalResponseNorm(block.mlp.fc1.out_features)
    return network


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's x + weight x N(x) + bias for x (B, H, W, C).

    N is the norm over positions, divided by its mean over channels.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        norm = (x.square().sum(dim=(1, 2), keepdim=True) + self.eps).sqrt()
        return x + self.weight * (x * (norm / (norm.mean(dim=-1, keepdim=True) + self.eps))) + self.bias


def rename_convnext(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames a released state to timm's names and drops the classifier."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in CONVNEXT_RENAMES:
            name = re.sub(pattern, replacement, name)
        if not name.startswith(("classifier.", "head.fc.")):
            renamed[name] = tensor.flatten() if ".grn." in name else tensor
    return renamed


EMBEDDED_SIZE = 64  # pixels
EMBEDDED_STAGES = (0, 1, 2, 4)  # 16, 24, 40 and 112 channels at 1/2, 1/4, 1/8 and 1/16


class EmbeddedDistance(Frozen):
    """A perceptual distance that needs no download: it uses EfficientNet-Lite0 instead of VGG.

    It is the sum of two terms. The first is the squared difference of unit-length features, averaged over positions
    as in LPIPS and over four stages. The second is that difference for the deepest stage after pooling; like pMF's
    ConvNeXt term it ignores positions. Two unrelated images have a distance of about 2. The last stage is left out,
    because the evaluator scores with it.
    """

    def __init__(self, size: int = EMBEDDED_SIZE) -> None:
        """size: side in pixels to which images are resized, a multiple of 16; the cost grows with its square."""
        super().__init__()
        self.size = size
        self.network = EfficientNetLite0(loaded=False)

    def load(self) -> None:
        self.network.load()
        self.sha256 = WEIGHTS_SHA256

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) for images (B, 3, H, W) of any size."""
        with without_autocast(x):
            pairs = list(zip(self.maps(x.float()), self.maps(y.float()), strict=True))
            places = torch.stack([_unit_distance(a, b) for a, b in pairs]).mean(dim=0)
            a, b = (features.mean(dim=(2, 3), keepdim=True) for features in pairs[-1])
            return places + _unit_distance(a, b)

    def working_parts(self) -> list[tuple[nn.Module, str]]:
        return [(self.network, "stages")]

    def maps(self, images: Tensor) -> list[Tensor]:
        """The features of the compared stages.

        Images are resized as in the evaluator, but not clipped, because clipping would stop gradients.
        """
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(
                images, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False
            )
        stages = self.network.stages((images + 1) * 127.5, EMBEDDED_STAGES[-1] + 1)
        return [stages[index] for index in EMBEDDED_STAGES]


def build_distance(name: str, weights: str | None) -> Frozen | None:
    """Builds the perceptual distance "embedded", "lpips" or "convnext" without loading it; for "none" returns None.

    weights: the file or folder of the VGG16 (lpips) or ConvNeXt weights; None for the usual caches.
    """
    if name == "none":
        return None
    if name == "embedded":
        return EmbeddedDistance()
    return {"lpips": Lpips, "convnext": ConvNeXtDistance}[name](weights)


def _unit_distance(a: Tensor, b: Tensor) -> Tensor:
    return (unit_channels(a) - unit_channels(b)).square().sum(dim=1).mean(dim=(1, 2))
