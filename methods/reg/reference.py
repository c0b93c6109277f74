"""The authors' released checkpoints under our names.

SiT released a plain state dict whose head has twice the channels (the upper half was never trained);
DiT a plain one whose head is ours; REPA a plain one, in old files with `decoder_blocks` after the aligned block;
REG a training checkpoint (`read_tensors` takes its "ema").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.layers.transformer import check_table, sincos_table
from pixlat.common.weights.tensors import check_released, read_tensors
from pixlat.methods.base import Released

HEAD = "final_layer.linear."
POSITIONS = "pos_embed"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: the shapes do not tell the heads
FACTOR = 8  # pixels a side of a latent position, in every released model
EMA_DECAY = 0.9999


def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], int, int]:
    """(settings, number of classes, latent positions a side) of a released state dict."""
    try:
        width, _, patch, _ = state["x_embedder.proj.weight"].shape
        aligned = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        later = len({name.split(".")[1] for name in state if name.startswith("decoder_blocks.")})
        model: dict[str, Any] = {
            "depth": aligned + later,
            "width": width,
            "patch": patch,
            "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        }
        model |= {"heads": HEADS[width]} if width in HEADS else {}
        model |= {"projector_width": len(state["projectors.0.0.weight"])} if "projectors.0.0.weight" in state else {}
        model |= {"align_after": aligned} if later else {}
        return model, len(state["y_embedder.embedding_table.weight"]) - 1, patch * int(state[POSITIONS].shape[1] ** 0.5)
    except (KeyError, ValueError, IndexError) as error:
        begin = ", ".join(sorted(state)[:3])
        raise UserError(
            f"This is not the state dict of a released DiT, SiT, REPA or REG: {error!r} in reading its shapes. "
            f"Its keys: {begin}, ..."
        ) from error


def open_released(licence: str, path: Path, weights: str | None = None) -> Released:
    """A released file for `pixlat import`: a plain average,
    or a training checkpoint whose average is taken.
    """
    if weights is not None:
        raise UserError(
            f"weights={weights!r}: a released file is one set of weights, "
            "and of a training checkpoint the average is taken."
        )
    state = read_tensors(path)
    model, num_classes, side = recognise(state)
    return Released(state, model, num_classes, FACTOR * side, "ema", EMA_DECAY, licence)


open_sit = open_repa = open_reg = partial(open_released, "MIT")
open_dit = partial(open_released, "CC BY-NC 4.0")


def released_name(name: str) -> str:
    """Their name of one of our tensors: they keep the projectors inside the network."""
    return name.removeprefix("network.")


def from_released(
    state: Mapping[str, Tensor], ours: Mapping[str, Tensor], patch: int, align_after: int
) -> dict[str, Tensor]:
    """The released tensors under the names of `ours`, a method's own state (it may be on the meta device).

    patch: latent positions a side of a token; align_after: number of the aligned block, 0 where nothing is aligned.
    UserError lists every missing, extra and misshapen key; the fixed position table must equal ours.
    A model that standardises its class token cannot be loaded, since no released file has its statistics.
    """
    state = {modern_name(name, align_after): tensor for name, tensor in state.items()}
    shapes = {released_name(name): tensor.shape for name, tensor in ours.items()}
    state = {
        name: own_head(tensor, shapes[name][0], patch) if name.startswith(HEAD) else tensor
        for name, tensor in state.items()
    }
    check_released(state, shapes)
    check_positions(state[POSITIONS])
    return {name: state[released_name(name)] for name in ours}


def modern_name(name: str, align_after: int) -> str:
    """`decoder_blocks.k` of old REPA files is block k + align_after."""
    return re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) + align_after}", name)


def own_head(tensor: Tensor, rows: int, patch: int) -> Tensor:
    """A head (2 rows, ...) with SiT's 2 C channels cut to the C that were trained; another head as it is.

    The rows of a token are ordered (row in the patch, column, channel), the channel fastest.
    """
    if len(tensor) != 2 * rows:
        return tensor
    return tensor.unflatten(0, (patch**2, 2, rows // patch**2))[:, 0].flatten(0, 1)


def check_positions(table: Tensor) -> None:
    """Compares the stored position table (1, [1 +] g * g, D) with ours; REG's class token,
    the first where there is one, has no position.
    """
    _, tokens, width = table.shape
    grid = int(tokens**0.5)
    prefix = table.new_zeros(tokens - grid * grid, width, dtype=torch.float32)
    check_table(POSITIONS, table[0], torch.cat((prefix, sincos_table(grid, width))))
