"""The identity of a run: a hash of the keys that can change a result, and the run folder's name. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pixlat.common.config.resolve import evaluated_ema, resolve
from pixlat.common.config.schema import RunConfig, Spec, flatten, to_dict

# Settings that change neither a weight nor a score. Runs that differ only in these keys have the same identity.
INERT_KEYS = (
    "name", "out", "dry_run", "data.workers", "data.broken", "train.recompute_blocks", "train.threads",
    "train.trackers", "train.keep_checkpoints",
    "eval.batch", "eval.grid_columns", "eval.every_images",
)  # fmt: skip
INERT_GROUPS = ("cluster.", "budget.")  # a budget only sets `train.images`, which is part of the identity

# Keys that later versions added, with the value that is equivalent to the behaviour before. The hash leaves out a key
# that has this value, so that runs of earlier versions keep their identity.
LATER_KEYS: dict[str, Any] = {
    "data.modes": "convert",
    "data.latents": None,
    "data.crop": "center",
    "data.resize": None,
    "train.hold_images": 0,
    "eval.seeds": [],
    "eval.judges": [],
    "eval.precision": "fp32",
    "eval.uint8": "round",
}


def inert(key: str) -> bool:
    """Whether a setting changes neither a weight nor a score."""
    return key in INERT_KEYS or key.startswith(INERT_GROUPS)


def identity(run: RunConfig) -> str:
    """12 hex digits of a SHA-256 over all settings that can change a weight or a score."""
    return identity_of(to_dict(run))


def identity_of(saved: Mapping[str, Any]) -> str:
    """The identity of a saved configuration, which may lack keys that later versions added."""
    settings = {key: value for key, value in flatten(saved) if not inert(key) and LATER_KEYS.get(key, ...) != value}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


# Settings that no two rows of one table can differ in, or that change nothing but names and places. The seed is what
# several runs of one configuration differ in. Data, precision, rounding and the number of images are in the protocol.
BESIDE_THE_CONFIGURATION = (
    "preset", "seed", "data.path", "data.latents",
    "train.log_images", "train.checkpoint_images", "train.preview_images",
)  # fmt: skip


def config_entry(run: RunConfig, spec: Spec, stages: Mapping[str, str]) -> dict[str, Any]:
    """Which settings a run was trained and sampled with: the field `config` of records.

    stages: for each key of `model` that names an earlier run, the digest of that run's configuration or weights. It
        takes the place of the key's value, which may be a folder.
    The digest has 12 hex digits. Runs that differ only in their seed, their place or their machine have the same
    digest; another guidance or another average of the weights gives another one. `settings` are the settings that
    differ from those of the preset, for readers.
    """
    settings = configuration(run)
    usual = configuration(resolve(spec, {"preset": run.preset}))
    identified = {key: value for key, value in settings.items() if LATER_KEYS.get(key, ...) != value}
    identified |= {f"model.{key}": digest for key, digest in stages.items()}
    return {
        "digest": hashlib.sha256(json.dumps(identified, sort_keys=True).encode()).hexdigest()[:12],
        "settings": {key: _finite(value) for key, value in settings.items() if usual.get(key, ...) != value},
        "preset": run.preset,
    }


def configuration(run: RunConfig) -> dict[str, Any]:
    """The settings by flat key that make runs differ as methods: of training, and of sampling with its average."""
    settings = {
        key: value
        for key, value in flatten(to_dict(run))
        if not inert(key) and key not in BESIDE_THE_CONFIGURATION and not key.startswith("eval.")
    }
    return settings | {"eval.ema": evaluated_ema(run)}


def _finite(value: Any) -> Any:
    """The value for a record, whose numbers are finite and at most 1e30."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, int | float) and not abs(value) <= 1e30 else value


def run_folder(run: RunConfig) -> Path:
    """The run's folder. The same command always gets the same folder; another configuration gets another folder."""
    return Path(run.out) / (run.name or f"{run.method}-{run.data.name}-{run.preset}-seed{run.seed}-{identity(run)[:6]}")


def to_yaml(run: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(run)))


def chosen_settings(run: RunConfig, spec: Spec) -> dict[str, Any]:
    """The settings of a run that differ from the defaults of schema.py and of the method, by key."""
    defaults = dict(flatten(to_dict(RunConfig(method=spec.name, model=spec.config(), sample=spec.sample()))))
    return {key: value for key, value in flatten(to_dict(run)) if value != defaults.get(key, ...)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`"train.lr: 0.001 -> 0.002"` for every key that differs and belongs to the identity."""
    before, after = LATER_KEYS | dict(flatten(old)), LATER_KEYS | dict(flatten(new))
    keys = [key for key in {**before, **after} if not inert(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]
