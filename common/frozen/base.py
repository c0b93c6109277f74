"""What all networks share that were trained elsewhere and are only looked through here: no gradients,
their layout on GPUs, their compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


class Frozen(nn.Module):
    """A network without gradients for its weights and always in evaluation mode.

    It is built without weights, so that costs can be counted where no file is, and `load` puts them in place.
    Subclasses set `sha256` in `load`.
    On GPUs the weights of its convolutions lie channels-last, which their fastest kernels read; on CPUs,
    where that is not faster, they stay as loaded.
    """

    sha256: str | None = None  # of the weights' file, once loaded

    def load(self) -> None:
        """Reads the weights from their file; a missing file is a UserError that says what to get.

        Call it before moving to a device.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever module contains it."""
        return super().train(False)

    def working_parts(self) -> Sequence[tuple[nn.Module, str]]:
        """(module, name of its function) of what does the work, for `compile_frozen`; tensors go in and out,
        and nothing is decided there.
        """
        return ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` and the containing module's `to` call."""
        super()._apply(fn, recurse)
        if any(p.is_cuda for p in self.parameters()):
            lay_channels_last(self)
        return self

    def num_parameters(self) -> int:
        """Numbers in its weights."""
        return sum(p.numel() for p in self.parameters())


def lay_channels_last(module: nn.Module) -> None:
    """Lays the weights of all convolutions out channels-last, in place; the numbers,
    hence digests and results but for rounding, stay the same.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def skeleton(make: Callable[[], Any]) -> Any:
    """`make()` without weights: on the meta device, so nothing is initialised and an unloaded network
    cannot be mistaken for a loaded one.

    Where memory is estimated with fake tensors, its own are made fake too;
    libraries compute with real ones while they build.
    """
    with unset_fake_temporarily(), torch.device("meta"):
        module = make().requires_grad_(False).eval()
    probe = torch.empty(0)
    return (
        module._apply(lambda tensor: probe.new_empty(tensor.shape, dtype=tensor.dtype))
        if isinstance(probe, FakeTensor)
        else module
    )


def channel_constants(values: tuple[float, ...]) -> Tensor:
    """(1, C, 1, 1), one number a channel."""
    return torch.tensor(values).view(1, -1, 1, 1)
