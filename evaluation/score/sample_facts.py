"""Reads samples.json, which says how the .npz beside it was made, so that nobody has to repeat it as keys.

`pixlat sample` writes both files. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pixlat.common.config.resolve import UINT8_RULES
from pixlat.common.config.schema import DataConfig
from pixlat.common.errors import UserError
from pixlat.common.files import read_json
from pixlat.evaluation.records.record import faults_of_fields
from pixlat.evaluation.score.outcome import SPACES

SAMPLES = "samples.json"
SETTINGS = {"float32": "fp32", "tf32": "tf32", "bfloat16": "bf16"}  # executed precision -> the key that asks for it
# fields of records, which samples.json has of the model
MADE_WITH = ("pretrained_components", "parents", "config", "selection")
DRAWN = ("balanced", "random", "heldout")  # laws whose labels come in random order


@dataclass(frozen=True)
class SampleFacts:
    """How images were made."""

    method: str
    space: str
    labels: str | None  # balanced, random or heldout; None: the labels were chosen in another way
    uint8: str
    precision: str  # fp32, tf32 or bf16
    data: DataConfig  # what the model was trained on
    #: its networks of others, its earlier runs, its settings and how many were tried, as in records; None: the file is
    #: of an early version
    made_with: dict[str, Any] | None = None

    def check(self, **given: str | None) -> None:
        """Raises UserError if a key of the command contradicts a fact. A key whose value is None was not given."""
        for key, value in given.items():
            fact = getattr(self, key)
            if value not in (None, fact):
                known = f"says {fact}" if fact else "names neither of the laws"
                raise UserError(
                    f"{key}={value} contradicts {SAMPLES} beside the file, which {known}. Leave {key}= out."
                )


def facts_of(npz: Path, sha256: str) -> SampleFacts | None:
    """The facts of the .npz with this digest; None if samples.json beside it is missing or describes another file."""
    file = npz.with_name(SAMPLES)
    if not file.is_file():
        return None
    content = read_json(file)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or files.get(npz.name) != sha256:
        return None
    try:
        return _facts(content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{file} is damaged ({reason}). Sample again, or remove it and give the keys yourself."
        ) from error


def _facts(content: Mapping[str, Any]) -> SampleFacts:
    source, images, data = content["source"], content["images"], content["data"]
    if source["space"] not in SPACES or images["uint8"] not in UINT8_RULES:
        raise ValueError(f"unknown space {source['space']!r} or rounding {images['uint8']!r}")
    known = {field.name for field in fields(DataConfig)}
    law = images["label_law"] if images["label_law"] in DRAWN else None
    trained_on = DataConfig(**{key: value for key, value in data.items() if key in known} | {"latents": None})
    precision = SETTINGS[images["precision"]]
    made_with = {key: source[key] for key in MADE_WITH} if MADE_WITH[0] in source else None
    if made_with and (faults := faults_of_fields(made_with)):
        raise ValueError(faults[0])
    return SampleFacts(str(source["method"]), source["space"], law, images["uint8"], precision, trained_on, made_with)
