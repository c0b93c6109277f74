"""Opens the authors' released checkpoints, recognises the architecture and renames their parameters to ours."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixlat.common.errors import UserError, close_match
from pixlat.common.layers.transformer import check_table, sincos_table
from pixlat.common.weights.tensors import check_released
from pixlat.methods.base import Released

FILE_NAME = "checkpoint-last.pth"
# set of weights -> name of its decay in `args`; the published numbers are of the first set
WEIGHTS = {"model_ema1": "ema_decay1", "model_ema2": "ema_decay2", "model": None}

# Ours to theirs, applied in order to a name of `JiTMethod.state_dict()`.
RENAMES = (
    (r"^network\.", "net."),
    (r"\.context$", ".in_context_posemb"),
    (r"\.time_embed\.", ".t_embedder."),
    (r"\.class_embed\.", ".y_embedder.embedding_table."),
    (r"\.patch_embed\.down\.", ".x_embedder.proj1."),
    (r"\.patch_embed\.up\.", ".x_embedder.proj2."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"\.final\.norm\.", ".final_layer.norm_final."),
    (r"\.final\.", ".final_layer."),
)
POSITIONS = "net.pos_embed"


def read_checkpoint(path: str | Path, weights: str = "model_ema1") -> dict[str, Tensor]:
    """One of the three state dicts of a released file (or of the folder that holds it), memory-mapped.

    It runs no code from the file.
    """
    return open_checkpoint(path, weights)[0]


def open_checkpoint(path: str | Path, weights: str) -> tuple[dict[str, Tensor], float | None]:
    """Like `read_checkpoint`, and also returns the decay of this average from the settings in the file (`args`).

    The decay is None for the raw weights or if the file does not contain it.
    """
    if weights not in WEIGHTS:
        raise UserError(
            f"weights={weights!r} is not in a JiT checkpoint.{close_match(weights, WEIGHTS)} "
            f"Choose {', '.join(WEIGHTS)}."
        )
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the released {FILE_NAME} or its folder.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes can make the unpickler raise any exception
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason}). Download it again.") from error
    if not isinstance(content, dict) or not isinstance(content.get(weights), dict):
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: holds no {weights!r}, so it is not a released JiT checkpoint. It holds: {keys}.")
    args, key = content.get("args"), WEIGHTS[weights]
    settings = args if isinstance(args, dict) else vars(args) if isinstance(args, argparse.Namespace) else {}
    decay = settings.get(key) if key else None
    return content[weights], float(decay) if isinstance(decay, int | float) else None


@dataclass(frozen=True)
class Architecture:
    """Sizes read from a released state dict.

    The shapes do not reveal the block where the context tokens enter, nor the dropout.
    """

    depth: int
    width: int
    heads: int
    patch: int
    bottleneck: int
    context_tokens: int
    num_classes: int
    image_size: int


def recognise(state: Mapping[str, Tensor]) -> Architecture:
    """The architecture of a released state dict."""
    try:
        tokens, width = state[POSITIONS].shape[1:]
        bottleneck, _, patch, _ = state["net.x_embedder.proj1.weight"].shape
        return Architecture(
            depth=len({match[1] for match in map(re.compile(r"net\.blocks\.(\d+)\.").match, state) if match}),
            width=width,
            heads=width // state["net.blocks.0.attn.q_norm.weight"].shape[0],
            patch=patch,
            bottleneck=bottleneck,
            context_tokens=state["net.in_context_posemb"].shape[1],
            num_classes=state["net.y_embedder.embedding_table.weight"].shape[0] - 1,
            image_size=patch * round(tokens**0.5),
        )
    except (KeyError, ValueError, IndexError) as error:
        begin = ", ".join(sorted(state)[:3])
        raise UserError(
            f"This is not the state dict of a released JiT: {error!r} while reading its shapes. Its keys: {begin}, ..."
        ) from error


def open_released(path: Path, weights: str | None = None) -> Released:
    """Opens a released file for `pixlat import`."""
    weights = weights or next(iter(WEIGHTS))
    state, decay = open_checkpoint(path, weights)
    model = asdict(recognise(state))
    return Released(state, model, model.pop("num_classes"), model.pop("image_size"), weights, decay, "MIT")


def released_name(name: str) -> str:
    """The authors' name for one of our parameters."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def released_shape(name: str, shape: torch.Size) -> torch.Size:
    """The authors' shape of one of our parameters: their second patch map is a 1 x 1 convolution, ours is linear."""
    return torch.Size((*shape, 1, 1)) if name.endswith("patch_embed.up.weight") else shape


def from_released(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released tensors under the names and shapes of `ours`.

    ours: a `JiTMethod.state_dict()`; it may be on the meta device.
    Raises UserError with every missing, extra and misshapen key, or if the fixed position table differs from ours.
    """
    shapes = {released_name(name): released_shape(name, tensor.shape) for name, tensor in ours.items()}
    check_released(state, shapes)
    _, tokens, width = state[POSITIONS].shape
    check_table(POSITIONS, state[POSITIONS][0], sincos_table(round(tokens**0.5), width))
    return {name: state[released_name(name)].reshape(tensor.shape) for name, tensor in ours.items()}
