"""Compiled blocks: one set of graphs for training, which never falls back to slow code in silence,
and one for sampling.

All blocks share their graphs: dynamo keeps them by the function that it was handed,
and two small functions are what it is handed here. Training and sampling meet other shapes, types and modes,
so either could use up the other's graphs or turn its shapes into symbols if they shared one function.
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
# of all blocks together, for training and for sampling; dynamo's 8 are soon used up by two token counts,
# dropout and partial batches
GRAPHS_AT_MOST = 64


def compile_blocks(method: Method, recompute: bool = False) -> None:
    """Compiles the method's blocks in place, to be used from the first call on;
    graphs of an earlier method in this process are dropped.

    recompute: keep only the inputs of a block in training and compute it again in the backward pass.
    A block that cannot be compiled as a whole, or more than GRAPHS_AT_MOST kinds of calls,
    are UserErrors of the training.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = GRAPHS_AT_MOST
    torch._dynamo.config.optimize_ddp = False  # it would cut every block into pieces of a gradient bucket
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
            f"types, options), and each takes a compilation of its own. The last one was in {type(block).__name__}. "
            "Set train.compile=false."
        ) from error
    except Unsupported as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"train.compile=true: {type(block).__name__} cannot be compiled as a whole: "
            f"{reason}. Set train.compile=false."
        ) from error


def compile_frozen(method: nn.Module) -> None:
    """Compiles the frozen networks of a method, in place.

    Call it after `compile_blocks`, which drops all graphs that were made before.

    Each network is handed to dynamo as a function of its own, so its graphs do not count among those of the blocks.
    A batch of another size than the first makes the size a symbol, and a part that cannot be compiled runs as it is:
    neither changes a result, and a frozen network is no inner loop.
    """
    for frozen in [module for module in method.modules() if isinstance(module, Frozen)]:
        for owner, name in frozen.working_parts():
            if name not in vars(owner):  # else it is compiled already
                setattr(owner, name, torch.compile(getattr(owner, name), backend=BACKEND))


# Each of these is one function with one set of graphs. `type(block).forward`,
# because the block's own attribute is `_call`.


def _training_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


def _recomputed_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def _sampling_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)
