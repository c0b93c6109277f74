"""The base class of networks that were trained elsewhere and are used here without training them.

It switches gradients off, sets the memory layout on GPUs and names the parts to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


class Frozen(nn.Module):
    """A network whose weights get no gradients and which is always in evaluation mode.

    The constructor creates it without weights, so that costs can be counted without the file; `load` reads them.
    Subclasses set `sha256` in `load`.
    On GPUs the weights of the convolutions are stored channels-last, because the fastest kernels need that.
    On CPUs this is not faster, so they stay as loaded.
    """

    sha256: str | None = None  # digest of the weight file, once loaded

    def load(self) -> None:
        """Reads the weights from their file; raises UserError with what to get if the file is missing.

        Call it before you move the network to a device.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, even if the module that contains it is set to training mode."""
        return super().train(False)

    def working_parts(self) -> Sequence[tuple[nn.Module, str]]:
        """The functions that do most of the work, as (module, function name), for `compile_frozen`.

        They map tensors to tensors without branches on data.
        """
        return ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Extends the hook that `to`, `cuda` and the containing module's `to` call."""
        super()._apply(fn, recurse)
        if any(p.is_cuda for p in self.parameters()):
            lay_channels_last(self)
        return self

    def num_parameters(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())


def lay_channels_last(module: nn.Module) -> None:
    """Stores the weights of all convolutions channels-last, in place.

    The values and so the digests stay the same; results may differ by rounding.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def skeleton(make: Callable[[], Any]) -> Any:
    """Calls `make` on the meta device: nothing is initialised, and nobody mistakes the network for a loaded one.

    While memory is estimated with fake tensors, the network gets fake tensors instead. They are created after `make`,
    because libraries compute with real tensors while they build a network.
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
