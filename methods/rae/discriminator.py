"""The released recipe's discriminator: five heads on a frozen DINO ViT-S/8, as in StyleGAN-T (arXiv 2301.09515)."""

from __future__ import annotations

from functools import partial

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from pixlat.common.files import sha256_of
from pixlat.common.frozen.base import IMAGENET_MEAN, IMAGENET_STD, Frozen, channel_constants, skeleton
from pixlat.common.layers.discriminators import FeatureDiscriminator, PatchDiscriminator
from pixlat.common.weights.hub import hub_file
from pixlat.common.weights.tensors import load_strictly, read_tensors

REPOSITORY, FILE = "nyu-visionx/RAE-collections", "discs/dino_vit_small_patch8_224.pth"
ARCHITECTURE = "vit_small_patch8_224"  # timm's name; its parameters have the same names as in the file
WIDTH, INPUT_SIZE = 384, 224
TAPS = (2, 5, 8, 11)  # blocks whose outputs the heads get
LIGHT_WIDTHS = (32, 64, 128)


class DinoFeatures(Frozen):
    """Maps images in [-1, 1] to five maps (B, 384, 784) of patch tokens.

    The output of the last block appears twice, because the released code puts the network's output in front of the
    maps. So two of the heads see the same tokens. As in the released code, GELU is the tanh approximation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | None) -> None:
        """weights: the weight file or its folder; None for the Hugging Face cache."""
        super().__init__()
        self.weights = weights
        self.network = skeleton(
            lambda: timm.create_model(ARCHITECTURE, num_classes=0, act_layer=partial(nn.GELU, approximate="tanh"))
        )
        self.register_buffer("mean", channel_constants(IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", channel_constants(IMAGENET_STD), persistent=False)
        self.eval()

    def load(self) -> None:
        """Loads the released weights, but sets the key biases to 0, because they do not change the attention."""
        file = hub_file(
            REPOSITORY, [FILE], self.weights, key="model.discriminator_weights", licence="Apache-2.0 (DINO)"
        )
        state = {name: tensor for name, tensor in read_tensors(file).items() if not name.startswith("head.")}
        for name, tensor in state.items():
            if name.endswith("attn.qkv.bias"):
                tensor[WIDTH : 2 * WIDTH] = 0
        load_strictly(self.network, state, file)
        self.sha256 = sha256_of(file)

    def forward(self, images: Tensor) -> list[Tensor]:
        resized = F.interpolate((images + 1) / 2, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
        maps = self.network.forward_intermediates(
            (resized - self.mean) / self.std, indices=list(TAPS), norm=False, output_fmt="NLC", intermediates_only=True
        )
        return [tokens.transpose(1, 2) for tokens in (maps[-1], *maps)]


def build_discriminator(kind: str, weights: str | None) -> nn.Module:
    """Builds "dino", or "light": a small convolutional network that needs no pretrained weights."""
    if kind == "light":
        return PatchDiscriminator(3, LIGHT_WIDTHS)
    return FeatureDiscriminator(DinoFeatures(weights), [WIDTH] * (len(TAPS) + 1))
