"""Tensors from files that others wrote, and loading them into a network without a missing or extra key."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pixlat.common.errors import UserError

PARTS = ("ema", "model", "state_dict")  # of a training checkpoint, best first

MAX_LISTED = 8


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth, .bin or .ckpt file, on the CPU; no code in it is run.

    Entries that are None (statistics without a mean) are left out.
    Of a training checkpoint whose entries are dictionaries, the first of "ema", "model" and "state_dict" is taken.
    A file that is missing, damaged or without tensors is a UserError.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickled(path)
    except Exception as error:  # the unpickler meets damaged bytes with whatever they lead to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: not readable as a file of tensors ({reason}). Download it again.") from error
    found: Any = content
    if isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        found = next((content[part] for part in PARTS if isinstance(content.get(part), dict)), {})
    tensors = (
        {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
        if isinstance(found, dict)
        else {}
    )
    if not tensors:
        held = listed(content if isinstance(content, dict) else [type(content).__name__])
        raise UserError(f"{path}: holds no tensors under names. It holds: {held}.")
    return tensors


def _load_pickled(path: Path) -> Any:
    # the settings beside the weights of many released files
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def key_faults(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What keeps the tensors from being those of `shapes`, a line each: missing, unknown and misshapen keys."""
    faults = [f"missing {name} {tuple(shape)}" for name, shape in shapes.items() if name not in state]
    faults += [f"not known {name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in shapes]
    found = {name: tuple(state[name].shape) for name in shapes if name in state}
    return faults + [
        f"{name} is {shape}, expected {tuple(shapes[name])}"
        for name, shape in found.items()
        if shape != tuple(shapes[name])
    ]


def check_released(
    state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], what: str = "model", note: str = ""
) -> None:
    """Compares the keys of a released file with `shapes`, by the authors' names. UserError lists all that differ.

    what: the network that the file is loaded into; note: is printed after the number of keys.
    """
    if faults := key_faults(state, shapes):
        raise UserError(
            "\n  ".join([f"The released weights do not fit this {what}, {len(faults)} keys differ{note}:", *faults])
        )


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Puts the tensors in the place of the module's parameters and buffers, which may be on the meta device;
    on the CPU, in the module's types.

    Missing, extra and misshapen keys are a UserError that names them and `source`.
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
