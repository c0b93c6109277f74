"""Reads tensors from files that others wrote, and loads them into a network; missing or extra keys are errors."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pixlat.common.errors import UserError

PARTS = ("ema", "model", "state_dict")  # entries of a training checkpoint that may hold the weights, best first

MAX_LISTED = 8


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors, .pt, .pth, .bin or .ckpt file to the CPU, without executing pickled code.

    Skips entries that are not tensors, such as a mean that is None. If the file is a training checkpoint whose entries
    are dictionaries, takes the first of "ema", "model" and "state_dict".
    Raises UserError if the file is missing, damaged or without tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickled(path)
    except Exception as error:  # the unpickler may raise any exception for damaged bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: not readable as a file of tensors ({reason}). Download it again.") from error
    entries: Any = content
    if isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        entries = next((content[part] for part in PARTS if isinstance(content.get(part), dict)), {})
    tensors = (
        {str(key): value for key, value in entries.items() if isinstance(value, Tensor)}
        if isinstance(entries, dict)
        else {}
    )
    if not tensors:
        held = listed(content if isinstance(content, dict) else [type(content).__name__])
        raise UserError(f"{path}: holds no named tensors. It holds: {held}.")
    return tensors


def _load_pickled(path: Path) -> Any:
    # many released files hold their training settings as a Namespace beside the weights
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def key_faults(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """One line for each missing, unknown or misshapen key of `state`, compared with `shapes`."""
    faults = [f"missing {name} {tuple(shape)}" for name, shape in shapes.items() if name not in state]
    faults += [f"not known {name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in shapes]
    present = {name: tuple(state[name].shape) for name in shapes if name in state}
    return faults + [
        f"{name} is {shape}, expected {tuple(shapes[name])}"
        for name, shape in present.items()
        if shape != tuple(shapes[name])
    ]


def check_released(
    state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], what: str = "model", note: str = ""
) -> None:
    """Raises UserError unless the keys of a released file match `shapes` (authors' names). It lists all differences.

    what: the network into which the file is loaded. note: text to print after the number of keys.
    """
    if faults := key_faults(state, shapes):
        raise UserError(
            "\n  ".join([f"The released weights do not fit this {what}, {len(faults)} keys differ{note}:", *faults])
        )


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Replaces the module's parameters and buffers by the tensors, on the CPU and in the module's dtypes.

    The module may be on the meta device. Raises UserError that names `source` and each missing, extra or misshapen key.
    """
    own = module.state_dict()
    faults = key_faults(state, {name: tensor.shape for name, tensor in own.items()})
    if faults:
        more = [f"and {len(faults) - MAX_LISTED} more"] if len(faults) > MAX_LISTED else []
        raise UserError(
            "\n  ".join(
                [
                    f"{source} does not fit {type(module).__name__}, {len(faults)} keys differ:",
                    *faults[:MAX_LISTED],
                    *more,
                ]
            )
        )
    module.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in own.items()}, assign=True)


def listed(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:MAX_LISTED] + (["..."] if len(names) > MAX_LISTED else [])) or "nothing"
