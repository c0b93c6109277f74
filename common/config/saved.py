"""Reads a run folder's config.yaml within size limits, and compares it with the checkpoint. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pixlat.common.config.identity import identity_of
from pixlat.common.config.schema import flatten
from pixlat.common.errors import UserError
from pixlat.common.files import read_text

CONFIG = "config.yaml"
MAX_CONFIG_BYTES = 2**20
MAX_DEPTH = 20  # levels of nested groups and lists
IMPORTED_IDENTITY = "imported"  # identity of a checkpoint with imported weights, which no training can resume


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a run folder's config.yaml, nested. Raises UserError if the file is missing or damaged."""
    file = folder / CONFIG
    if not file.exists():
        raise UserError(
            f"{folder} is not a run folder: it has no {CONFIG}. Give the folder that `pixlat train` printed, "
            "such as runs/<name>."
        )
    text = read_text(file, MAX_CONFIG_BYTES)
    try:
        _check_form(text)
        settings: Any = OmegaConf.to_container(OmegaConf.create(text))
        _check_required(dict(flatten(settings)))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is damaged: {reason}. {_restore()}") from error
    return dict(settings)


def _check_form(text: str) -> None:
    """Raises UserError for YAML that pixlat never writes and that could take gigabytes or hours to read."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.ScalarEvent) and depth == 0:
            raise UserError("it holds no keys")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            raise UserError("it has aliases or is nested too deeply; pixlat writes no such file")


def _check_required(settings: Mapping[str, Any]) -> None:
    """Raises UserError unless the keys that are needed before `resolve` have values of the right types."""
    numbers = [settings.get(f"train.{key}") for key in ("ema_decay", "ema_halflife_images")]
    holds = {
        "method": isinstance(settings.get("method"), str),
        "train.ema_decay and train.ema_halflife_images": all(
            isinstance(values, list) and all(map(_is_number, values)) for values in numbers
        ),
        "eval.ema": isinstance(settings.get("eval.ema", 0), str | None),
    }
    if missing := [key for key, valid in holds.items() if not valid]:
        raise UserError(f"it has no {missing[0]}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < math.inf


def _restore() -> str:
    return (
        "Restore the file from a copy. Or take the command from starts.jsonl, start it with another name=, "
        "and copy the config.yaml that it writes."
    )


def check_config(folder: Path, settings: Mapping[str, Any], checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Raises UserError if config.yaml was changed after the checkpoint was trained with it.

    facts: of the checkpoint. Early versions imported weights without an identity; those cannot be checked.
    """
    expected = facts.get("config_identity", facts.get("identity"))
    if expected in (None, IMPORTED_IDENTITY) or (actual := identity_of(settings)) == expected:
        return
    raise UserError(
        f"{folder / CONFIG} is not the configuration of {checkpoint} (identity {actual} instead of {expected}): "
        "somebody changed a setting afterwards, so none of the settings can be trusted. "
        f"{_restore()} To sample with other settings, give them on the command line, such as sample.guidance=2."
    )
