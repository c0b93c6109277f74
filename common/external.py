"""Weights that were made elsewhere: found in the usual caches or at a given place, never fetched, and never written.

Every error says which repository and file is wanted, where it was looked for, under what licence it comes, and the command or key that mends it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common import checkpoint
from common.config import TrainConfig, ema_names
from common.errors import UserError, close_match
from common.saved_config import check_config, read_config

PARTS = ("ema", "model", "state_dict")  # of a training checkpoint, best first
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the usual names in a Hugging Face repository, best first
MAX_LISTED = 8


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth, .bin or .ckpt file, on the CPU; no code in it is run.

    Entries that are None (statistics without a mean) are left out. Of a training checkpoint whose entries are dictionaries, the first of "ema",
    "model" and "state_dict" is taken. A file that is missing, damaged or without tensors is a UserError.
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
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    if not tensors:
        listed = _listed(content if isinstance(content, dict) else [type(content).__name__])
        raise UserError(f"{path}: holds no tensors under names. It holds: {listed}.")
    return tensors


def _load_pickled(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):  # the settings beside the weights of many released files
        return torch.load(path, map_location="cpu", weights_only=True)


def key_faults(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What keeps the tensors from being those of `shapes`, a line each: missing, unknown and misshapen keys."""
    faults = [f"missing {name} {tuple(shape)}" for name, shape in shapes.items() if name not in state]
    faults += [f"not known {name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in shapes]
    found = {name: tuple(state[name].shape) for name in shapes if name in state}
    return faults + [f"{name} is {shape}, expected {tuple(shapes[name])}" for name, shape in found.items() if shape != tuple(shapes[name])]


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Puts the tensors in the place of the module's parameters and buffers, which may be on the meta device; on the CPU, in the module's types.

    Missing, extra and misshapen keys are a UserError that names them and `source`.
    """
    own = module.state_dict()
    faults = key_faults(state, {name: tensor.shape for name, tensor in own.items()})
    if faults:
        more = [f"and {len(faults) - MAX_LISTED} more"] if len(faults) > MAX_LISTED else []
        raise UserError("\n  ".join([f"{source} does not fit {type(module).__name__}, {len(faults)} keys differ:", *faults[:MAX_LISTED], *more]))
    module.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in own.items()}, assign=True)


def hub_files(repository: str, files: Sequence[str], given: str | None = None, key: str = "", licence: str = "") -> list[Path]:
    """The files of a Hugging Face repository, from the local cache (newest `main`) or, with `given`, from that folder.

    key: the configuration key that takes `given`; licence: of the weights; both for the message of the UserError where a file is missing.
    """
    return [hub_file(repository, [file], given, key, licence) for file in files]


def hub_file(repository: str, alternatives: Sequence[str] = HUB_WEIGHTS, given: str | None = None, key: str = "", licence: str = "") -> Path:
    """The first of a repository's files that is there; `given` is a folder that holds one of them, or the file itself."""
    from huggingface_hub import constants, try_to_load_from_cache

    if given is not None:
        return _given(given, alternatives, f"{repository} on Hugging Face", licence)
    cached = [try_to_load_from_cache(repository, file, cache_dir=constants.HF_HUB_CACHE) for file in alternatives]
    if found := next((path for path in cached if isinstance(path, str)), None):
        return Path(found)
    raise UserError(
        f"{' or '.join(alternatives)} of {repository} is needed and not in the Hugging Face cache {constants.HF_HUB_CACHE}. "
        f"Nothing is downloaded silently; get it with: hf download {repository} {alternatives[0]}{_or_key(key)}{_licence(licence)}"
    )


def hub_checkpoint_file(name: str, url: str, given: str | None = None, key: str = "", licence: str = "") -> Path:
    """A file of torch's hub cache (`torch.hub.get_dir()`/checkpoints), or `given`, which is the file or its folder.

    A name such as vgg16-397923af.pth carries the beginning of the file's sha256, which is checked.
    """
    if given is not None:
        return _given(given, [name], url, licence)
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise UserError(
            f"{name} is needed and not in torch's hub cache {path.parent}. "
            f"Nothing is downloaded silently; get it with: curl -L --create-dirs -o {path} {url}{_or_key(key)}{_licence(licence)}"
        )
    expected = re.search(r"-([0-9a-f]{8,})\.", name)
    if expected and not (digest := checkpoint.sha256_of(path)).startswith(expected[1]):
        raise UserError(f"{path} has sha256 {digest}, which does not begin with the {expected[1]} of its name. Download it again from {url}")
    return path


def _given(given: str, names: Sequence[str], origin: str, licence: str) -> Path:
    """The file that the user points to: itself, or the first of `names` in the folder."""
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if found := next((path / name for name in names if (path / name).is_file()), None):
        return found
    state = f"the folder holds {_listed(sorted(p.name for p in path.iterdir()))}" if path.is_dir() else "there is no such file or folder"
    raise UserError(f"{path}: wanted {' or '.join(names)} of {origin}, but {state}.{_licence(licence)}")


def _or_key(key: str) -> str:
    return f" (or give its place as {key}=)" if key else ""


def _licence(licence: str) -> str:
    return f" Licence of the weights: {licence}." if licence else ""


def _listed(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:MAX_LISTED] + (["..."] if len(names) > MAX_LISTED else [])) or "nothing"


@dataclass(frozen=True)
class RunWeights:
    """What one run hands to another."""

    state: dict[str, Tensor]  # of the method, without its external networks
    config: dict[str, Any]  # the run's resolved configuration
    sha256: str  # of the checkpoint's manifest, as in records
    folder: Path
    facts: dict[str, Any]  # what the checkpoint says of itself


def run_weights(folder: Path, ema: str | None = None) -> RunWeights:
    """The newest whole checkpoint of a run folder, with an average in the place of the raw weights that it follows. Nothing else of it is read.

    ema: the average's name ("0.999", "500000img"), "raw" for none, None for the one that the run was evaluated with.
    A config.yaml that is not the one of the checkpoint is a UserError.
    """
    config = read_config(folder)
    averages = ema_names(TrainConfig(ema_decay=config["train"]["ema_decay"], ema_halflife_images=config["train"]["ema_halflife_images"]))
    name = ema or config["eval"]["ema"] or next(iter(averages), "raw")
    path = checkpoint.latest(folder / "checkpoints", stems=("model", f"ema-{name}"))
    if path is None:
        raise UserError(no_checkpoint(folder))
    facts = checkpoint.load_facts(path)
    check_config(folder, config, path, facts)
    if name != "raw" and name not in checkpoint.averages(path):
        raise UserError(f"{path} has no average {name!r}.{close_match(name, averages)} It has: {_listed([*averages, 'raw'])}.")
    state = checkpoint.load_weights(path, None if name == "raw" else name)
    return RunWeights(state, config, checkpoint.digest(path), folder, facts)


def no_checkpoint(folder: Path) -> str:
    """What to do about a run folder without a whole checkpoint, as a sentence."""
    fault = f"{folder} has no whole checkpoint under checkpoints/. "
    if (folder / "result.json").exists():  # the run is finished, and the command that started it would say so and do nothing
        return fault + "The run is finished, so its files were damaged or removed afterwards: restore them from a copy, or remove the folder and run it again."
    return fault + "Finish that run: the command that started it resumes it."
