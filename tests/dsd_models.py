"""Small DSD models for the tests."""

from typing import Any

import torch

from pixlat.methods.base import Batch, DataInfo
from pixlat.methods.dsd.config import DsdConfig
from pixlat.methods.dsd.method import DsdMethod

INFO = DataInfo("toy", num_classes=3, image_size=8, num_train=40)  # as tests/toys.py
BARE: dict[str, Any] = {"perceptual": "none", "gan_weight": 0.0, "align": "none"}
SMALL: dict[str, Any] = {
    "depth": 3,
    "width": 32,
    "heads": 4,
    "patch": 2,
    "latent_channels": 8,
    "projector_width": 24,
    "health_every": 2,
    **BARE,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "naive": {"target": "live", "predict": "v", "ema": False, "mask": False},
    "stopgrad": {"predict": "v", "ema": False, "mask": False},
    "clean": {"ema": False, "mask": False},
    "live clean": {"target": "live", "ema": False, "mask": False},
    "live mask": {"target": "live", "ema": False},
    "mask only": {"ema": False},
    "ema only": {"mask": False},
    "detached input": {"input_grad": False},
    "batch norm": {"latent_norm": "bn"},
    "no norm": {"latent_norm": "none"},
    "live velocity head": {"velocity_head_detach": False},
    "velocity head that sees the latent": {"velocity_latent": True},
    "no reconstruction": {"rec_weight": 0.0},
    "no auxiliary terms": {"self_weight": 0.0, "cls_weight": 0.0},
    "logit-normal times": {"time": "logit_normal"},
}


def make(**changes: Any) -> DsdMethod:
    """The same small method each time, with nothing hidden behind layers of zeros."""
    torch.manual_seed(0)
    method = DsdMethod(DsdConfig(**{**SMALL, **changes}), INFO)
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.05)
    return method


def batch(size: int = 6) -> Batch:
    """Uniform noise images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, INFO.image_size, INFO.image_size, generator=generator) * 2 - 1
    return {"image": images, "label": torch.arange(size) % INFO.num_classes, "index": torch.arange(size)}
