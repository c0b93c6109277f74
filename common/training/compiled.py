"""Compiles the blocks of a network: one set of graphs for training and one for sampling.

Dynamo keeps graphs per function. We pass it one small function for training and one for sampling, so all blocks share
the graphs of each. The two must not share one function: they run with different shapes, dtypes and modes, so one could
use up the graph limit of the other or make dynamo treat its shapes as symbols.
Training never falls back to uncompiled code silently: it stops with an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch.utils.checkpoint import checkpoint

from pixlat.common.errors import UserError
from pixlat.common.frozen.base import Frozen

if TYPE_CHECKING:
    from pixlat.common.method import Method


BACKEND = "inductor"
# Limit of graphs for all blocks together, in training and in sampling. Dynamo's default of 8 is soon used up
# by two token counts, dropout and partial batches.
GRAPHS_AT_MOST = 64


def compile_blocks(method: Method, recompute: bool = False) -> None:
    """Makes the method's blocks compile at their first call. Drops the graphs of earlier methods in this process.

    recompute: in training, keep only the inputs of each block and compute the block again in the backward pass.
    Training raises UserError if a block cannot be compiled as one graph, or needs more than GRAPHS_AT_MOST graphs.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = GRAPHS_AT_MOST
    torch._dynamo.config.optimize_ddp = False  # it would split each block's graph at the borders of gradient buckets
    training = torch.compile(
        _recomputed_block if recompute else _training_block, dynamic=False, fullgraph=True, backend=BACKEND
    )
    sampling = torch.compile(_sampling_block, backend=BACKEND)
    for block in (*method.blocks(), *method.frozen_blocks()):
        block.forward = partial(_call, block, training, sampling)


def _call(
    block: nn.Module, training: Callable[..., Any], sampling: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if not block.training:
        return sampling(block, *args, **kwargs)
    try:
        return training(block, *args, **kwargs)
    except FailOnRecompileLimitHit as error:
        raise UserError(
            f"train.compile=true: the blocks of this network are called in more than {GRAPHS_AT_MOST} ways (shapes, "
            f"types, options), and torch must compile each way separately. The last one was in {type(block).__name__}. "
            "Set train.compile=false."
        ) from error
    except Unsupported as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"train.compile=true: {type(block).__name__} cannot be compiled as a whole: "
            f"{reason}. Set train.compile=false."
        ) from error


def compile_frozen(method: nn.Module) -> None:
    """Compiles the frozen networks of a method, in place. Call it after `compile_blocks`, which drops all graphs.

    Dynamo receives each network as a separate function, so its graphs do not count towards the limit of the blocks.
    After a batch of a second size, dynamo compiles a graph for any size. A part that cannot be compiled runs
    uncompiled. Neither changes a result, and the lost time is small.
    """
    for frozen in [module for module in method.modules() if isinstance(module, Frozen)]:
        for owner, name in frozen.working_parts():
            if name not in vars(owner):  # otherwise it is compiled already
                setattr(owner, name, torch.compile(getattr(owner, name), backend=BACKEND))


# Dynamo keeps one set of graphs for each of these functions. They call `type(block).forward`, because
# `compile_blocks` has replaced the attribute `block.forward` with `_call`.


def _training_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


def _recomputed_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def _sampling_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)
