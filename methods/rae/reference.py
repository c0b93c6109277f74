"""Reads released files: decoders, DiT-DH and LightningDiT networks, training checkpoints of both stages.

It renames their tensors to ours and accepts no missing or extra ones. statistics.py reads the latent statistics,
discriminator.py the discriminator's features, and diffusers_layout.py the files of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.layers.transformer import check_table, rope_table, sincos_table
from pixlat.common.weights.tensors import check_released, read_tensors
from pixlat.methods.base import Released
from pixlat.methods.rae.config import DECODERS, NetworkShape

Renames = Sequence[tuple[str, str]]

# Ours to theirs, applied in order.
DECODER_RENAMES: Renames = (
    (r"^embed\.", "decoder_embed."),
    (r"^class_token$", "trainable_cls_token"),
    (r"^positions$", "decoder_pos_embed"),
    (r"^norm\.", "decoder_norm."),
    (r"^out\.", "decoder_pred."),
    (r"^blocks\.", "decoder_layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.(query|key|value)\.", r".attention.attention.\1."),
    (r"\.proj\.", ".attention.output.dense."),
    (r"\.fc1\.", ".intermediate.dense."),
    (r"\.fc2\.", ".output.dense."),
)
NETWORK_RENAMES: Renames = (
    (r"^project\.", "s_projector."),
    (r"^time_embed\.frequencies$", "t_embedder.W"),
    (r"^time_embed\.", "t_embedder."),
    (r"^class_embed\.", "y_embedder.embedding_table."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"^final\.norm\.", "final_layer.norm_final."),
    (r"^final\.modulation", "final_layer.modulation"),
    (r"^final\.", "final_layer."),
)
HEAD_RENAMES: Renames = ((r"^embed\.", "s_embedder.proj."), (r"^head_embed\.", "x_embedder.proj."), *NETWORK_RENAMES)
PLAIN_RENAMES: Renames = ((r"^embed\.", "x_embedder.proj."), *NETWORK_RENAMES)

TOKEN_PIXELS = 16  # image pixels per side of a token, in every released network
EMA_DECAY = 0.9995  # decay of the average in the released recipe
ROTATIONS = re.compile(r"(enc_|dec_|)feat_rope\.freqs_(cos|sin)")


def rename(name: str, renames: Renames) -> str:
    """The authors' name for one of our names."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


# -- files -------------------------------------------------------------------------------------------------------------


def read_released(path: Path, part: str = "") -> dict[str, Tensor]:
    """The state dict in a released file, or the averaged weights of a training checkpoint ({"ema": ..., "model": ...}).

    part: if some names begin with "<part>.", keep only these and remove the prefix. A training checkpoint of stage 1
    holds "decoder.*" and also the encoder.
    """
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in read_tensors(path).items()}
    inside = {
        name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if part and name.startswith(f"{part}.")
    }
    return inside or state


def matched(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], renames: Renames, what: str) -> dict[str, Tensor]:
    """The released tensors under our names and in our shapes (their 1 x 1 convolutions are linear maps in our code).

    Raises UserError with every key that differs.
    """
    theirs = {rename(name, renames): name for name in ours}
    state = {name: tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor for name, tensor in state.items()}
    check_released(state, {name: ours[our_name].shape for name, our_name in theirs.items()}, what)
    return {our_name: state[name] for name, our_name in theirs.items()}


# -- decoders ----------------------------------------------------------------------------------------------------------


def decoder_from_released(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released decoder under the names of `ours`, a ViTDecoder's state dict (it may be on the meta device)."""
    loaded = matched(state, ours, DECODER_RENAMES, f"decoder{decoder_hint(state)}")
    positions = loaded["positions"]
    table = sincos_table(round((positions.shape[1] - 1) ** 0.5), positions.shape[2])
    check_table("decoder_pos_embed", positions[0, 1:], table)
    return loaded


def decoder_to_released(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `decoder_from_released`: a ViTDecoder's state dict under the released names."""
    return {rename(name, DECODER_RENAMES): tensor for name, tensor in ours.items()}


def decoder_hint(state: Mapping[str, Tensor]) -> str:
    """Names the file's decoder size for an error message: " (the file's is size xl ...)"; "" if no size fits."""
    embed, hidden = state.get("decoder_embed.weight"), state.get("decoder_layers.0.intermediate.dense.weight")
    if embed is None or hidden is None:
        return ""
    depth = 1 + max(int(match[1]) for match in map(re.compile(r"decoder_layers\.(\d+)\.").match, state) if match)
    sizes = [
        size
        for size, shape in DECODERS.items()
        if (shape.width, shape.depth, shape.hidden) == (len(embed), depth, len(hidden))
    ]
    return f" (the file's is size {sizes[0]} for {embed.shape[1]} latent channels)" if sizes else ""


# -- networks ----------------------------------------------------------------------------------------------------------


def recognise(state: Mapping[str, Tensor], head_depth: int | None = None) -> NetworkShape:
    """The sizes of a released network; the tables of rotations reveal the number of attention heads.

    The file holds backbone and head in one list of blocks; their widths distinguish them. If both have the same width,
    the caller must give `head_depth`, or this raises UserError.
    """
    choices = choices_of(state)
    if choices and head_depth is None:
        raise UserError(f"{why_choose(state)} Give model.head_depth.")
    try:
        width, out_width = state["pos_embed"].shape[2], len(state["final_layer.norm_final.weight"])
        blocks = [len(norm) for name, norm in state.items() if re.fullmatch(r"blocks\.\d+\.norm1\.weight", name)]
        if "s_embedder.proj.weight" not in state:
            return NetworkShape(width, len(blocks), width // state["feat_rope.freqs_cos"].shape[1], 0, 0, 0)
        head_depth = blocks.count(out_width) if head_depth is None or not choices else head_depth
        heads = width // state["enc_feat_rope.freqs_cos"].shape[1]
        return NetworkShape(
            width,
            len(blocks) - head_depth,
            heads,
            out_width,
            head_depth,
            out_width // state["dec_feat_rope.freqs_cos"].shape[1],
        )
    except (KeyError, IndexError) as error:
        begin = ", ".join(sorted(state)[:3])
        raise UserError(
            f"This is not the state dict of a released DiT-DH: {error!r} while reading its shapes. "
            f"Its keys: {begin}, ..."
        ) from error


def choices_of(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], ...]:
    """The possible depths of backbone and head if both have the same width; empty if the file decides.

    The file decides if the widths differ or there is no head.
    """
    if "s_embedder.proj.weight" not in state or state["pos_embed"].shape[2] != len(
        state["final_layer.norm_final.weight"]
    ):
        return ()
    blocks = sum(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name) is not None for name in state)
    return tuple({"head_depth": head, "depth": blocks - head} for head in range(1, blocks))


def why_choose(state: Mapping[str, Tensor]) -> str:
    """A sentence that says why the user must choose where the head begins."""
    return (
        f"The backbone and the head of this network are both {state['pos_embed'].shape[2]} wide, "
        "so the file does not tell where the head begins."
    )


def open_released(path: Path, weights: str | None = None) -> Released:
    """Opens a released network, or the average in a training checkpoint, for `pixlat import`."""
    if weights is not None:
        raise UserError(
            f"weights={weights!r}: a released network holds one set of weights, "
            "and of a training checkpoint pixlat takes the average. Leave the key out."
        )
    state = read_released(path)
    choices = choices_of(state)
    shape = recognise(state, 1 if choices else None)
    open_keys = set(choices[0]) if choices else set()
    model = {
        name: getattr(shape, name)
        for name in (shape._fields if shape.head_depth else ("width", "depth", "heads", "head_depth"))
    }
    model = {name: value for name, value in model.items() if name not in open_keys}
    image_size, classes = (
        TOKEN_PIXELS * round(state["pos_embed"].shape[1] ** 0.5),
        len(state["y_embedder.embedding_table.weight"]) - 1,
    )
    return Released(
        state, model, classes, image_size, "ema", EMA_DECAY, "MIT", choices, why_choose(state) if choices else ""
    )


def network_from_released(
    state: Mapping[str, Tensor], ours: Mapping[str, Tensor], shape: NetworkShape, where: str = "model."
) -> dict[str, Tensor]:
    """A released network under the names of `ours`, a LatentDiT's state dict.

    Raises UserError with the settings that differ if the file has other sizes.
    """
    released = recognise(state, shape.head_depth)
    compared = released._fields if released.head_depth else ("width", "depth", "heads", "head_depth")
    pairs = ((name, getattr(shape, name), getattr(released, name)) for name in compared)
    if wrong := [
        f"{where}{name}={wanted}, the file has {theirs}" for name, wanted, theirs in pairs if wanted != theirs
    ]:
        raise UserError(f"The released weights are of another network: {'; '.join(wrong)}.")
    grid = round(state["pos_embed"].shape[1] ** 0.5)
    check_table("pos_embed", state["pos_embed"][0], sincos_table(grid, released.width))
    rotations = {name: tensor for name, tensor in state.items() if ROTATIONS.fullmatch(name)}
    for name, tensor in rotations.items():
        check_rotation(name, tensor, grid)
    rest = {name: tensor for name, tensor in state.items() if name not in rotations}
    return matched(rest, ours, HEAD_RENAMES if released.head_depth else PLAIN_RENAMES, "network")


def network_to_released(ours: Mapping[str, Tensor], shape: NetworkShape) -> dict[str, Tensor]:
    """The inverse of `network_from_released`, with the tables of rotations that the released files hold."""
    grid = round(ours["pos_embed"].shape[1] ** 0.5)
    stacks = (
        {"enc_": shape.width // shape.heads, "dec_": shape.head_width // shape.head_heads}
        if shape.head_depth
        else {"": shape.width // shape.heads}
    )
    state = {rename(name, HEAD_RENAMES if shape.head_depth else PLAIN_RENAMES): tensor for name, tensor in ours.items()}
    for stack, head_dim in stacks.items():
        for wave, table in zip(("cos", "sin"), rope_table(grid, head_dim).unbind(-1), strict=True):
            state[f"{stack}feat_rope.freqs_{wave}"] = table.repeat_interleave(2, dim=-1)
    return {
        name: tensor[..., None, None] if name.endswith("embedder.proj.weight") else tensor
        for name, tensor in state.items()
    }


def check_rotation(name: str, table: Tensor, grid: int) -> None:
    """Compares a stored table (N, K) of cosines or sines with ours, in which both channels of a pair share an angle."""
    ours = rope_table(grid, table.shape[1])[..., 0 if name.endswith("cos") else 1]
    check_table(name, table, ours.repeat_interleave(2, dim=-1))
