"""Parts of a computation that must be exact to float32 under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Full precision on x's device within the block; the meta device, where costs are counted,
    has no autocast to turn off.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
