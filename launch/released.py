"""From a file of a method's authors to a run folder that `evaluation/run.py` samples and evaluates, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from common import checkpoint
from common.config import RunConfig, load_presets, resolve, to_yaml
from common.errors import UserError
from common.files import write_whole
from common.trainer import load_own_state, own_state
from evaluation.models import IMPORTED, build, saved_settings
from methods import MethodSpec, get_spec, load_object, registered
from methods.base import Method, OpenReleased, Released

LICENCE_OF_CODE = "of the authors' code; whether it covers the weights was not verified"


def import_released(file: Path, folder: Path, method: str, weights: str | None, preset: str | None, licence: str | None, settings: Mapping[str, str]) -> str:
    """Makes the folder. The architecture is the file's, what shapes do not tell (sampler, objective) a preset's; `settings` override both.

    A key of the file that the method does not know, or has and the file has not, is a UserError; so is a folder that is there already.
    """
    spec = get_spec(method)
    if not spec.released:
        raise UserError(f"method={method} opens no released files. Methods that do: {', '.join(importable())}.")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run folder already. Choose another name=, or remove it.")
    exported = (file / "config.yaml").exists()
    if exported:
        run, built, found = from_export(spec, file, settings)
    else:
        run, built, found = from_file(spec, file, weights, preset, settings)
    architecture = {**found.model, "num_classes": found.num_classes, "image_size": found.image_size}
    facts = {
        "method": method,
        "file": str(file.resolve()),
        "bytes": weights_file(file).stat().st_size,
        "sha256": checkpoint.sha256_of(weights_file(file)),
        "weights": found.weights,
        "ema_decay": found.ema_decay,
        "licence": licence or found.licence,
        "licence_source": "given" if licence else "of the export" if exported else LICENCE_OF_CODE,
        "architecture": architecture,
        "tensors": len(found.state),
        "numbers": sum(tensor.numel() for tensor in found.state.values()),
        "preset": run.preset,
        "imported_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_folder(folder, run, own_state(built), facts)
    shape = ", ".join(f"{key}={value}" for key, value in architecture.items())
    kept = f"{facts['tensors']} tensors, every one accounted for, sha256 {facts['sha256']}, licence {facts['licence']} ({facts['licence_source']})"
    return f"{folder}: {spec.title} ({shape}; preset {run.preset})\n  {found.weights}: {kept}\nEvaluate it with: python evaluation/run.py run={folder}"


Found = tuple[RunConfig, Method, Released]


def from_file(spec: MethodSpec, file: Path, weights: str | None, preset: str | None, settings: Mapping[str, str]) -> Found:
    """The configuration of a released file, its method with the weights, and the file."""
    opener: OpenReleased = load_object(spec.released)  # type: ignore[assignment]
    found = opener(file, weights)
    run = resolve(spec, {**told(found), "preset": preset or fitting_preset(spec, found), **settings})
    built, _ = build(run)
    load_own_state(built, built.from_reference(found.state))
    return run, built, found


def from_export(spec: MethodSpec, folder: Path, settings: Mapping[str, str]) -> Found:
    """The same of what `export` wrote: our names already, and a configuration beside them."""
    run = resolve(spec, {**saved_settings(folder), **ALONE, **settings})
    if run.method != spec.name:
        raise UserError(f"{folder} holds a model of method={run.method}, not of method={spec.name}.")
    built, info = build(run)
    with safe_open(weights_file(folder), "pt") as file:
        origin = file.metadata()
    state = load_file(weights_file(folder))
    load_own_state(built, state)
    decay = float(origin["ema_decay"]) if origin["ema_decay"] else None
    return run, built, Released(state, {}, info.num_classes, info.image_size, origin["ema"], decay, origin["licence"])


def importable() -> list[str]:
    """The methods that open released files."""
    return [name for name in sorted(registered()) if get_spec(name).released]


def weights_file(file: Path) -> Path:
    """The one file in a folder of weights, or the file itself."""
    if not file.is_dir():
        return file
    inside = [path for path in sorted(file.iterdir()) if path.suffix in (".pth", ".pt", ".safetensors", ".bin", ".ckpt")]
    if len(inside) != 1:
        raise UserError(f"{file} holds {len(inside)} files of weights. Give one of them as file=.")
    return inside[0]


# The weights stand in the place of raw ones: a folder made of a file has no averages beside them.
ALONE = {"train.ema_decay": "[]", "train.ema_halflife_images": "[]", "eval.ema": "raw"}


def told(found: Released) -> dict[str, str]:
    """What the file tells, as overrides."""
    data = {"data.num_classes": found.num_classes, "data.image_size": found.image_size}
    model = {f"model.{key}": value for key, value in found.model.items()}
    return {key: json.dumps(value) for key, value in (data | model).items()} | ALONE


def fitting_preset(spec: MethodSpec, found: Released) -> str:
    """The preset with the file's architecture; of several the one that trains longest, and of these the first."""
    runs = {name: resolve(spec, {"preset": name}) for name in load_presets(spec.presets)}
    fitting = [name for name, run in runs.items() if fits(run, found)]
    if not fitting:
        shape = ", ".join(f"{key}={value}" for key, value in found.model.items())
        raise UserError(
            f"no preset of method={spec.name} has {shape} at {found.image_size} pixels. Give preset=NAME for what the shapes do not tell: {', '.join(runs)}."
        )
    return max(fitting, key=lambda name: runs[name].train.images)


def fits(run: RunConfig, found: Released) -> bool:
    """Whether a configuration has the file's numbers."""
    return run.data.image_size == found.image_size and all(getattr(run.model, key) == value for key, value in found.model.items())


def write_folder(folder: Path, run: RunConfig, state: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """config.yaml, imported.json and one checkpoint of an identity that no training continues."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model": state}
    checkpoint.save(folder / "checkpoints", 0, checkpoint.Checkpoint(tensors, {"identity": "imported", "step": 0, "images_seen": 0}), keep=1)
    write_whole(folder / IMPORTED, json.dumps(facts, indent=1) + "\n")
    write_whole(folder / "config.yaml", to_yaml(run))  # last: a folder without it is none
