"""Small pMF models, inputs and draws for the tests."""

import numpy as np
import torch

from pixlat.methods.base import DataInfo
from pixlat.methods.pmf.config import PMFConfig
from pixlat.methods.pmf.method import PMFMethod
from pixlat.methods.pmf.objective import Draws
from pixlat.methods.pmf.reference import released_name

TINY = {"depth": 4, "head_depth": 2, "width": 96, "heads": 6, "patch": 8}  # the specification's fixture
SMALL = {
    "depth": 2,
    "head_depth": 1,
    "width": 24,
    "heads": 2,
    "patch": 4,
    "bottleneck": 8,
    "class_tokens": 2,
    "guidance_tokens": 1,
    "time_tokens": 2,
}


def make(size=32, classes=1000, **config):
    return PMFMethod(PMFConfig(**config), DataInfo("test", classes, size, 100))


def small(**config):
    """3 classes of 8 px images, every layer filled, so that all paths matter."""
    torch.manual_seed(0)
    method = make(8, 3, **{**SMALL, **config})
    with torch.no_grad():
        for parameter in method.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return method


def wave(frequency, count):
    return torch.from_numpy(np.sin(frequency * np.arange(count * 3 * 32 * 32)).astype(np.float32)).reshape(
        count, 3, 32, 32
    )


def fixture_method(**config):
    """The fixture's weights: released names, sorted; element j of name k is 0.1 sin(0.7 j + k), plus 1 for norms."""
    method = make(**TINY, **config)
    parameters = {released_name(name).removeprefix("net."): p for name, p in method.named_parameters()}
    assert len(parameters) == 111
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(parameters.items())):
            values = 0.1 * np.sin(0.7 * np.arange(p.numel()) + k) + (1.0 if "norm" in name else 0.0)
            p.copy_(torch.from_numpy(values.astype(np.float32)).reshape(p.shape))
    return method


def draws_of(flow_matching, noise, **given):
    """Draws from lists; the first samples match flows, and nothing is dropped unless said."""
    count = len(noise)
    lists = {"dropped": [False] * count, **given}
    tensors = {
        name: torch.tensor(values, dtype=torch.bool if name == "dropped" else noise.dtype)
        for name, values in lists.items()
    }
    return Draws(**tensors, noise=noise, flow_matching=flow_matching)


def mixed_draws(size=8, dtype=torch.float64):
    """Six samples: two that match flows (one of them without its class, one below the clip),
    and four that do not (one of them without its class).
    """
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(6, 3, size, size, generator=generator, dtype=dtype)
    return draws_of(
        2,
        noise,
        t=[0.9, 0.02, 0.95, 0.6, 0.04, 0.5],
        r=[0.9, 0.02, 0.3, 0.1, 0.01, 0.0],
        omega=[1.5, 3.0, 7.0, 2.0, 4.0, 5.0],
        t_min=[0.0, 0.0, 0.1, 0.4, 0.0, 0.1],
        t_max=[1.0, 1.0, 0.7, 0.9, 0.8, 0.9],
        dropped=[True, False, False, False, False, True],
    )
