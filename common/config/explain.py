"""The help of a group of keys, read from the comments behind a dataclass's fields. Imports no torch."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def field_comments(source: str) -> Iterator[tuple[str, str]]:
    """(field, help) from the source of a dataclass: the comment behind a field, or the lines of `#:` above it."""
    field = r"^((?: {4}#:.*\n)*) {4}(\w+)\s*:[^#\n]*(?:#\s*(.+))?$"
    for above, name, behind in re.findall(field, source, flags=re.MULTILINE):
        if help_text := " ".join(re.findall(r"#:\s*(.+)", above)) or behind:
            yield name, help_text


def preset_notes(path: str) -> dict[str, str]:
    """What each preset of a presets.yaml says of itself; one that `extends` another and says nothing says the same."""
    text, loader = Path(path).read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    raw: dict[str, Any] = yaml.load(text, Loader=loader)

    def note(name: str) -> str:
        preset = raw[name]
        return str(preset["about"] if "about" in preset else note(preset["extends"]) if "extends" in preset else "")

    return {name: note(name) for name in raw}


def type_name(annotation: Any) -> str:
    """ "int" of a field's type, which is a string where its module postpones annotations, and a class elsewhere."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def describe(config: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, help) of every field of a config dataclass, nested ones expanded; help: `field_comments`."""
    bases = [base for base in reversed(config.__mro__) if dataclasses.is_dataclass(base)]
    comments = {name: text for base in bases for name, text in field_comments(inspect.getsource(base))}
    for item in dataclasses.fields(config):
        key = f"{prefix}.{item.name}" if prefix else item.name
        default = item.default_factory() if callable(item.default_factory) else item.default
        if dataclasses.is_dataclass(default):
            yield from describe(type(default), key)
        elif key not in ("model", "sample"):  # whose fields are the method's
            yield key, type_name(item.type), "none" if default is None else str(default), comments.get(item.name, "")
