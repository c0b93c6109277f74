"""The networks of published protocols. The package contains none of them: the user provides files with the weights.

InceptionExtractor  torch-fidelity's module and weights, TensorFlow 1 resize (FID, sFID, IS)
                    or half-pixel resize (pMF's)
CleanInception      clean-fid's TorchScript network and Pillow resize
DinoExtractor       DINOv2 ViT-L/14, class token (FD-DINOv2)

The cards in protocols/named.py describe these extractors; this module computes them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pixlat.common.errors import UserError
from pixlat.common.files import sha256_of
from pixlat.common.images.decoding import resizing_digest
from pixlat.evaluation.features.extractor import Features, NetworkExtractor
from pixlat.evaluation.protocols.named import CLEAN, DINOV2, HALF_PIXEL, INCEPTION, ExtractorCard

INCEPTION_SIZE = 299  # pixels
INCEPTION_STEM = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c",
)  # fmt: skip
INCEPTION_HEAD = ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool")
SFID_CHANNELS = 7
DINO_SIZE, DINO_PATCH = 224, 14  # pixels
DINO_OFFSET = 0.1  # the released code adds it to the grid size before it computes the scale


class CardExtractor(NetworkExtractor):
    """An extractor that a card describes. Its sha256 is that of the weights file."""

    def __init__(self, card: ExtractorCard, file: Path, network: nn.Module, device: torch.device | str) -> None:
        for parameter in network.parameters():  # a TorchScript module has no requires_grad_
            parameter.requires_grad_(False)
        super().__init__(network.eval(), device)
        self.card = card
        self.id, self.layer, self.resize, self.scaling = card.id, card.layer, card.resize, card.scaling
        self.dims, self.spatial_dims, self.num_classes = card.dims, card.spatial_dims, card.num_classes
        self.comparable_with_inception_fid = card.comparable_with_inception_fid
        self.sha256 = sha256_of(file)


def build_extractor(card: ExtractorCard, file: Path, device: torch.device | str = "cpu") -> CardExtractor:
    """The extractor that a card describes, with the weights in a file."""
    kinds: dict[str, type[Any]] = {
        INCEPTION.id: InceptionExtractor,
        HALF_PIXEL.id: InceptionExtractor,
        CLEAN.id: CleanInception,
        DINOV2.id: DinoExtractor,
    }
    extractor: CardExtractor = kinds[card.id](card, file, device)
    return extractor


# -- Inception ---------------------------------------------------------------------------------------------------------


class InceptionExtractor(CardExtractor):
    """The 2015 Inception network.

    Features: pool3 (2048), logits without bias (1008), and the first 7 channels of Mixed_6d's 1x1 branch (17 x 17 x 7 =
    2023) for sFID.
    """

    def __init__(self, card: ExtractorCard, file: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(card, file, inception_network(file), device)
        self.resized = resize_half_pixel if card.id == HALF_PIXEL.id else resize_tf1

    def extract(self, images: Tensor) -> Features:
        return inception_features(self.network, (self.resized(images.to(self.device).float()) - 128) / 128)


def inception_network(file: Path) -> nn.Module:
    """torch-fidelity's module with the weights in a file. Only tensors of the file are unpickled."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            f"Inception needs torch-fidelity ({error}). Install it: pip install 'pixlat[metrics]'"
        ) from error
    buffer = io.BytesIO()  # the module would unpickle any object in the file, so we pass a copy with tensors only
    torch.save(safe_state(file), buffer)
    buffer.seek(0)
    try:
        with torch.random.fork_rng():  # its random initialisation must not change the state of torch's generator
            network: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer
            )
    except RuntimeError as error:
        raise UserError(
            f"{file} does not hold the weights of the 2015 Inception network: {str(error)[:300]}"
        ) from error
    return network


def safe_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict in a file. Raises UserError for any other file."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types of exceptions for other files
        raise UserError(f"{file} cannot be read as PyTorch weights: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds {type(state).__name__}, not a dictionary of tensors.")
    return state


def inception_features(network: Any, x: Tensor) -> Features:
    """All features of images x (B, 3, 299, 299) in [-1, 1]."""
    for name in INCEPTION_STEM:
        x = getattr(network, name)(x)
    branch = network.Mixed_6d.branch1x1(x)[:, :SFID_CHANNELS]  # TensorFlow's mixed_6/conv, after its ReLU
    for name in INCEPTION_HEAD:
        x = getattr(network, name)(x)
    pooled = x.flatten(1)
    # the order is height, width, channel, as in ADM's mu_s
    return Features(pooled, pooled @ network.fc.weight.T, branch.permute(0, 2, 3, 1).flatten(1))


def resize_tf1(pixels: Tensor) -> Tensor:
    """Resizes (B, 3, H, W) in [0, 255] to 299 px like TensorFlow 1 in ADM's graph.

    Bilinear without antialiasing; the sample of output position i lies at i * scale.
    """
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(
        pixels, size=(INCEPTION_SIZE, INCEPTION_SIZE), align_corners=False
    )
    return resized


def resize_half_pixel(pixels: Tensor) -> Tensor:
    """Like `resize_tf1`, but the sample of output position i lies at (i + 0.5) * scale - 0.5."""
    return F.interpolate(
        pixels, size=(INCEPTION_SIZE, INCEPTION_SIZE), mode="bilinear", align_corners=False, antialias=False
    )


class CleanInception(CardExtractor):
    """clean-fid's `clean` mode.

    Pillow resizes each channel in float (bicubic with antialiasing). NVIDIA's TorchScript copy of the network follows.
    """

    def __init__(self, card: ExtractorCard, file: Path, device: torch.device | str = "cpu") -> None:
        try:
            from cleanfid.resize import build_resizer
        except ImportError as error:
            raise UserError(
                f"The clean protocol needs clean-fid ({error}). Install it: pip install 'pixlat[metrics]'"
            ) from error
        # a TorchScript file is a program, so we run only the one with the known digest
        if card.sha256 is not None and sha256_of(file) != card.sha256:
            raise UserError(
                f"{file} has sha256 {sha256_of(file)}, but clean-fid's network has {card.sha256}. Get the file again."
            )
        try:
            network = torch.jit.load(str(file), map_location="cpu")
        except RuntimeError as error:
            raise UserError(f"{file} cannot be read as a TorchScript network: {str(error).splitlines()[0]}") from error
        self.resizer: Any = build_resizer("clean")
        self.resize_digest = resizing_digest(self.resizer)
        super().__init__(card, file, network, device)

    def extract(self, images: Tensor) -> Features:
        resized = np.stack([self.resizer(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()])
        x = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        network: Any = self.network
        pooled = network.layers((x - 128) / 128).view(len(x), self.dims)
        return Features(pooled, pooled.new_empty(len(x), 0))


# -- DINOv2 ------------------------------------------------------------------------------------------------------------


class DinoExtractor(CardExtractor):
    """The class token of DINOv2 after its last norm, as the released code computes it at 224 px."""

    def __init__(
        self,
        card: ExtractorCard,
        file: Path,
        device: torch.device | str = "cpu",
        architecture: str = "vit_large_patch14_dinov2",
    ) -> None:
        super().__init__(card, file, dino_network(file, architecture), device)
        self.resize_digest = resizing_digest(pil_square)

    def extract(self, images: Tensor) -> Features:
        pixels = torch.from_numpy(
            np.stack([pil_square(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()])
        ).to(self.device)
        mean, std = (torch.tensor(v, device=self.device) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        pooled = self.network(((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2))
        return Features(pooled, pooled.new_empty(len(pooled), 0))


def dino_network(file: Path, architecture: str) -> nn.Module:
    """timm's module with Meta's weights.

    We resample the position table ourselves, because timm uses antialiasing and no offset.
    """
    import timm

    state = safe_state(file)
    state.pop("mask_token", None)
    if "pos_embed" in state:
        state["pos_embed"] = resampled_positions(state["pos_embed"], DINO_SIZE // DINO_PATCH)
    with torch.device("meta"):
        network = timm.create_model(architecture, img_size=DINO_SIZE, num_classes=0)
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{file} does not hold the weights of {architecture}: {str(error)[:300]}") from error
    module: nn.Module = network
    return module


def resampled_positions(table: Tensor, side: int) -> Tensor:
    """Resamples a position table (1, 1 + N, D) to (1, 1 + side^2, D).

    Bicubic with scale (side + 0.1) / sqrt(N). The class token's entry stays.
    """
    grid = round((table.shape[1] - 1) ** 0.5)
    if grid == side:
        return table
    positions = table[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2).float()
    scale = (side + DINO_OFFSET) / grid
    resampled = F.interpolate(positions, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat((table[:, :1], resampled.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def pil_square(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resizes (H, W, 3) uint8 to 224 px with Pillow's bicubic filter.

    It resizes the width first and then the height, because later versions of Pillow choose the order themselves.
    """
    bicubic = Image.Resampling.BICUBIC
    return np.asarray(
        Image.fromarray(image).resize((DINO_SIZE, image.shape[0]), bicubic).resize((DINO_SIZE, DINO_SIZE), bicubic)
    )
