"""The authors' .zip archives: a flax checkpoint inside, MessagePack with arrays as extensions.

Nothing in it is code, and nothing is run.

What lies inside the released archives was not seen: this reads flax's own file (`checkpoint_<step>`)
and the one that orbax makes of whole arrays (`.../checkpoint`).
A checkpoint whose arrays are files of their own (zarr, OCDBT) is a UserError that says how to save it as one file.
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
CHUNKED = "__msgpack_chunked_array__"  # an array of a gigabyte or more comes in pieces
CHECKPOINT = re.compile(r"(.*/)?checkpoint(_\d+)?$")
ADVICE = (
    'Restore it with flax or orbax, and save one of its trees by safetensors.numpy.save_file with keys joined by "/": '
    "import opens that file as well."
)


def read_archive(path: Path) -> dict[str, Any]:
    """The newest training state in an archive, as nested dictionaries of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [info for info in archive.infolist() if CHECKPOINT.match(info.filename)]
            if not found:
                names = ", ".join(archive.namelist()[:5])
                raise UserError(
                    f"{path}: no file of it is called checkpoint or checkpoint_<step>; it holds {names}, ... {ADVICE}"
                )
            newest = max(found, key=lambda info: [int(number) for number in re.findall(r"\d+", info.filename)])
            return unpack(archive.read(newest), f"{path}/{newest.filename}")
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not readable as a zip archive ({error}). Download it again.") from error


def unpack(content: bytes, where: str) -> dict[str, Any]:
    """A flax state dict of bytes in MessagePack."""
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
    return {key: _whole(value, f"{where}: {key}") for key, value in state.items()}


def _extension(code: int, data: bytes) -> Any:
    import msgpack

    if code not in (ARRAY, SCALAR):
        return None
    shape, dtype, values = msgpack.unpackb(data, raw=False)
    if dtype == "bfloat16":
        return torch.frombuffer(bytearray(values), dtype=torch.bfloat16).reshape(shape)
    return torch.from_numpy(np.frombuffer(values, np.dtype(dtype)).reshape(shape).copy())


def _whole(tree: Any, where: str) -> Any:
    """The tree with arrays that come in pieces put together; a name in the place of an array is a UserError."""
    if isinstance(tree, str):
        raise UserError(f"{where}: the arrays are in files of their own ({tree[:40]}). {ADVICE}")
    if not isinstance(tree, Mapping):
        return tree
    if CHUNKED in tree:
        pieces = [tree["chunks"][str(number)].reshape(-1) for number in range(len(tree["chunks"]))]
        return torch.cat(pieces).reshape([int(tree["shape"][str(number)]) for number in range(len(tree["shape"]))])
    return {str(key): _whole(value, f"{where}/{key}") for key, value in tree.items()}


def choose_weights(state: Mapping[str, Any], weights: str | None) -> tuple[str, Mapping[str, Any]]:
    """(name, tree) of the averages, called by their half-life in thousand images, or of "params",
    the raw weights; none: the only ones.

    The published rows were sampled with another average for each size (`eval.ema` of the presets),
    so of several one must be named.
    """
    trees = {**(state.get("ema_params") or {}), **({"params": state["params"]} if "params" in state else {})} or {
        "params": state
    }
    name = weights or ("" if len(trees) > 1 else next(iter(trees)))
    if name not in trees:
        told = f"weights={weights} is not in this archive" if weights else "this archive holds several sets of weights"
        raise UserError(
            f"{told}. Give weights= one of: {', '.join(trees)}. "
            "The preset's eval.ema says which one the paper sampled with."
        )
    return name, trees[name]


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A tree of tensors as one dict with keys joined by "/"."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        flat |= flatten_tree(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
