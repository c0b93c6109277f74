"""Converts the authors' released checkpoints to our names.

SiT released a plain state dict, whose head has twice the channels; the upper half was never trained.
DiT released a plain state dict with the same head as ours.
REPA released a plain state dict; in old files the blocks after the aligned one are called `decoder_blocks`.
REG released a training checkpoint, of which `read_tensors` takes the "ema".
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
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width, because the number of heads is in no tensor's shape
FACTOR = 8  # side of a latent position in pixels, in every released model
EMA_DECAY = 0.9999


def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], int, int]:
    """(model settings, number of classes, side in latent positions) of a released state dict, from its shapes.

    UserError if it is none of the four.
    """
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
            f"This is not the state dict of a released DiT, SiT, REPA or REG: reading its shapes gave {error!r}. "
            f"Its keys: {begin}, ..."
        ) from error


def open_released(licence: str, path: Path, weights: str | None = None) -> Released:
    """Opens a released file for `pixlat import`: averaged weights, or a training checkpoint with an average."""
    if weights is not None:
        raise UserError(
            f"weights={weights!r}: a released file of these methods has one set of weights to import, and of a "
            "training checkpoint that is the average. Remove weights=."
        )
    state = read_tensors(path)
    model, num_classes, side = recognise(state)
    return Released(state, model, num_classes, FACTOR * side, "ema", EMA_DECAY, licence)


open_sit = open_repa = open_reg = partial(open_released, "MIT")
open_dit = partial(open_released, "CC BY-NC 4.0")


def released_name(name: str) -> str:
    """The released name of one of our tensors. In the released code the projectors are part of the network."""
    return name.removeprefix("network.")


def from_released(
    state: Mapping[str, Tensor], ours: Mapping[str, Tensor], patch: int, align_after: int
) -> dict[str, Tensor]:
    """The released tensors under the names of `ours`, a method's own state (it may be on the meta device).

    patch: side of a token in latent positions. align_after: number of the aligned block; 0 if no block is aligned.
    UserError for missing, extra and misshapen keys, all of which it lists, and for another position table than ours.
    A model that standardises its class token cannot be loaded, because no released file has the statistics for that.
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
    """Renames `decoder_blocks.k` of old REPA files, which is block k + align_after."""
    return re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) + align_after}", name)


def own_head(tensor: Tensor, rows: int, patch: int) -> Tensor:
    """Cuts SiT's head of 2 C channels, (2 rows, ...), to the C that were trained. Returns other heads unchanged.

    A head's rows are ordered by row in the patch, column in the patch, channel; the channel changes fastest.
    """
    if len(tensor) != 2 * rows:
        return tensor
    return tensor.unflatten(0, (patch**2, 2, rows // patch**2))[:, 0].flatten(0, 1)


def check_positions(table: Tensor) -> None:
    """UserError if the stored position table (1, [1 +] g * g, D) is not ours. The row of REG's class token is zero."""
    _, tokens, width = table.shape
    grid = int(tokens**0.5)
    prefix = table.new_zeros(tokens - grid * grid, width, dtype=torch.float32)
    check_table(POSITIONS, table[0], torch.cat((prefix, sincos_table(grid, width))))
