"""Turns a file of a method's authors into a run folder, which `pixlat evaluate` samples and scores without training."""

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
from pixlat.common.files import parse_json, write_whole
from pixlat.common.training.state import load_state_without_external, state_without_external
from pixlat.common.weights import checkpoint
from pixlat.common.weights.tensors import key_faults, read_tensors
from pixlat.evaluation.records.imported import IMPORTED, digest_of
from pixlat.evaluation.records.parents import LINEAGE
from pixlat.evaluation.records.record import faults_of_fields
from pixlat.evaluation.score.models import build, saved_settings
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
    """Creates the run folder and returns a message for the user.

    The file gives the architecture. A preset gives what shapes do not show: sampler and objective. `settings` override
    both. UserError if file and method do not have the same keys, or if the folder exists.
    """
    spec = get_spec(method)
    if not spec.released:
        raise UserError(f"method={method} opens no released files. Methods that do: {', '.join(importable())}.")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run folder already. Choose another name=, or remove it.")
    exported = (file / "config.yaml").exists()
    if exported:
        run, built, released = from_export(spec, file, settings)
    else:
        run, built, released = from_file(spec, file, weights, preset, settings)
    architecture = {**released.model, "num_classes": released.num_classes, "image_size": released.image_size}
    facts = {
        "method": method,
        "file": str(file.resolve()),
        "bytes": weights_file(file).stat().st_size,
        "sha256": checkpoint.sha256_of(weights_file(file)),
        "weights": released.weights,
        "ema_decay": released.ema_decay,
        "licence": licence or released.licence,
        "licence_source": "given" if licence else "of the export" if exported else LICENCE_OF_CODE,
        "architecture": architecture,
        "tensors": len(released.state),
        "numbers": sum(tensor.numel() for tensor in released.state.values()),
        "preset": run.preset,
        "imported_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"lineage": exported_lineage(weights_file(file))} if exported else {}),
    }
    write_folder(folder, run, state_without_external(built), facts)
    shape = ", ".join(f"{key}={value}" for key, value in architecture.items())
    kept = (
        f"{facts['tensors']} tensors, every one accounted for, sha256 {facts['sha256']}, "
        f"licence {facts['licence']} ({facts['licence_source']})"
    )
    return (
        f"{folder}: {spec.title} ({shape}; preset {run.preset})\n  {released.weights}: {kept}\nEvaluate it with: "
        f"pixlat evaluate run={folder}"
    )


Opened = tuple[RunConfig, Method, Released]  # the configuration, the method with the weights, and the file's content


def from_file(
    spec: MethodSpec, file: Path, weights: str | None, preset: str | None, settings: Mapping[str, str]
) -> Opened:
    """Opens a released file. UserError if it does not have the layout of this method's files."""
    opener: OpenReleased = load_object(spec.released)  # type: ignore[assignment]
    try:
        released = opener(file, weights)
    except UserError:
        raise
    except Exception as error:
        # the opener reads the architecture from names and shapes of an unknown file, so any error is possible
        raise UserError(
            f"{file} does not have the layout of a released file of method={spec.name} "
            f"({type(error).__name__}: {error})."
        ) from error
    released = decided(released, settings)
    run = resolve(spec, {**facts_of_file(released), "preset": preset or fitting_preset(spec, released), **settings})
    built, _ = build(run)
    load_state_without_external(built, built.from_reference(released.state))
    return run, built, released


def decided(released: Released, settings: Mapping[str, str]) -> Released:
    """The file's content with the one of its `choices` of model settings that agrees with the user's settings.

    UserError if more than one agrees, or none; the message lists them.
    """
    if not released.choices:
        return released
    left = [
        choice
        for choice in released.choices
        if all(settings.get(f"model.{key}", str(value)) == str(value) for key, value in choice.items())
    ]
    if len(left) == 1:
        return replace(released, model={**released.model, **left[0]})
    listed = [
        "model." + ", model.".join(f"{key}={value}" for key, value in choice.items()) for choice in released.choices
    ]
    raise UserError(
        f"{released.why_choose} Add model.{next(iter(released.choices[0]))}=... to the command, as its authors set it. "
        f"Possible: {'; '.join(listed)}."
    )


def from_export(spec: MethodSpec, folder: Path, settings: Mapping[str, str]) -> Opened:
    """Opens a folder that `pixlat export` wrote: tensors under our names, and a configuration beside them."""
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
    """The metadata that `pixlat export` wrote into the file's header; UserError for any other file."""
    with safe_open(file, "pt") as opened:
        origin = opened.metadata() or {}
    if not {"ema", "ema_decay", "licence"} <= set(origin) or not re.fullmatch(
        r"(\d(\.\d+)?(e-\d+)?)?", origin["ema_decay"]
    ):
        raise UserError(
            f"{file} does not say which average it holds, as files of `pixlat export` do. Export the run again."
        )
    return dict(origin)


def exported_lineage(file: Path) -> dict[str, Any] | None:
    """Which networks and earlier runs the exported run used; None if the export does not say so, as early ones."""
    text = metadata_of(file).get("lineage")
    if text is None:
        return None
    try:
        lineage = parse_json(text)
        faults = faults_of_fields(lineage) if isinstance(lineage, dict) else ["it is no object"]
    except UserError as error:
        faults = [str(error)]
    if faults:
        raise UserError(f"{file} is damaged: its lineage is not valid ({'; '.join(faults[:3])}). Export the run again.")
    return {name: lineage[name] for name in LINEAGE if name in lineage}


def importable() -> list[str]:
    """The methods that open released files."""
    return [name for name in sorted(registered()) if get_spec(name).released]


def weights_file(file: Path) -> Path:
    """The only file of weights in a folder, or the file itself. UserError if a folder has several or none."""
    if not file.is_dir():
        return file
    inside = [
        path for path in sorted(file.iterdir()) if path.suffix in (".pth", ".pt", ".safetensors", ".bin", ".ckpt")
    ]
    if len(inside) != 1:
        raise UserError(f"{file} holds {len(inside)} files of weights. Give one of them as file=.")
    return inside[0]


# The run folder keeps the imported weights as raw weights and has no averages beside them.
ALONE = {"train.ema_decay": "[]", "train.ema_halflife_images": "[]", "eval.ema": "raw"}


def facts_of_file(released: Released) -> dict[str, str]:
    """Classes, image size and architecture of the file, as overrides of the configuration."""
    data = {"data.num_classes": released.num_classes, "data.image_size": released.image_size}
    model = {f"model.{key}": value for key, value in released.model.items()}
    return {key: json.dumps(value) for key, value in (data | model).items()} | ALONE


def fitting_preset(spec: MethodSpec, released: Released) -> str:
    """The preset with the file's architecture. If several have it: the first of those that train longest."""
    runs = {name: resolve(spec, {"preset": name}) for name in load_presets(spec.presets)}
    fitting = [name for name, run in runs.items() if fits(run, released)]
    if not fitting:
        shape = ", ".join(f"{key}={value}" for key, value in released.model.items())
        raise UserError(
            f"no preset of method={spec.name} has {shape} at {released.image_size} pixels. "
            f"Give preset=NAME for the settings that shapes do not show (sampler, objective): {', '.join(runs)}."
        )
    return max(fitting, key=lambda name: runs[name].train.images)


def fits(run: RunConfig, released: Released) -> bool:
    """Whether a configuration has the file's image size and architecture."""
    return run.data.image_size == released.image_size and all(
        getattr(run.model, key) == value for key, value in released.model.items()
    )


def write_folder(folder: Path, run: RunConfig, state: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes config.yaml, imported.json and one checkpoint, whose identity keeps any training from continuing it."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = json.dumps(facts, indent=1) + "\n"
    # with these digests a reader notices later changes of either file
    bound = {"config_identity": identity(run), "imported_sha256": digest_of(origin)}
    saved = checkpoint.Checkpoint(
        {"model": state}, {"identity": IMPORTED_IDENTITY, "step": 0, "images_seen": 0, **bound}
    )
    checkpoint.save(folder / "checkpoints", 0, saved, keep=1)
    write_whole(folder / IMPORTED, origin)
    write_whole(folder / "config.yaml", to_yaml(run))  # last, because it makes the folder a run folder
