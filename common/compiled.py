"""Compiled blocks: one set of graphs for training, which never falls back to slow code in silence, and one for sampling.

All blocks share their graphs: dynamo keeps them by the function that it was handed, and two small functions are what it is handed here. Training and
sampling meet other shapes, types and modes, so either could use up the other's graphs or turn its shapes into symbols if they shared one function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch.utils.checkpoint import checkpoint

from common.errors import UserError

if TYPE_CHECKING:
    from methods.base import Method

BACKEND = "inductor"
GRAPHS_AT_MOST = 64  # of all blocks together, for training and for sampling; dynamo's 8 are soon used up by two token counts, dropout and partial batches


def compile_blocks(method: Method, recompute: bool = False) -> None:
    """Compiles the method's blocks in place, to be used from the first call on; graphs of an earlier method in this process are dropped.

    recompute: keep only the inputs of a block in training and compute it again in the backward pass.
    A block that cannot be compiled as a whole, or more than GRAPHS_AT_MOST kinds of calls, are UserErrors of the training.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = GRAPHS_AT_MOST
    torch._dynamo.config.optimize_ddp = False  # it would cut every block into pieces of a gradient bucket
    training = torch.compile(_recomputed_block if recompute else _training_block, dynamic=False, fullgraph=True, backend=BACKEND)
    sampling = torch.compile(_sampling_block, backend=BACKEND)
    for block in (*method.blocks(), *method.frozen_blocks()):
        block.forward = partial(_call, block, training, sampling)


def _call(block: nn.Module, training: Callable[..., Any], sampling: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return sampling(block, *args, **kwargs)
    try:
        return training(block, *args, **kwargs)
    except FailOnRecompileLimitHit as error:
        raise UserError(
            f"train.compile=true: the blocks of this network are called in more than {GRAPHS_AT_MOST} ways (shapes, types, options), and each takes "
            f"a compilation of its own. The last one was in {type(block).__name__}. Set train.compile=false."
        ) from error
    except Unsupported as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"train.compile=true: {type(block).__name__} cannot be compiled as a whole: {reason}. Set train.compile=false.") from error


# Each of these is one function with one set of graphs. `type(block).forward`, because the block's own attribute is `_call`.


def _training_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


def _recomputed_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def _sampling_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)
