"""Earlier stages: `model.<key>=train` first trains the stage in another run folder, with the preset of the same name.

The later run's configuration keeps the word `train`. So its folder and its identity do not depend on the place of the
earlier run. `stages.json` in its folder has the digest of the earlier checkpoint; a start with another one is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixlat.common.config.identity import run_folder
from pixlat.common.config.resolve import load_presets, resolve
from pixlat.common.config.schema import RunConfig
from pixlat.common.errors import UserError
from pixlat.common.files import read_json, write_whole
from pixlat.launch.job.folder import RESULT
from pixlat.methods import Stage, get_spec

TRAIN = "train"  # the value of `model.<key>` with which the run trains the stage itself
HANDED_DOWN = ("seed", "out", "dry_run", "train.precision", "train.threads", "train.trackers", "data.workers")
OF_THE_STAGE = ("latents", "crop", "resize")  # keys of `data` that an earlier stage takes from its preset
STAGES = "stages.json"


def stage_runs(run: RunConfig) -> dict[str, RunConfig]:
    """The runs that must finish before this one can start, by the key of `model` that needs them."""
    return {
        stage.key: stage_run(run, stage)
        for stage in get_spec(run.method).stages
        if getattr(run.model, stage.key) == TRAIN
    }


def stage_run(run: RunConfig, stage: Stage) -> RunConfig:
    """The earlier stage's configuration: the preset of the same name on the same data and seed."""
    spec = get_spec(stage.method)
    if run.preset not in load_presets(spec.presets):
        raise UserError(
            f"model.{stage.key}=train: method={stage.method} has no preset {run.preset!r}. Train it yourself "
            f"(`pixlat train method={stage.method} preset=...`) and give its run folder as model.{stage.key}."
        )
    data = {
        f"data.{field.name}": getattr(run.data, field.name)
        for field in dataclasses.fields(run.data)
        if field.name not in OF_THE_STAGE
    }
    handed = data | {key: _at(run, key) for key in HANDED_DOWN}
    return resolve(spec, {"preset": run.preset} | {key: json.dumps(value) for key, value in handed.items()})


def _at(run: RunConfig, key: str) -> Any:
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value


def with_stages(run: RunConfig, train: Callable[[RunConfig], object]) -> Any:
    """`run.model` with folders of finished runs in the place of the word `train`.

    Calls the function `train` for each earlier run that is not finished.
    """
    folders = {}
    for key, earlier in stage_runs(run).items():
        folders[key] = run_folder(earlier)
        if not (folders[key] / RESULT).exists():
            train(earlier)
    return dataclasses.replace(run.model, **{key: str(folder) for key, folder in folders.items()})


def record_or_check_stages(folder: Path, earlier: list[dict[str, Any]]) -> None:
    """The first start records the digests of earlier checkpoints; UserError if a later start finds other digests."""
    file = folder / STAGES
    digests = {entry["key"]: entry["checkpoint_sha256"] for entry in earlier}
    if not file.exists():
        if digests:
            write_whole(file, json.dumps(digests, indent=1) + "\n")
        return
    known = read_json(file)
    if not isinstance(known, dict):
        raise UserError(
            f"{file} is damaged: it does not hold the digests of earlier stages. Restore it from a copy, "
            "or choose another name= for a new run."
        )
    if known != digests:
        changed = sorted(key for key in {**known, **digests} if known.get(key) != digests.get(key))
        raise UserError(
            f"{folder} was built on another checkpoint of model.{', model.'.join(changed)} ({file} has its digest). "
            "Restore that run, or choose another name= for a new one."
        )
