"""The help of a group of keys, read from the comments behind a dataclass's fields. Imports no torch."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator


def field_comments(source: str) -> Iterator[tuple[str, str]]:
    """(field, help) from the source of a dataclass: the comment behind a field, or the lines of `#:` above it."""
    field = r"^((?: {4}#:.*\n)*) {4}(\w+)\s*:[^#\n]*(?:#\s*(.+))?$"
    for above, name, behind in re.findall(field, source, flags=re.MULTILINE):
        if help_text := " ".join(re.findall(r"#:\s*(.+)", above)) or behind:
            yield name, help_text


def describe(config: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, help) of every field of a config dataclass, nested ones expanded; help: `field_comments`."""
    bases = [base for base in reversed(config.__mro__) if dataclasses.is_dataclass(base)]
    comments = {name: text for base in bases for name, text in field_comments(inspect.getsource(base))}
    for item in dataclasses.fields(config):
        key = f"{prefix}.{item.name}" if prefix else item.name
        default = item.default_factory() if callable(item.default_factory) else item.default
        if dataclasses.is_dataclass(default):
            yield from describe(type(default), key)
        elif item.name not in ("model", "sample"):
            yield key, str(item.type), "none" if default is None else str(default), comments.get(item.name, "")
