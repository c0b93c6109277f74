"""From a file of a method's authors to a run folder that `pixlat evaluate` samples and evaluates,
without training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pixlat.common.config.identity import identity, to_yaml
from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.config.saved import IMPORTED_IDENTITY, check_config, read_config
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.common.files import write_whole
from pixlat.common.training.state import load_state_without_external, state_without_external
from pixlat.common.weights import checkpoint
from pixlat.common.weights.tensors import key_faults, read_tensors
from pixlat.evaluation.score.models import IMPORTED, build, digest_of, saved_settings
from pixlat.methods import MethodSpec, get_spec, load_object, registered
from pixlat.methods.base import Method, OpenReleased, Released

LICENCE_OF_CODE = "of the authors' code; whether it covers the weights was not verified"


def import_released(
    file: Path,
    folder: Path,
    method: str,
    weights: str | None,
    preset: str | None,
    licence: str | None,
    settings: Mapping[str, str],
) -> str:
    """Makes the folder.

    The architecture is the file's, what shapes do not tell (sampler, objective) a preset's; `settings` override both.

    A key of the file that the method does not know, or has and the file has not, is a UserError;
    so is a folder that is there already.
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
    write_folder(folder, run, state_without_external(built), facts)
    shape = ", ".join(f"{key}={value}" for key, value in architecture.items())
    kept = (
        f"{facts['tensors']} tensors, every one accounted for, sha256 {facts['sha256']}, "
        f"licence {facts['licence']} ({facts['licence_source']})"
    )
    return (
        f"{folder}: {spec.title} ({shape}; preset {run.preset})\n  {found.weights}: {kept}\nEvaluate it with: "
        f"pixlat evaluate run={folder}"
    )


Found = tuple[RunConfig, Method, Released]


def from_file(
    spec: MethodSpec, file: Path, weights: str | None, preset: str | None, settings: Mapping[str, str]
) -> Found:
    """The configuration of a released file, its method with the weights, and the file."""
    opener: OpenReleased = load_object(spec.released)  # type: ignore[assignment]
    try:
        found = opener(file, weights)
    except UserError:
        raise
    except Exception as error:
        # the architecture is read from a stranger's names and shapes, which may lead to anything
        raise UserError(
            f"{file} does not have the layout of a released file of method={spec.name} "
            f"({type(error).__name__}: {error})."
        ) from error
    found = decided(found, settings)
    run = resolve(spec, {**facts_of_file(found), "preset": preset or fitting_preset(spec, found), **settings})
    built, _ = build(run)
    load_state_without_external(built, built.from_reference(found.state))
    return run, built, found


def decided(found: Released, settings: Mapping[str, str]) -> Released:
    """The file with the one of its `choices` that the user's settings name;
    a UserError asks for it where they leave more than one, or none.
    """
    if not found.choices:
        return found
    left = [
        choice
        for choice in found.choices
        if all(settings.get(f"model.{key}", str(value)) == str(value) for key, value in choice.items())
    ]
    if len(left) == 1:
        return replace(found, model={**found.model, **left[0]})
    listed = ["model." + ", model.".join(f"{key}={value}" for key, value in choice.items()) for choice in found.choices]
    raise UserError(
        f"{found.why_choose} Add model.{next(iter(found.choices[0]))}=... to the command, as its authors set it. "
        f"Possible: {'; '.join(listed)}."
    )


def from_export(spec: MethodSpec, folder: Path, settings: Mapping[str, str]) -> Found:
    """The same of what `export` wrote: our names already, and a configuration beside them."""
    file = weights_file(folder)
    state, origin = read_tensors(file), metadata_of(file)
    check_config(folder, read_config(folder), file, origin)
    run = resolve(spec, {**saved_settings(folder), **ALONE, **settings})
    if run.method != spec.name:
        raise UserError(f"{folder} holds a model of method={run.method}, not of method={spec.name}.")
    built, info = build(run)
    if faults := key_faults(state, {name: tensor.shape for name, tensor in state_without_external(built).items()}):
        raise UserError(
            f"{file} does not fit the config.yaml beside it, {len(faults)} keys differ: {'; '.join(faults[:5])}."
        )
    load_state_without_external(built, state)
    decay = None if origin["ema_decay"] == "" else float(origin["ema_decay"])
    return run, built, Released(state, {}, info.num_classes, info.image_size, origin["ema"], decay, origin["licence"])


def metadata_of(file: Path) -> dict[str, str]:
    """What `export` wrote into the head of a file; any other file is a UserError."""
    with safe_open(file, "pt") as opened:
        origin = opened.metadata() or {}
    if not {"ema", "ema_decay", "licence"} <= set(origin) or not re.fullmatch(
        r"(\d(\.\d+)?(e-\d+)?)?", origin["ema_decay"]
    ):
        raise UserError(
            f"{file} does not say which average it holds, as files of `pixlat export` do. Export the run again."
        )
    return dict(origin)


def importable() -> list[str]:
    """The methods that open released files."""
    return [name for name in sorted(registered()) if get_spec(name).released]


def weights_file(file: Path) -> Path:
    """The one file in a folder of weights, or the file itself."""
    if not file.is_dir():
        return file
    inside = [
        path for path in sorted(file.iterdir()) if path.suffix in (".pth", ".pt", ".safetensors", ".bin", ".ckpt")
    ]
    if len(inside) != 1:
        raise UserError(f"{file} holds {len(inside)} files of weights. Give one of them as file=.")
    return inside[0]


# The weights stand in the place of raw ones: a folder made of a file has no averages beside them.
ALONE = {"train.ema_decay": "[]", "train.ema_halflife_images": "[]", "eval.ema": "raw"}


def facts_of_file(found: Released) -> dict[str, str]:
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
            f"no preset of method={spec.name} has {shape} at {found.image_size} pixels. "
            f"Give preset=NAME for what the shapes do not tell: {', '.join(runs)}."
        )
    return max(fitting, key=lambda name: runs[name].train.images)


def fits(run: RunConfig, found: Released) -> bool:
    """Whether a configuration has the file's numbers."""
    return run.data.image_size == found.image_size and all(
        getattr(run.model, key) == value for key, value in found.model.items()
    )


def write_folder(folder: Path, run: RunConfig, state: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """config.yaml, imported.json and one checkpoint of an identity that no training continues."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = json.dumps(facts, indent=1) + "\n"
    # a later change of either file shows
    bound = {"config_identity": identity(run), "imported_sha256": digest_of(origin)}
    saved = checkpoint.Checkpoint(
        {"model": state}, {"identity": IMPORTED_IDENTITY, "step": 0, "images_seen": 0, **bound}
    )
    checkpoint.save(folder / "checkpoints", 0, saved, keep=1)
    write_whole(folder / IMPORTED, origin)
    write_whole(folder / "config.yaml", to_yaml(run))  # last: a folder without it is none
