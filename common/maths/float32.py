"""Helpers for computations that need float32 precision even under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Converts bf16 and float16 to float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Turns autocast off on x's device inside the `with` block.

    The meta device, on which costs are counted, has no autocast to turn off.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
