"""Activation checkpointing of blocks: less memory for about a third more computation, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from pixlat.common.method import Method


def recompute_blocks(method: Method) -> None:
    """Makes each block keep only its inputs and compute its activations again in the backward pass.

    The second pass has the same dropout and autocast, so the gradients are the same.
    """
    for block in method.blocks():
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (
        checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if torch.is_grad_enabled()
        else forward(*args, **kwargs)
    )
