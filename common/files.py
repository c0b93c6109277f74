"""Files that are never seen half-written."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Writes a UTF-8 text file, line ends as given, beside its place and renames it there. Returns the path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    return temporary.replace(path)
