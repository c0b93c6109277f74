"""Small JiT models and inputs for the tests."""

import numpy as np
import torch

from pixlat.methods.base import DataInfo
from pixlat.methods.jit.config import JiTConfig
from pixlat.methods.jit.method import JiTMethod

TINY = {"depth": 4, "width": 96, "heads": 6, "patch": 8, "bottleneck": 24, "context_tokens": 5, "context_start": 2}
SMALL = {"depth": 2, "width": 24, "heads": 2, "patch": 4, "bottleneck": 8, "context_tokens": 2, "context_start": 1}


def make(size=32, classes=1000, **config):
    return JiTMethod(JiTConfig(**config), DataInfo("test", classes, size, 100))


def randomized(method, std=0.2):
    """The method with every zero-initialised layer filled, so that all its paths matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "modulation" in name or "final.linear" in name:
                parameter.normal_(std=std)
    return method.eval()


def wave(frequency):
    return torch.from_numpy(np.sin(frequency * np.arange(2 * 3 * 32 * 32)).astype(np.float32)).reshape(2, 3, 32, 32)
