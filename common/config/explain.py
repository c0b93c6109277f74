"""Reads the help of configuration keys from the comments in their dataclasses. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def field_comments(source: str) -> Iterator[tuple[str, str]]:
    """(field, help) for each field in the source of a dataclass: the comment behind it, or the `#:` lines above it."""
    field = r"^((?: {4}#:.*\n)*) {4}(\w+)\s*:[^#\n]*(?:#\s*(.+))?$"
    for above, name, behind in re.findall(field, source, flags=re.MULTILINE):
        if help_text := " ".join(re.findall(r"#:\s*(.+)", above)) or behind:
            yield name, help_text


def preset_notes(path: str) -> dict[str, str]:
    """The `about` text of each preset in a presets.yaml. A preset without one has that of the preset it `extends`."""
    text, loader = Path(path).read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    raw: dict[str, Any] = yaml.load(text, Loader=loader)

    def note(name: str) -> str:
        preset = raw[name]
        return str(preset["about"] if "about" in preset else note(preset["extends"]) if "extends" in preset else "")

    return {name: note(name) for name in raw}


def type_name(annotation: Any) -> str:
    """The name of a field's type, such as "int". The annotation is a string if its module postpones annotations."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def fields_of(config: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any, type]]:
    """(key, field, default, its dataclass) of every field of a config dataclass and of those nested in it."""
    for item in dataclasses.fields(config):
        key = f"{prefix}.{item.name}" if prefix else item.name
        default = item.default_factory() if callable(item.default_factory) else item.default
        if dataclasses.is_dataclass(default):
            yield from fields_of(type(default), key)
        else:
            yield key, item, default, config


@functools.cache
def comments_of(config: type) -> dict[str, str]:
    """The help of a dataclass's own and inherited fields, by name."""
    bases = [base for base in reversed(config.__mro__) if dataclasses.is_dataclass(base)]
    return {name: text for base in bases for name, text in field_comments(inspect.getsource(base))}


def describe(config: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, help) of every field of a config dataclass and of the dataclasses nested in it."""
    for key, item, default, owner in fields_of(config, prefix):
        if key not in ("model", "sample"):  # each method defines the fields of these two
            meaning = comments_of(owner).get(item.name, "")
            yield key, type_name(item.type), "none" if default is None else str(default), meaning
