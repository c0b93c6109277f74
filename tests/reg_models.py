"""Small SiT, REPA, REG and DiT models for the tests, with a frozen stand-in for the tokenizer and the teacher."""

import torch
from torch import nn

from pixlat.methods.base import DataInfo
from pixlat.methods.reg import latent, method
from pixlat.methods.reg.config import DitConfig, RegConfig, RepaConfig, SitConfig
from pixlat.methods.reg.diffusion import DitMethod
from pixlat.methods.reg.method import RegMethod, RepaMethod, SitMethod

INFO = DataInfo("toy", num_classes=3, image_size=16, num_train=40)
SMALL = {"depth": 3, "width": 24, "heads": 2, "patch": 2}
ALIGN = {"align_after": 2, "projector_width": 16}
CHANNELS, SIDE = 4, 8


class PoolTokenizer(nn.Module):
    """2 x 2 means of the colours and of their mean as latents, with a spread of 0.1; decoding repeats.

    Latents are doubled and shifted by 0.25.
    """

    name, channels, factor, sha256 = "pool", CHANNELS, 2, "0" * 64

    def __init__(self):
        super().__init__()
        self.encoder = nn.AvgPool2d(2)
        self.decoder = nn.Upsample(scale_factor=2)

    def load(self):
        self.loaded = True

    def num_parameters(self):
        return 0

    def encode_moments(self, images):
        mean = self.encoder(images)
        mean = torch.cat((mean, mean.mean(dim=1, keepdim=True)), dim=1)
        return mean, torch.full_like(mean, 0.1)

    def normalise(self, z):
        return 2 * (z - 0.25)

    def decode(self, latents):
        return self.decoder(latents[:, :3] / 2 + 0.25)


class PatchTeacher(nn.Module):
    """Means over 4 x 4 pixels of fixed mixtures of the colours as patch tokens;
    their maxima (or some of them) as class token.
    """

    channels = 6

    def __init__(self, pooled_channels=6):
        super().__init__()
        self.pooled_channels = pooled_channels
        self.mix = nn.Conv2d(3, 6, 4, stride=4)
        torch.nn.init.normal_(self.mix.weight, generator=torch.Generator().manual_seed(0))

    def load(self):
        self.loaded = True

    def grid(self, image_size):
        return image_size // 4

    def forward(self, images):
        return self.mix(images)

    def represent(self, images):
        tokens = self.mix(images)
        return tokens, tokens.amax(dim=(2, 3))[:, : self.pooled_channels]


CLASSES = {
    "sit": (SitMethod, SitConfig, {}),
    "repa": (RepaMethod, RepaConfig, ALIGN),
    "reg": (RegMethod, RegConfig, ALIGN),
    "dit": (DitMethod, DitConfig, {}),
}


def make(name, monkeypatch, pooled_channels=6, **config):
    """A method whose frozen networks are the stand-ins, in evaluation mode,
    with every zero-initialised weight filled.
    """
    monkeypatch.setattr(latent, "build_tokenizer", lambda name, path: PoolTokenizer())
    monkeypatch.setattr(method, "build_encoder", lambda name, path: PatchTeacher(pooled_channels))
    method_class, config_class, defaults = CLASSES[name]
    torch.manual_seed(0)
    return method_class(config_class(**{**SMALL, **defaults, **config}), INFO)


def randomized(built, std=0.2):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=std)
    return built.eval()


def batch(size=4):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1,
        "label": torch.arange(size) % INFO.num_classes,
        "index": torch.arange(size),
    }


class Impulses:
    """Stands in for `Noise` of count + 1 images: draw k is 1 in image k and 0 in the others,
    so the last image shows what no noise would do.

    The sampler is affine in its draws, so its images give the mean and variance of its results exactly.
    """

    def __init__(self, draws):
        self.count, self.draw = draws + 1, 0

    def normal(self, *shape):
        out = torch.zeros(self.count, *shape)
        if self.draw < self.count - 1:
            out[self.draw] = 1.0
        self.draw += 1
        return out
