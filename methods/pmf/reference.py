"""Reads the authors' released weights: a flat PyTorch dict, or a tree of flax parameters with keys joined by "/".

The functions work on the PyTorch layout; `torch_layout` and `flax_layout` convert between the two. `read_tensors`
opens a PyTorch file, and `flax_archive.py` opens a flax archive and selects one of its averages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.layers.transformer import check_table
from pixlat.common.weights.tensors import check_released, read_tensors
from pixlat.methods.base import Released
from pixlat.methods.pmf.flax_archive import choose_weights, flatten_tree, read_archive

if TYPE_CHECKING:
    from pixlat.methods.pmf.config import PMFConfig
    from pixlat.methods.pmf.network import PmfDiT

# Ours to theirs, applied in order to a name of `PMFMethod.state_dict()`.
RENAMES = (
    (r"^network\.blocks\.", "net.shared_blocks."),
    (r"^network\.head\.blocks\.", "net.u_heads."),
    (r"^network\.head\.", "net.u_final_layer."),
    (r"^v_head\.blocks\.", "net.v_heads."),
    (r"^v_head\.", "net.v_final_layer."),
    (r"^network\.", "net."),
    (r"\.patch_embed\.down\.", ".x_embedder.proj1."),
    (r"\.patch_embed\.up\.", ".x_embedder.proj2."),
    (r"\.class_embed\.", ".y_embedder.embedding_table._flax_embedding."),
    (r"\.t_min_embed\.", ".cfg_t_start_embedder."),
    (r"\.t_max_embed\.", ".cfg_t_end_embedder."),
    (r"\.(h|omega)_embed\.", r".\1_embedder."),
    (r"\.h_tokens$", ".time_tokens"),
    (r"\.gate1$", ".attn_scale"),
    (r"\.gate2$", ".mlp_scale"),
    (r"\.attn\.(q|k|v|out)\.", r".attn.\1_proj."),
    (r"((?:_proj|\.mlp\.(?:w\d|\d)|\.linear))\.(weight|bias)$", r"\1._flax_linear.\2"),
)
ROPE = "net.rope_freqs"
V_HEAD = ("net.v_heads.", "net.v_final_layer.")  # files for sampling contain none of these
SPATIAL = "patch_embed.up.weight"  # a 1 x 1 convolution in their code, a linear map in ours


def released_name(name: str) -> str:
    """The authors' PyTorch name for one of our parameters."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def torch_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts flax names and shapes to PyTorch's; a dict in PyTorch's layout stays unchanged."""
    return dict(_from_flax(name, tensor) if "/" in name else (name, tensor) for name, tensor in state.items())


def _from_flax(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    name = re.sub(r"/layers_(\d+)/", r".\1.", name)
    name = re.sub(r"/(shared_blocks|u_heads|v_heads)_(\d+)/", r".\1.\2.", name).replace("/", ".")
    if name.endswith(".embedding"):
        return re.sub(r"(\._flax_embedding)?\.embedding$", "._flax_embedding.weight", name), tensor.squeeze(0)
    if name.endswith(".kernel"):
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(tensor.ndim, tuple(range(tensor.ndim)))
        return name.removesuffix("kernel") + "weight", tensor.permute(axes)
    return name, tensor


def flax_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `torch_layout`. It drops the rotation table, which is not a parameter."""
    return dict(_to_flax(name, tensor) for name, tensor in state.items() if name != ROPE)


def _to_flax(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    name = re.sub(r"(_embedder\.mlp)\.(\d+)\.", r"\1.layers_\2.", name)
    name = re.sub(r"\.(shared_blocks|u_heads|v_heads)\.(\d+)\.", r".\1_\2.", name).replace(".", "/")
    if name.endswith("_flax_embedding/weight"):
        return name.removesuffix("_flax_embedding/weight") + "embedding", tensor[None]
    if name.endswith("/weight"):
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim, tuple(range(tensor.ndim)))
        return name.removesuffix("weight") + "kernel", tensor.permute(axes)
    return name, tensor


@dataclass(frozen=True)
class Architecture:
    """Sizes read from a released state dict: fields of `PMFConfig` with the same names, and those of the data."""

    depth: int
    head_depth: int
    width: int
    heads: int
    mlp_hidden: int
    patch: int
    bottleneck: int
    num_classes: int
    image_size: int


def recognise(state: Mapping[str, Tensor]) -> Architecture:
    """The architecture of a released state dict in either layout."""
    state = torch_layout(state)

    def count(stack: str) -> int:
        return len({match[1] for match in map(re.compile(rf"net\.{stack}\.(\d+)\.").match, state) if match})

    try:
        width = state["net.pos_embed"].shape[2]
        tables = ("class_tokens", "omega_tokens", "t_min_tokens", "t_max_tokens", "time_tokens")
        tokens = state["net.pos_embed"].shape[1] - sum(state[f"net.{table}"].shape[1] for table in tables)
        bottleneck, _, patch, _ = state["net.x_embedder.proj1.weight"].shape
        return Architecture(
            depth=count("shared_blocks") + count("u_heads"),
            head_depth=count("u_heads"),
            width=width,
            heads=width // state["net.u_heads.0.attn.q_norm.weight"].shape[0],
            mlp_hidden=state["net.u_heads.0.mlp.w1._flax_linear.weight"].shape[0],
            patch=patch,
            bottleneck=bottleneck,
            num_classes=state["net.y_embedder.embedding_table._flax_embedding.weight"].shape[0] - 1,
            image_size=patch * round(tokens**0.5),
        )
    except (KeyError, ValueError, IndexError) as error:
        begin = ", ".join(sorted(state)[:3])
        raise UserError(
            f"This is not the state dict of a released pMF: {error!r} while reading its shapes. Its keys: {begin}, ..."
        ) from error


def open_released(path: Path, weights: str | None = None) -> Released:
    """Opens a released file for `pixlat import`.

    A PyTorch file does not say which average it holds. In a flax archive, `weights` names the average.
    """
    name = None
    if path.suffix == ".zip":
        name, tree = choose_weights(read_archive(path), weights)
        state = flatten_tree(tree)
    elif weights is not None:
        raise UserError(
            f"weights={weights!r}: a released PyTorch file of pMF holds one set of weights. Leave the key out."
        )
    else:
        state = read_tensors(path)
    model = asdict(recognise(state))
    if model["mlp_hidden"] == int(model["width"] * 8 / 3):
        model["mlp_hidden"] = None
    return Released(
        state, model, model.pop("num_classes"), model.pop("image_size"), name or "the only ones", None, "MIT"
    )


class WithNetwork(Protocol):
    """The part of `PMFMethod` that holds weights."""

    config: PMFConfig
    network: PmfDiT

    def state_dict(self) -> dict[str, Any]: ...


def from_released(state: Mapping[str, Tensor], method: WithNetwork) -> dict[str, Tensor]:
    """The released tensors, in either layout, under the names and shapes of `method.state_dict()`.

    Raises UserError with every missing, extra and misshapen key, or if the rotation table differs from ours.
    Files for sampling do not contain the v-head; then the method keeps its present v-head.
    """
    from_flax = any("/" in name for name in state)
    state = torch_layout(state)
    ours = {name: tensor for name, tensor in method.state_dict().items() if name.startswith(("network.", "v_head."))}
    if not any(name.startswith(V_HEAD) for name in state):
        ours = {name: tensor for name, tensor in ours.items() if name.startswith("network.")}
    shapes = {
        released_name(name): (*tensor.shape, 1, 1) if name.endswith(SPATIAL) else tuple(tensor.shape)
        for name, tensor in ours.items()
    }
    if not from_flax:
        shapes[ROPE] = tuple(method.network.rope[method.config.prefix :].shape[:2])
    check_released(state, shapes, note=" (PyTorch's names and shapes)" if from_flax else "")
    if not (from_flax or method.network.rope.is_meta):
        check_table(ROPE, state[ROPE], rotation_table(method))
    return {
        **method.state_dict(),
        **{name: state[released_name(name)].reshape(tensor.shape) for name, tensor in ours.items()},
    }


def to_released(method: WithNetwork) -> dict[str, Tensor]:
    """The method's weights in the authors' PyTorch layout, with v-head and rotation table.

    `flax_layout` converts the result to the flax layout.
    """
    state = {name: tensor for name, tensor in method.state_dict().items() if name.startswith(("network.", "v_head."))}
    released = {
        released_name(name): tensor[:, :, None, None] if name.endswith(SPATIAL) else tensor
        for name, tensor in state.items()
    }
    return {**released, ROPE: rotation_table(method)}


def rotation_table(method: WithNetwork) -> Tensor:
    """(image tokens, head dimension / 2) complex64: cos + i sin of the angles."""
    return torch.view_as_complex(method.network.rope[method.config.prefix :].float().contiguous())
