"""Both stages of RAE around a toy encoder, for tests of what does not depend on a real one."""

import torch
import torch.nn.functional as F

import pixlat.methods.rae.decoder
import pixlat.methods.rae.method
from pixlat.common.frozen.base import Frozen
from pixlat.methods.base import DataInfo
from pixlat.methods.rae.config import DECODERS, DecoderConfig, DecoderShape, RaeConfig
from pixlat.methods.rae.decoder import DecoderMethod
from pixlat.methods.rae.method import RaeMethod

INFO = DataInfo("toy", num_classes=3, image_size=8, num_train=40)
NETWORK = {"width": 16, "depth": 1, "heads": 2, "head_width": 24, "head_depth": 1, "head_heads": 2}


class ToyEncoder(Frozen):
    """Means and slopes of 2 x 2 pixels: 6 channels, 4 x 4 tokens of an image of 8."""

    name, channels = "toy", 6
    pixel_mean, pixel_std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)

    def __init__(self):
        super().__init__()
        self.loaded, self.batches = False, []

    def grid(self, image_size):
        return image_size // 2

    def load(self):
        self.loaded, self.sha256 = True, "e" * 64

    @torch.no_grad()
    def forward(self, images):
        self.batches.append(len(images))
        return torch.cat((F.avg_pool2d(images, 2), F.avg_pool2d(images.roll(1, dims=3) - images, 2)), dim=1)


def use_toys(monkeypatch):
    """Puts the toy encoder and a tiny decoder in the place of the real ones."""
    for module in (pixlat.methods.rae.decoder, pixlat.methods.rae.method):
        monkeypatch.setattr(module, "build_encoder", lambda name, weights: ToyEncoder())
    monkeypatch.setitem(DECODERS, "demo", DecoderShape(16, 1, 2, 32))


def stage1(**changes):
    """The same untrained decoder each time; light discriminator, no perceptual distance."""
    torch.manual_seed(0)
    config = DecoderConfig(
        **{"encoder": "toy", "size": "demo", "perceptual": "none", "discriminator": "light", **changes}
    )
    method = DecoderMethod(config, INFO)
    method.load_external()
    return method


def stage2(load=True, **changes):
    """The same untrained DiT-DH each time."""
    torch.manual_seed(0)
    method = RaeMethod(RaeConfig(**{"encoder": "toy", "decoder_size": "demo", **NETWORK, **changes}), INFO)
    if load:
        method.load_external()
    return method


def batch(size=4, seed=0):
    """Random images of the toy data."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(size, 3, 8, 8, generator=generator) * 2 - 1
    return {"image": image, "label": torch.arange(size) % 3, "index": torch.arange(size)}
