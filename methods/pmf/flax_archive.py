"""Reads the authors' .zip archives, which hold a flax checkpoint: MessagePack with arrays as extensions.

MessagePack contains no code, so opening an archive runs none.

We had no released archive to test with. This module reads flax's own file (`checkpoint_<step>`) and the single file
that orbax writes (`.../checkpoint`). If a checkpoint stores each array in a separate file (zarr, OCDBT), it raises
UserError and says how to save it as one file.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixlat.common.errors import UserError

ARRAY, SCALAR = 1, 3  # extension codes of flax.serialization; 2 is a complex number
CHUNKED = "__msgpack_chunked_array__"  # marks an array of a gigabyte or more, which flax stores in pieces
CHECKPOINT = re.compile(r"(.*/)?checkpoint(_\d+)?$")
ADVICE = (
    'Restore it with flax or orbax, and save one of its trees by safetensors.numpy.save_file with keys joined by "/": '
    "import opens that file as well."
)


def read_archive(path: Path) -> dict[str, Any]:
    """The newest training state in an archive, as nested dictionaries of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            checkpoints = [info for info in archive.infolist() if CHECKPOINT.match(info.filename)]
            if not checkpoints:
                names = ", ".join(archive.namelist()[:5])
                raise UserError(
                    f"{path}: no file in it is called checkpoint or checkpoint_<step>; it holds {names}, ... {ADVICE}"
                )
            newest = max(checkpoints, key=lambda info: [int(number) for number in re.findall(r"\d+", info.filename)])
            return unpack(archive.read(newest), f"{path}/{newest.filename}")
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not readable as a zip archive ({error}). Download it again.") from error


def unpack(content: bytes, where: str) -> dict[str, Any]:
    """Decodes a flax state dict from MessagePack bytes; `where` names the file in error messages."""
    try:
        import msgpack
    except ImportError as error:
        raise UserError(f"{where}: flax checkpoints need the package msgpack: pip install 'pixlat[flax]'.") from error
    try:
        state = msgpack.unpackb(content, ext_hook=_extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise UserError(f"{where}: not readable as a flax checkpoint ({error}). Download the archive again.") from error
    if not isinstance(state, dict):
        raise UserError(f"{where}: holds a {type(state).__name__} and not a tree of arrays.")
    return {key: _joined(value, f"{where}: {key}") for key, value in state.items()}


def _extension(code: int, data: bytes) -> Any:
    import msgpack

    if code not in (ARRAY, SCALAR):
        return None
    shape, dtype, values = msgpack.unpackb(data, raw=False)
    if dtype == "bfloat16":
        return torch.frombuffer(bytearray(values), dtype=torch.bfloat16).reshape(shape)
    return torch.from_numpy(np.frombuffer(values, np.dtype(dtype)).reshape(shape).copy())


def _joined(tree: Any, where: str) -> Any:
    """Joins arrays that are stored in pieces; UserError if a file name stands in the place of an array."""
    if isinstance(tree, str):
        raise UserError(f"{where}: the arrays are in files of their own ({tree[:40]}). {ADVICE}")
    if not isinstance(tree, Mapping):
        return tree
    if CHUNKED in tree:
        pieces = [tree["chunks"][str(number)].reshape(-1) for number in range(len(tree["chunks"]))]
        return torch.cat(pieces).reshape([int(tree["shape"][str(number)]) for number in range(len(tree["shape"]))])
    return {str(key): _joined(value, f"{where}/{key}") for key, value in tree.items()}


def choose_weights(state: Mapping[str, Any], weights: str | None) -> tuple[str, Mapping[str, Any]]:
    """Selects one set of weights of a checkpoint and returns (name, tree).

    Averages are named by their half-life in thousand images; "params" are the raw weights. If there is one set only,
    `weights` may be None. With several sets the user must name one, because the authors sampled each size with a
    different average (`eval.ema` of the presets).
    """
    trees = {**(state.get("ema_params") or {}), **({"params": state["params"]} if "params" in state else {})} or {
        "params": state
    }
    name = weights or ("" if len(trees) > 1 else next(iter(trees)))
    if name not in trees:
        problem = (
            f"weights={weights} is not in this archive" if weights else "this archive holds several sets of weights"
        )
        raise UserError(
            f"{problem}. Give weights= one of: {', '.join(trees)}. "
            "The preset's eval.ema says which one the paper sampled with."
        )
    return name, trees[name]


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Flattens a tree of tensors into one dict with keys joined by "/"."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        flat |= flatten_tree(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
